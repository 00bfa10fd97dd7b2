"""compressed-tensors, as llm-compressor stores it, and float8 in blocks as DeepSeek stores it. For a linear X [N, K]:

  pack-quantized   X.weight_packed int32 [N, K * b / 32]: codes of 4 or 8 bits along the input features, a stream of
                   bits from the lowest bit on; X.weight_scale [N, G]; X.weight_shape [2]; X.weight_zero_point int32
                   [N * b / 32, G], packed along the output features; X.weight_g_idx int32 [K], -1 where it says nothing
  int-quantized    X.weight int8 [N, K], X.weight_scale, X.weight_zero_point int8 of the shape of the scales
  float-quantized  X.weight float8 (E4M3) [N, K], X.weight_scale
  fp8              X.weight float8 (E4M3) [N, K], X.weight_scale_inv [N / rows, K / columns of a block], or one scale

value = (code - zero point) * scale. Codes and zero points are signed; packed ones are stored plus 2^(b-1). A channel is
one group a row, a tensor has one scale, a block has rows and columns. Scales of activations change no weight.
Sources: compressed-tensors 0.20, compressors/ and quantization/lifecycle/forward.py; transformers,
integrations/finegrained_fp8.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.errors import ConfigError, names, shown
from export.formats.bits import unpack_bits
from export.formats.grouped import GroupedMatrix, IndexArray, check_order
from export.formats.registry import Format
from export.formats.view import ByteArray, FloatArray, Header, PackedTensor, Source, check_scales, refuse

_BITS = (4, 8)
# A word of zero points that are zero, which are stored plus 2^(b-1), as a signed number.
_NEUTRAL_WORDS = {bits: int(np.frombuffer(bytes([pattern] * 4), "<i4")[0]) for bits, pattern in ((4, 0x88), (8, 0x80))}
_FLOATS = ("F16", "BF16", "F32")
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
# Tensors beside a linear that concern activations alone.
_OF_ACTIVATIONS = (
    "input_scale", "input_zero_point", "input_g_idx", "output_scale", "output_zero_point", "k_scale", "v_scale",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IntegerMatrix(GroupedMatrix):
    """A linear of signed codes; `stem` is its name. `packed`: whether they are packed into words. `scales_shape`: shape
    of scales and unpacked zero points."""

    stem: str
    packed: bool
    scales_shape: tuple[int, ...]
    has_zeros: bool
    ordered: bool

    def codes(self, source: Source, first: int, last: int) -> ByteArray:
        if self.packed:
            words = np.ascontiguousarray(source.kept(f"{self.stem}.weight_packed")[first:last])
            return unpack_bits(words.view(np.uint8), self.bits)[:, : self.features]
        signed = source.kept(f"{self.stem}.weight")[first:last]
        return signed.view(np.uint8) ^ np.uint8(0x80)  # plus 128

    def zero_points(self, source: Source, first: int, last: int) -> ByteArray | None:
        if not self.has_zeros:
            return None
        stored = source.kept(f"{self.stem}.weight_zero_point")
        if not self.packed:
            return _by_row(stored.view(np.uint8) ^ np.uint8(0x80), self.scales_shape, first, last)
        columns = np.ascontiguousarray(stored.T)  # [groups, words]
        zeros = unpack_bits(columns.view(np.uint8), self.bits)[:, first:last]
        return np.ascontiguousarray(zeros.T)

    def scales(self, source: Source, first: int, last: int) -> FloatArray:
        stored = source.kept(f"{self.stem}.weight_scale").astype(np.float32)
        scales = _by_row(stored, self.scales_shape, first, last)
        check_scales(self.name, scales)
        return scales

    def group_of_feature(self, source: Source) -> IndexArray | None:
        if not self.ordered:
            return None
        groups = source.kept(f"{self.stem}.weight_g_idx").astype(np.int64)
        return None if (groups == -1).all() else check_order(self, groups)

    def check(self, source: Source, zeros: Header | None) -> None:
        """Raise CheckpointError if the stored shape is not that of the codes, and for the `zeros` of a symmetric linear
        that are not all zero: a reader that does not look at `symmetric` takes them."""
        if zeros is not None and not self.has_zeros:
            stored = source.kept(zeros.name)
            is_packed = self.packed and zeros.shape != self.scales_shape
            neutral = 0 if not is_packed else _NEUTRAL_WORDS[self.bits]
            if (stored != neutral).any():
                raise refuse(
                    self.name,
                    f"its settings say that it is symmetric, and {zeros.name} has zero points that are not zero; take "
                    "another copy",
                )
        if self.packed:
            stored = source.kept(f"{self.stem}.weight_shape").reshape(-1).tolist()
            if stored != list(self.shape):
                raise refuse(
                    self.name, f"its weight_shape says {stored}, its codes are {list(self.shape)}; take another copy"
                )


@dataclass(frozen=True, kw_only=True)
class Float8Matrix(PackedTensor):
    """A linear of float8 values with a scale for each block of rows and columns."""

    scale: str  # name of the scales' tensor
    block: tuple[int, int]

    def read(self, source: Source, first: int, last: int) -> FloatArray:
        values: FloatArray = source.kept(self.sources[0])[first:last].astype(np.float32)
        rows, columns = self.block
        grid = (-(-self.shape[0] // rows), -(-self.shape[1] // columns))
        scales = source.kept(self.scale).astype(np.float32).reshape(grid)
        check_scales(self.name, scales)
        values *= scales[np.arange(first, last) // rows][:, np.arange(self.features) // columns]
        return values


def _by_row(stored: Any, shape: tuple[int, ...], first: int, last: int) -> Any:  # noqa: ANN401 - arrays
    """Rows of values that are stored for each row, or once for all."""
    whole = stored.reshape(shape[0], -1) if len(shape) else stored.reshape(1, 1)
    if len(whole) == 1:
        return np.repeat(whole, last - first, axis=0)
    return np.ascontiguousarray(whole[first:last])


def views(settings: Mapping[str, Any], headers: Mapping[str, Header], source: Source) -> dict[str, PackedTensor]:
    """The packed linears of a checkpoint, by the names of their weights. Raises ConfigError for settings and
    CheckpointError for shapes that the format does not have."""
    is_fp8 = settings.get("quant_method") == "fp8"
    schemes = None if is_fp8 else _Schemes(settings)
    found: dict[str, PackedTensor] = {}
    for stem in sorted(_stems(headers)):
        if schemes is None:
            found[f"{stem}.weight"] = _float8(stem, headers, _block_of(settings.get("weight_block_size")))
            continue
        scheme = schemes.of(stem)
        if f"{stem}.weight_packed" in headers or headers[f"{stem}.weight"].dtype == "I8":
            matrix = _integers(stem, headers, scheme)
            matrix.check(source, headers.get(f"{stem}.weight_zero_point"))
            found[matrix.name] = matrix
        else:
            found[f"{stem}.weight"] = _float8(stem, headers, _block_of(scheme.get("block_structure")))
    return found


def _stems(headers: Mapping[str, Header]) -> Iterator[str]:
    """The names of the packed linears."""
    for name, header in headers.items():
        if name.endswith(".weight_packed"):
            yield name.removesuffix(".weight_packed")
        elif name.endswith(".weight") and header.dtype in ("I8", "F8_E4M3"):
            yield name.removesuffix(".weight")


class _Schemes:
    """The settings of the weights by the names of their linears."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        problems = []
        written = settings.get("format")
        if written not in _FORMATS:
            problems.append(f"format is {shown(written)}, expected one of {', '.join(_FORMATS)}")
        sparsity = settings.get("sparsity_config") or {}
        if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
            problems.append(f"sparsity_config is {shown(sparsity)}, expected dense weights")
        transforms = settings.get("transform_config") or {}
        if not isinstance(transforms, dict) or transforms.get("config_groups"):
            problems.append("transform_config rotates activations, which moeship does not support")
        groups = settings.get("config_groups")
        self._groups: list[tuple[str, Mapping[str, Any]]] = []
        for group in groups.values() if isinstance(groups, dict) else []:
            weights = group.get("weights") if isinstance(group, dict) else None
            targets = group.get("targets") if isinstance(group, dict) else None
            if isinstance(weights, dict) and isinstance(targets, list):
                self._groups += [(str(target), weights) for target in targets]
        if not self._groups:
            problems.append(f"config_groups is {shown(groups)}, which says nothing of weights")
        if problems:
            raise ConfigError(
                f"reading the settings of the compressed-tensors weights: {'; '.join(problems)}; take the "
                "checkpoint as it was before compression"
            )

    def of(self, stem: str) -> Mapping[str, Any]:
        """The settings of a linear: those of its name, else those of its class."""
        matching = [weights for target, weights in self._groups if _names(target, stem)]
        matching += [weights for target, weights in self._groups if target == "Linear"]
        if not matching:
            raise refuse(f"{stem}.weight", "no config group of config.json is for it; take another copy")
        return matching[0]


