"""GPTQ, as AutoGPTQ, GPTQModel and optimum store it. For a linear X with K input and N output features, b bits, in G
groups of input features:

  X.qweight  int32 [K * b / 32, N]   codes along the input features, a stream of bits from the lowest bit on
  X.qzeros   int32 [G, N * b / 32]   zero points along the output features, packed in the same way
  X.scales   float16 or bfloat16 [G, N]
  X.g_idx    int32 [K]               group of each input feature; absent in some files whose groups are neighbours

value = (code - zero point) * scale of the feature's group. `checkpoint_format` gptq (version 1) stores zero points less
one; gptq_v2 stores them as they are. Version 1 is made of version 2 by subtracting one from every field of a 32-bit
word in one subtraction that may borrow, and is undone by one addition to the word. Codes of 3 bits have no fields that
fit a word, and one is added to each.
Sources: GPTQModel 7.7, nn_modules/qlinear/torch.py and utils/model.py (convert_gptq_v1_to_v2_format_module).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.errors import ConfigError, named, names, shown
from export.formats.bits import unpack_bits
from export.formats.grouped import GroupedMatrix, IndexArray, check_order
from export.formats.registry import Format
from export.formats.view import ByteArray, FloatArray, Header, PackedTensor, Source, check_scales, refuse

METHODS = ("gptq",)
BITS = (2, 3, 4, 8)
_FIELDS = 32  # number of codes after which a code begins at the start of a word, whatever the bits
_FORMATS = {"gptq": 1, "gptq_v2": 2}
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_SCALES = ("F16", "BF16", "F32")
# Settings of GPTQModel that change what a linear computes, with the values that change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "pack_dtype": (None, "int32"),
    "is_marlin_format": (None, False),
    "adapter": (None,),
    "rotation": (None, ""),
}


@dataclass(frozen=True, kw_only=True)
class GptqMatrix(GroupedMatrix):
    """A linear that GPTQ packed; `stem` is its name. `ordered`: whether it has a g_idx."""

    stem: str
    version: int
    ordered: bool

    def codes(self, source: Source, first: int, last: int) -> ByteArray:
        columns = source.kept(f"{self.stem}.qweight")[:, first:last]
        return unpack_bits(np.ascontiguousarray(columns.T).view(np.uint8), self.bits)

    def zero_points(self, source: Source, first: int, last: int) -> ByteArray:
        start, stop = first // _FIELDS * _FIELDS, -(-last // _FIELDS) * _FIELDS
        packed = source.kept(f"{self.stem}.qzeros")
        zeros = self.unpacked_zeros(packed[:, start * self.bits // 32 : stop * self.bits // 32])
        return np.ascontiguousarray(zeros[:, first - start : last - start].T)

    def unpacked_zeros(self, packed: npt.NDArray[np.int32]) -> ByteArray:
        """Zero points, uint8 [groups, rows], of columns of qzeros that begin and end where codes do."""
        words = np.ascontiguousarray(packed).view(np.uint32)
        if self.version == 1 and self.bits in _ONES:
            words = words + np.uint32(_ONES[self.bits])
        zeros = unpack_bits(words.view(np.uint8), self.bits)
        if self.version == 1 and self.bits not in _ONES:
            zeros = (zeros + np.uint8(1)) & np.uint8((1 << self.bits) - 1)
        return zeros

    def scales(self, source: Source, first: int, last: int) -> FloatArray:
        stored = source.kept(f"{self.stem}.scales")[:, first:last]
        scales: FloatArray = np.ascontiguousarray(stored.T).astype(np.float32)
        check_scales(self.name, scales)
        return scales

    def group_of_feature(self, source: Source) -> IndexArray | None:
        if not self.ordered:
            return None
        return check_order(self, source.kept(f"{self.stem}.g_idx").astype(np.int64))


def views(settings: Mapping[str, Any], headers: Mapping[str, Header], source: Source) -> dict[str, PackedTensor]:
    """The packed linears of a checkpoint, by the names of their weights. Raises ConfigError for settings and
    CheckpointError for shapes that GPTQ does not have."""
    version, bits, group_size = _read_settings(settings)
    stems = [name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")]
    found = [_matrix(stem, headers, version, bits, group_size, mixed=bool(settings.get("dynamic"))) for stem in stems]
    if found and settings.get("sym") is True:
        _check_version(found[0], source)
    return {matrix.name: matrix for matrix in found}


def _check_version(matrix: GptqMatrix, source: Source) -> None:
    """Raise ConfigError if a symmetric matrix has zero points that are all one off: they are of the other version, and
    every weight would be moved by a step. A zero point of a symmetric matrix is 2^(bits-1)."""
    words = source.stored_rows(f"{matrix.stem}.qzeros", 0, matrix.num_groups)
    zeros, middle = matrix.unpacked_zeros(words), 1 << (matrix.bits - 1)
    if zeros.min() == zeros.max() and abs(int(zeros[0, 0]) - middle) == 1:
        said, other = sorted(_FORMATS, key=lambda name: _FORMATS[name] != matrix.version)
        raise ConfigError(
            f"reading the settings of the GPTQ weights: sym is true, and read as checkpoint_format {said} every zero "
            f"point of {named(matrix.name)} is {zeros[0, 0]}, expected {middle}; the file seems to be of {other}: "
            "correct checkpoint_format, or sym if the model is not symmetric"
        )


def _read_settings(settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """Version, bits and group size."""
    problems = []
    written = settings.get("checkpoint_format", settings.get("format")) or "gptq"
    bits, group_size = settings.get("bits"), settings.get("group_size")
    if not isinstance(written, str) or written not in _FORMATS:
        problems.append(f"checkpoint_format is {shown(written)}, expected {' or '.join(_FORMATS)}")
    if bits not in BITS or isinstance(bits, bool):
        problems.append(f"bits is {shown(bits)}, expected one of {', '.join(map(str, BITS))}")
    if not isinstance(group_size, int) or isinstance(group_size, bool) or (group_size < 1 and group_size != -1):
        problems.append(f"group_size is {shown(group_size)}, expected a positive number, or -1 for one group a row")
    wrong = sorted(key for key, values in _NEUTRAL.items() if settings.get(key) not in values)
    problems += [f"{key} is {shown(settings[key])}, which moeship does not support" for key in wrong]
    if problems:
        raise ConfigError(
            f"reading the settings of the GPTQ weights: {'; '.join(problems)}; take the checkpoint in GPTQ's usual "
            "form, or as it was before quantisation"
        )
    return _FORMATS[str(written)], int(bits), int(group_size)  # type: ignore[arg-type]


def _matrix(
    stem: str, headers: Mapping[str, Header], version: int, bits: int, group_size: int, *, mixed: bool
) -> GptqMatrix:
    """The linear `stem`. With `mixed` its bits and group size may differ from those of the settings, as the setting
    `dynamic` allows; they follow from the shapes."""
    parts = {kind: headers.get(f"{stem}.{kind}") for kind in ("qweight", "qzeros", "scales", "g_idx")}
    missing = [f"{stem}.{kind}" for kind, header in parts.items() if header is None and kind != "g_idx"]
    if missing:
        raise refuse(f"{stem}.weight", f"{names(missing)} is missing beside {stem}.qweight; download the file again")
    weight, zeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    assert weight is not None
    assert zeros is not None
    assert scales is not None
    order = parts["g_idx"]
    integers = [header for header in (weight, zeros, order) if header is not None]
    wrong = [f"{header.name} is {header.dtype}" for header in integers if header.dtype != "I32"]
    wrong += [f"{scales.name} is {scales.dtype}"] if scales.dtype not in _SCALES else []
    if wrong:
        raise refuse(f"{stem}.weight", f"{', '.join(wrong)}, expected I32 codes and float scales; take another copy")
    shapes = ", ".join(f"{kind} {list(header.shape)}" for kind, header in parts.items() if header is not None)
    flat = len(weight.shape) == len(zeros.shape) == len(scales.shape) == 2 and min(scales.shape) > 0
    rows = scales.shape[1] if flat else 0
    own = 32 * zeros.shape[1] // rows if flat and mixed and zeros.shape[0] == scales.shape[0] else bits
    features = weight.shape[0] * 32 // own if flat and own else 0
    groups = scales.shape[0] if flat else 0
    size = features if group_size == -1 else group_size
    if flat and mixed and groups and -(-features // size) != groups:
        size = -(-features // groups)
    fits = flat and own in BITS and features > 0
    fits = fits and weight.shape == (features * own // 32, rows) and zeros.shape == (groups, rows * own // 32)
    fits = fits and rows * own % 32 == 0 and -(-features // max(1, size)) == groups
    fits = fits and (order is None or order.shape == (features,))
    if not fits:
        said = f"{bits} bits in groups of {group_size if group_size > 0 else 'a whole row'}"
        raise refuse(
            f"{stem}.weight",
            f"its packed shapes do not fit {said}: found {shapes}; are the settings from another checkpoint?",
        )
    sources = tuple(header.name for header in parts.values() if header is not None)
    return GptqMatrix(
        name=f"{stem}.weight", shape=(rows, features), sources=sources, stem=stem, version=version, bits=own,
        group_size=size, ordered=order is not None,
        label=f"gptq int{own} in groups of {size}",
    )  # fmt: skip


FORMAT = Format(methods=METHODS, views=views)
