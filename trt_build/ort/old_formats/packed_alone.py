"""Computes codes and scales from the packed weights of an engine of format 2, which stores only the packed form.

Up to ONNX Runtime 1.31 a session used a stored packed form if its key matched. From 1.32 on a session also packs the
codes and scales itself and compares the bytes, so the codes and scales are needed. The layout of the packed form is
learnt from this machine's kernels: they pack a weight whose values are their own indices. Afterwards one weight of
every kind is packed again and compared with the engine's, so that a wrong layout is an error and never a wrong number.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from export.errors import ExportError
from export.optional import optional_package
from export.quantize.grid import pack, unpack
from trt_build.errors import EngineError
from trt_build.ort.old_formats.packing import TILE_ROWS, QuantizedWeight, pack_in_memory, save_with_packed_forms

if TYPE_CHECKING:
    import onnx

_ONE = np.uint32(0x3F800000)  # bits of float32 1.0; the next 2^23 bit patterns are distinct normal floats
_EXPERT_ALIGNMENT = 64  # bytes; alignment of each expert's values in the packed form of all experts
_SECTION_BYTES = 8  # alignment of initializers in a data file that ONNX Runtime 1.31 wrote
_WORK_BYTES = 1 << 24
# Operator -> the input indices of codes and scales of each weight, and the attribute that holds the bits.
_OPERANDS = {"MatMulNBits": (((1, 2),), "bits"), "QMoE": (((2, 3), (5, 6)), "expert_weight_bits")}


def file_layouts(probe: bytes) -> frozenset[str]:
    """The values of `kernel_layout` that match this machine: SHA-256 of the data file that ONNX Runtime saves with the
    packed probe graph, once in the file layout of version 1.31 and once in that of the installed version."""
    onnx = _onnx()
    with tempfile.TemporaryDirectory(prefix="moeship-probe-") as scratch:
        path = Path(scratch) / "packed.bin"
        save_with_packed_forms(probe, path, Path(scratch))
        data, graph = path.read_bytes(), onnx.load(path.with_suffix(".onnx"), load_external_data=False).graph
    entries = [{entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer]
    written = bytearray()
    for entry in sorted(entries, key=lambda entry: int(entry["offset"])):
        written += bytes(-len(written) % _SECTION_BYTES)
        places = [(int(entry["offset"]), int(entry["length"]))]
        blobs = entry.get("prepacked_0", "").split("|")[1:]
        places += [(int(offset), int(size)) for offset, size, _ in (blob.split(";") for blob in blobs)]
        for offset, size in places:
            written += data[offset : offset + size]
    return frozenset(hashlib.sha256(content).hexdigest() for content in (written, data))


def unpacked_weights(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Codes (uint8) and scales (float32) of every packed weight of a graph, by initializer name.

    Raises EngineError if this machine's kernels do not pack them into the same bytes again.
    """
    graph = _onnx().load(str(path), load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    found: dict[str, npt.NDArray[Any]] = {}
    checked: set[QuantizedWeight] = set()
    for node in graph.node:
        for codes, scales in _OPERANDS.get(node.op_type, ((), ""))[0]:
            tensor = tensors[node.input[codes]]
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if "prepacked_0" not in entries or tensor.name in found:
                continue
            weight = _weight(node, tensor, tensors[node.input[scales]])
            offset, size = map(int, entries["prepacked_0"].split("|")[1].split(";")[:2])
            blob = np.fromfile(path.parent / entries["location"], np.uint8, size, offset=offset)
            values = _unpacked(path, weight, blob, compare=weight not in checked)
            found[tensor.name], found[node.input[scales]] = values
            checked.add(weight)
    return found


def _unpacked(
    path: Path, weight: QuantizedWeight, blob: npt.NDArray[np.uint8], *, compare: bool
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    experts = weight.codes[0] if weight.operator == "QMoE" else 1
    one = replace(weight, codes=(1, *weight.codes[1:]), scales=(1, *weight.scales[1:])) if experts > 1 else weight
    try:
        layout = _learn(one)
        # All experts have equal shares of the blob; an expert's values begin at the first aligned address of its share.
        share = len(blob) // experts
        starts = [-(-index * share // _EXPERT_ALIGNMENT) * _EXPERT_ALIGNMENT for index in range(experts)]
        parts = [layout.unpack(one, blob[start:]) for start in starts]
    except (ExportError, ValueError) as error:
        raise EngineError(f"loading {path}: {error}; build the engine again") from error
    codes = np.concatenate([part[0] for part in parts]).reshape(weight.codes)
    scales = np.concatenate([part[1] for part in parts]).reshape(weight.scales)
    if compare and not np.array_equal(pack_in_memory(weight, codes, scales), blob):
        raise EngineError(
            f"loading {path}: this machine's kernels pack a {weight.operator} weight of {weight.bits} bits differently "
            "from the engine; build the engine again"
        )
    return codes, scales


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The layout of one expert's packed form. It begins with the codes, in tiles of TILE_ROWS rows and a last tile of
    the remaining rows. For each packed code, in order, `tile` (in a full tile) and `rest` (in the last tile) give the
    index of the code in the unpacked tile. The scales begin at byte `scales_start`; `scales` gives the index of each
    packed scale among the unpacked scales."""

    tile: npt.NDArray[np.int64]
    rest: npt.NDArray[np.int64]
    scales_start: int
    scales: npt.NDArray[np.int64]

    def unpack(
        self, weight: QuantizedWeight, blob: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        """Codes (uint8) and scales (float32) of one expert from its packed form, each as a flat array."""
        rest_bytes = len(self.rest) * weight.bits // 8
        whole = weight.codes_bytes - rest_bytes
        codes = np.empty(weight.codes_bytes, np.uint8)
        for order, start, stop in ((self.tile, 0, whole), (self.rest, whole, weight.codes_bytes)):
            size = len(order) * weight.bits // 8
            step = size * max(1, _WORK_BYTES // size) if size else 1
            inverse = np.argsort(order)
            for first in range(start, stop, step):
                part = unpack(blob[first : min(first + step, stop)].reshape(-1, size), weight.bits)
                codes[first : min(first + step, stop)] = pack(np.take(part, inverse, axis=1), weight.bits).reshape(-1)
        packed_scales = blob[self.scales_start :][: weight.scales_bytes].view(np.float32)
        scales = np.empty_like(packed_scales)
        scales[self.scales] = packed_scales
        return codes, scales


@lru_cache(maxsize=64)
def _learn(weight: QuantizedWeight) -> _Layout:
    """Learn the layout in which this machine's kernels pack one expert of a weight. Raises ValueError if `_Layout`
    cannot describe it."""
    rows = weight.scales[-2]
    rest = rows % TILE_ROWS
    tile, after = (_learn_codes(weight, count) for count in (TILE_ROWS, TILE_ROWS + rest))
    if not np.array_equal(after[: len(tile)], tile):
        raise ValueError(f"{TILE_ROWS} rows are packed differently alone than beside {rest}")
    count = weight.scales_bytes // 4
    if count > 1 << 23:
        raise ValueError(f"a weight has {count} scales, more than can be told apart")
    marks = (_ONE + np.arange(count, dtype=np.uint32)).view(np.float32)
    blob = pack_in_memory(weight, np.zeros(weight.codes, np.uint8), marks.reshape(weight.scales))
    words = blob[: len(blob) // 4 * 4].view(np.uint32)
    places = np.flatnonzero((words >= _ONE) & (words - _ONE < count))
    scales = words[places].astype(np.int64) - int(_ONE)
    if len(places) != count or places[-1] - places[0] != count - 1 or not _is_permutation(scales):
        raise ValueError("the packed form does not hold each scale once, one after the other")
    return _Layout(tile=tile, rest=after[len(tile) :] - len(tile), scales_start=4 * int(places[0]), scales=scales)


def _learn_codes(weight: QuantizedWeight, rows: int) -> npt.NDArray[np.int64]:
    """For each code of a packed weight with `rows` rows, in packed order, its index in the unpacked weight. Raises
    ValueError if the packed form does not begin with each code exactly once."""
    blocks, block_bytes = weight.scales[-1], weight.block_size * weight.bits // 8
    shape = (1, rows, blocks * block_bytes) if weight.operator == "QMoE" else (rows, blocks, block_bytes)
    small = replace(weight, codes=shape, scales=(*shape[:-2], rows, blocks)[-len(weight.scales) :])
    num_codes, base = small.codes_bytes * 8 // weight.bits, 1 << weight.bits
    none = np.zeros(small.scales, np.float32)  # zero scales: the block sums that kernels store are then 0 too
    places, unit = np.zeros(num_codes, np.int64), 1
    while unit < num_codes:
        digits = ((np.arange(num_codes) // unit) % base).astype(np.uint8)
        blob = pack_in_memory(small, pack(digits, weight.bits).reshape(shape), none)
        places += unpack(blob[: small.codes_bytes], weight.bits).astype(np.int64) * unit
        unit *= base
    if not _is_permutation(places):
        raise ValueError("the packed form does not begin with each code once")
    return places


def _is_permutation(places: npt.NDArray[np.int64]) -> bool:
    return bool(np.array_equal(np.sort(places), np.arange(len(places))))


def _weight(node: onnx.NodeProto, codes: onnx.TensorProto, scales: onnx.TensorProto) -> QuantizedWeight:
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    weight = QuantizedWeight(
        operator=node.op_type, codes=tuple(codes.dims), scales=tuple(scales.dims),
        bits=attributes[_OPERANDS[node.op_type][1]], block_size=attributes["block_size"],
        accuracy_level=attributes["accuracy_level"],
    )  # fmt: skip
    if math.prod(weight.scales) * weight.block_size * weight.bits != 8 * weight.codes_bytes:
        raise EngineError(f"reading {codes.name}: {list(codes.dims)} codes do not match {list(scales.dims)} scales")
    return weight


def _onnx() -> Any:  # noqa: ANN401 - the module
    with optional_package("onnx", "unpacking the weights of an engine of format 2", "cpu"):
        import onnx
    return onnx
