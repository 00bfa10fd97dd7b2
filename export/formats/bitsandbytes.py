"""bitsandbytes, as transformers saves it. For a linear X [N, K]:

  nf4, fp4   X.weight bytes of N * K codes of 4 bits, row after row, the first of two in the high bits;
             X.weight.absmax, one scale for each block of neighbouring values (usually 64), X.weight.quant_map float32
             [16], and X.weight.quant_state.bitsandbytes__nf4 (or fp4): JSON as bytes, with blocksize, dtype and shape.
             Double quantisation: absmax are bytes, and X.weight.nested_absmax, X.weight.nested_quant_map float32 [256]
             with nested_blocksize and nested_offset of the JSON give absmax = map[byte] * nested_absmax + offset.
             value = quant_map[code] * absmax
  int8       X.weight int8 [N, K], X.SCB float32 [N]; value = code * SCB / 127. X.weight_format, a number: 0 where the
             codes lie row after row. Versions before 0.45 also saved the tiles of GPUs (1 to 3)

Source: bitsandbytes 0.50, functional.py (QuantState, dequantize_4bit, int8_vectorwise_dequant).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.errors import ConfigError, names, shown
from export.files.reading import parse_json
from export.formats.registry import Format
from export.formats.view import ByteArray, FloatArray, Grid, Header, PackedTensor, Source, refuse

_STATE = ".weight.quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")
_MAX_BLOCK = 1 << 16
_ROWS = 0  # X.weight_format of codes row after row, as INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING numbers the layouts
_INT8_STEP = np.float32(7.874015718698502e-3)  # 1 / 127, as int8_vectorwise_dequant writes it


@dataclass(frozen=True, kw_only=True)
class FourBitMatrix(PackedTensor):
    """A linear of nf4 or fp4 codes. `nested`: block size and offset of double quantisation."""

    block: int
    nested: tuple[int, float] | None

    def read(self, source: Source, first: int, last: int) -> FloatArray:
        start, stop = first * self.features, last * self.features
        packed = source.kept(self.name).reshape(-1).view(np.uint8)[start // 2 : stop // 2]
        codes = np.empty(2 * len(packed), dtype=np.uint8)
        codes[0::2], codes[1::2] = packed >> 4, packed & 15
        values = np.take(source.kept(f"{self.name}.quant_map"), codes)
        blocks = slice(start // self.block, -(-stop // self.block))
        scales = np.repeat(self._absmax(source, blocks), self.block)
        skipped = start - blocks.start * self.block
        result: FloatArray = values * scales[skipped : skipped + len(values)]
        return result.reshape(last - first, self.features)

    def _absmax(self, source: Source, blocks: slice) -> FloatArray:
        stored = source.kept(f"{self.name}.absmax")[blocks]
        scales: FloatArray = stored.astype(np.float32, copy=False)
        if self.nested is not None:
            size, offset = self.nested
            outer = source.kept(f"{self.name}.nested_absmax")[np.arange(blocks.start, blocks.stop) // size]
            scales = np.take(source.kept(f"{self.name}.nested_quant_map"), stored) * outer + np.float32(offset)
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise refuse(self.name, "some of its absmax are negative or not finite; take another copy of the file")
        return scales


@dataclass(frozen=True, kw_only=True)
class Int8Matrix(PackedTensor):
    """A linear of signed codes of 8 bits with a scale a row."""

    scale: str  # name of the tensor SCB

    def read(self, source: Source, first: int, last: int) -> FloatArray:
        values: FloatArray = source.kept(self.name)[first:last].astype(np.float32)
        values *= self._largest(source, first, last)[:, None]
        values *= _INT8_STEP
        return values

    def grid(self, source: Source) -> Grid | None:  # noqa: ARG002 - every such matrix has one
        return Grid(bits=8, group_size=self.features, has_zeros=False)

    def steps(self, source: Source, first: int, last: int) -> tuple[FloatArray, ByteArray]:
        scales = self._largest(source, first, last)[:, None] * _INT8_STEP
        return scales, np.full(scales.shape, 128, dtype=np.uint8)

    def _largest(self, source: Source, first: int, last: int) -> FloatArray:
        """The largest magnitude of each row."""
        found: FloatArray = source.kept(self.scale).reshape(-1)[first:last].astype(np.float32)
        if not (np.isfinite(found) & (found >= 0)).all():
            raise refuse(self.name, "some of its SCB are negative or not finite; take another copy of the file")
        return found


def views(settings: Mapping[str, Any], headers: Mapping[str, Header], source: Source) -> dict[str, PackedTensor]:  # noqa: ARG001 - each tensor says what it is
    """The packed linears of a checkpoint, by the names of their weights. Raises CheckpointError for tensors that
    bitsandbytes does not write."""
    found: dict[str, PackedTensor] = {}
    for name in headers:
        if _STATE in name:
            stem, _, kind = name.partition(_STATE)
            found[f"{stem}.weight"] = _four_bits(f"{stem}.weight", kind, headers, source)
        elif name.endswith(".SCB"):
            stem = name.removesuffix(".SCB")
            found[f"{stem}.weight"] = _eight_bits(stem, headers, source)
    return found


def _four_bits(name: str, kind: str, headers: Mapping[str, Header], source: Source) -> FourBitMatrix:
    state_name = f"{name}.quant_state.bitsandbytes__{kind}"
    state = _state(name, state_name, headers[state_name], source)
    nested = f"{name}.nested_absmax" in headers
    endings = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    needed = [name, *(f"{name}.{ending}" for ending in endings)]
    missing = [one for one in needed if one not in headers]
    if missing:
        raise refuse(name, f"{names(missing)} is missing beside {state_name}; download the file again")
    shape, block, outer = state.get("shape"), state.get("blocksize"), state.get("nested_blocksize") if nested else 1
    offset = state.get("nested_offset", 0.0)
    good = isinstance(shape, list) and len(shape) == 2 and all(type(one) is int and one > 0 for one in shape)
    good = good and isinstance(offset, int | float) and not isinstance(offset, bool) and math.isfinite(offset)
    if not (good and _is_size(block) and _is_size(outer) and kind in _TYPES):
        raise refuse(name, f"its quant_state is {shown(state, 200)}, expected bitsandbytes' own; take another copy")
    assert isinstance(shape, list)
    assert isinstance(block, int)
    assert isinstance(outer, int)
    rows, features = shape
    count = rows * features
    blocks = -(-count // block)
    expected = {
        name: -(-count // 2), f"{name}.absmax": blocks, f"{name}.quant_map": 16,
        f"{name}.nested_absmax": -(-blocks // outer), f"{name}.nested_quant_map": 256,
    }  # fmt: skip
    item = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}
    for one in needed:
        header = headers[one]
        size = math.prod(header.shape) * (item.get(header.dtype, 0) if one == name else 1)
        bytes_alone = one == f"{name}.absmax" and nested
        right = header.dtype == ("U8" if bytes_alone else "F32") or one == name
        if size != expected[one] or not right or features % 2:
            raise refuse(
                name,
                f"its packed shapes do not fit {kind} of {[rows, features]} in blocks of {block}: found {one} "
                f"{header.dtype} {list(header.shape)}; take another copy",
            )
    return FourBitMatrix(
        name=name, shape=(rows, features), sources=tuple(needed), unread=(state_name,), block=block,
        nested=(outer, float(offset)) if nested else None,
        label=f"bitsandbytes {kind} in blocks of {block}",
    )  # fmt: skip


def _is_size(value: Any) -> bool:  # noqa: ANN401 - JSON value
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_BLOCK


def _state(name: str, state_name: str, header: Header, source: Source) -> Mapping[str, Any]:
    if header.dtype != "U8" or len(header.shape) != 1 or header.shape[0] > 1 << 16:
        found = f"{state_name} is {header.dtype} {list(header.shape)}"
        raise refuse(name, f"{found}, expected a text as bytes; take another copy")
    try:
        state = parse_json(source.kept(state_name).tobytes().decode("utf-8"))
    except ValueError as error:
        raise refuse(name, f"its quant_state is not JSON ({error}); take another copy") from error
    return state if isinstance(state, dict) else {}


def _eight_bits(stem: str, headers: Mapping[str, Header], source: Source) -> Int8Matrix:
    name = f"{stem}.weight"
    weight, scale = headers.get(name), headers[f"{stem}.SCB"]
    if weight is None or weight.dtype != "I8" or len(weight.shape) != 2:
        raise ConfigError(
            f"reading the bitsandbytes weights: {name} is {'missing' if weight is None else weight.dtype}, expected I8 "
            f"beside {scale.name}; take another copy"
        )
    if scale.dtype != "F32" or math.prod(scale.shape) != weight.shape[0]:
        found = f"SCB is {scale.dtype} {list(scale.shape)}"
        raise refuse(name, f"{found}, expected F32 [{weight.shape[0]}]; take another copy")
    layout = f"{stem}.weight_format"
    if layout in headers and (order := source.kept(layout).reshape(-1).tolist()) != [_ROWS]:
        raise refuse(
            name,
            f"its weight_format is {shown(order)}, expected [{_ROWS}]: the codes are in the order of a GPU's tiles, "
            "not row after row; load and save the model again with a recent bitsandbytes, or take it unquantised",
        )
    return Int8Matrix(
        name=name, shape=weight.shape, sources=(name, scale.name), scale=scale.name, label="bitsandbytes int8",
        unread=(layout,) if layout in headers else (),
    )  # fmt: skip


FORMAT = Format(methods=("bitsandbytes",), views=views)