def _names(target: str, stem: str) -> bool:
    """Whether a target of a config group names a linear: by a regular expression or by the end of its name."""
    if target.startswith("re:"):
        try:
            return re.match(target.removeprefix("re:"), stem) is not None
        except re.error as error:
            raise ConfigError(
                f"reading the settings of the compressed-tensors weights: {shown(target)} is no regular expression "
                f"({error}); correct config.json"
            ) from error
    return target == stem or stem.endswith(f".{target}")


def _integers(stem: str, headers: Mapping[str, Header], scheme: Mapping[str, Any]) -> IntegerMatrix:
    name, packed = f"{stem}.weight", f"{stem}.weight_packed" in headers
    bits, symmetric = scheme.get("num_bits"), scheme.get("symmetric", True)
    if bits not in _BITS or scheme.get("type", "int") != "int" or (not packed and bits != 8):
        raise refuse(
            name, f"its settings say {shown(bits)} bits of the type {shown(scheme.get('type'))}, expected integers of "
            f"{' or '.join(map(str, _BITS))} bits; take another copy",
        )  # fmt: skip
    codes = headers[f"{stem}.weight_packed" if packed else name]
    needed = ["weight_scale", *(["weight_shape"] if packed else []), *([] if symmetric else ["weight_zero_point"])]
    missing = [f"{stem}.{ending}" for ending in needed if f"{stem}.{ending}" not in headers]
    if missing:
        raise refuse(name, f"{names(missing)} is missing beside {codes.name}; download the file again")
    scales = headers[f"{stem}.weight_scale"]
    rows = codes.shape[0] if len(codes.shape) == 2 else 0
    features = (codes.shape[1] * 32 // bits if packed else codes.shape[1]) if rows else 0
    strategy, group_size = scheme.get("strategy"), scheme.get("group_size")
    if strategy == "group" and isinstance(group_size, int) and not isinstance(group_size, bool) and group_size > 0:
        size = group_size
    else:
        size = max(1, features)
    groups = -(-features // size)
    per_row = scales.shape == (rows, groups) or (groups == 1 and scales.shape == (rows,))
    whole = strategy == "tensor" and scales.shape in ((), (1,), (1, 1))
    order = f"{stem}.weight_g_idx" if f"{stem}.weight_g_idx" in headers else None
    if order is None and scheme.get("actorder") in (True, "group", "dynamic"):
        raise refuse(
            name,
            f"its groups are in the order of activation (actorder {shown(scheme['actorder'])}), and "
            f"{stem}.weight_g_idx, which says it, is missing; download the file again",
        )
    fits = rows > 0 and strategy in ("group", "channel", "tensor") and (per_row or whole)
    if not symmetric:
        zeros = headers[f"{stem}.weight_zero_point"]
        words = (-(-rows * bits // 32), groups)
        fits = fits and zeros.shape == (words if packed else scales.shape) and not (packed and whole)
    integers = [codes, *([] if symmetric else [headers[f"{stem}.weight_zero_point"]])]
    fits = fits and all(one.dtype == ("I32" if packed else "I8") for one in integers)
    if order:
        fits = fits and headers[order].shape == (features,) and headers[order].dtype == "I32"
    if not fits or scales.dtype not in _FLOATS:
        said = f"{bits} bits, strategy {shown(strategy)}" + (f" of {size}" if strategy == "group" else "")
        found = [(one.name.removeprefix(f"{stem}."), list(one.shape)) for one in headers.values()
                 if one.name.startswith(f"{stem}.weight")]  # fmt: skip
        raise refuse(name, f"its packed shapes do not fit {said}: found {shown(dict(found))}; take another copy")
    read = [codes.name, *(f"{stem}.{ending}" for ending in needed if ending != "weight_shape")]
    unread = _beside(stem, headers, symmetric=bool(symmetric))
    return IntegerMatrix(
        name=name, shape=(rows, features), sources=(*read, *([order] if order else [])),
        unread=(*unread, *([f"{stem}.weight_shape"] if packed else [])), stem=stem, packed=packed, bits=bits,
        group_size=size, scales_shape=() if whole else (rows, groups), has_zeros=not symmetric,
        ordered=order is not None,
        label=f"compressed-tensors int{bits} " + (f"in groups of {size}" if strategy == "group" else f"a {strategy}"),
    )  # fmt: skip


def _float8(stem: str, headers: Mapping[str, Header], block: tuple[int, int] | None) -> Float8Matrix:
    weight = headers[f"{stem}.weight"]
    scale = headers.get(f"{stem}.weight_scale") or headers.get(f"{stem}.weight_scale_inv")
    if scale is None:
        raise refuse(weight.name, f"{stem}.weight_scale is missing beside it; download the file again")
    rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
    whole = rows, columns
    shapes: dict[tuple[int, ...], tuple[int, int]] = {(): whole, (1,): whole, (1, 1): whole}
    if block:
        shapes[-(-rows // block[0]), -(-columns // block[1])] = block
    shapes |= {(rows,): (1, columns), (rows, 1): (1, columns)}
    if not rows or scale.shape not in shapes or scale.dtype not in _FLOATS or weight.dtype != "F8_E4M3":
        raise refuse(
            weight.name,
            f"its shapes do not fit: found {weight.dtype} {list(weight.shape)} with scales {scale.dtype} "
            f"{list(scale.shape)} and blocks of {shown(block)}; take another copy",
        )
    own = shapes[scale.shape]
    kinds = {whole: "a tensor", (1, columns): "a channel"}
    kind = kinds.get(own, f"in blocks of {own[0]}x{own[1]}")
    return Float8Matrix(
        name=weight.name, shape=weight.shape, sources=(weight.name, scale.name), scale=scale.name, block=own,
        unread=_beside(stem, headers, symmetric=True), label=f"float8 {kind}",
    )  # fmt: skip


def _beside(stem: str, headers: Mapping[str, Header], *, symmetric: bool) -> tuple[str, ...]:
    """Names of tensors beside a linear that change none of its weights; symmetric zero points are zeros."""
    endings = (*_OF_ACTIVATIONS, *(("weight_zero_point",) if symmetric else ()))
    return tuple(name for ending in endings if (name := f"{stem}.{ending}") in headers)


def _block_of(value: Any) -> tuple[int, int] | None:  # noqa: ANN401 - JSON value
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(
        r"[1-9]\d{0,8}x[1-9]\d{0,8}", value
    ):  # as compressed-tensors 0.9 wrote it
        value = [int(number) for number in value.split("x")]
    if not (isinstance(value, list) and len(value) == 2 and all(type(one) is int and one > 0 for one in value)):
        raise ConfigError(f"reading the settings of float8 weights: the block is {shown(value)}, expected two numbers")
    return value[0], value[1]


FORMAT = Format(methods=("compressed-tensors", "fp8"), views=views)
