"""AWQ, as AutoAWQ stores it (version "gemm"). For a linear X with K input and N output features, in G groups:

  X.qweight  int32 [K, N / 8]   eight codes of 4 bits along the output features in a word
  X.qzeros   int32 [G, N / 8]   zero points in the same way; absent without zero points
  X.scales   float16 or bfloat16 [G, N]

The fields of a word, from the lowest bits on, hold the outputs 0, 2, 4, 6, 1, 3, 5, 7. value = (code - zero point) *
scale. The factors that AWQ applies to input features are in the weights before X, so nothing else is needed.
Source: AutoAWQ 0.2.9, awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.errors import ConfigError, names, shown
from export.formats.bits import unpack_bits
from export.formats.grouped import GroupedMatrix
from export.formats.registry import Format
from export.formats.view import ByteArray, FloatArray, Header, PackedTensor, Source, check_scales, refuse

_BITS = 4
_FIELDS = 32 // _BITS  # codes of a word
_FIELD_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)
_SCALES = ("F16", "BF16", "F32")


@dataclass(frozen=True, kw_only=True)
class AwqMatrix(GroupedMatrix):
    """A linear that AWQ packed; `stem` is its name. Without `has_zeros` every zero point is 8."""

    stem: str
    has_zeros: bool

    def codes(self, source: Source, first: int, last: int) -> ByteArray:
        return np.ascontiguousarray(_unpacked(source.kept(f"{self.stem}.qweight"), first, last).T)

    def zero_points(self, source: Source, first: int, last: int) -> ByteArray | None:
        if not self.has_zeros:
            return None
        return np.ascontiguousarray(_unpacked(source.kept(f"{self.stem}.qzeros"), first, last).T)

    def scales(self, source: Source, first: int, last: int) -> FloatArray:
        stored = source.kept(f"{self.stem}.scales")[:, first:last]
        scales: FloatArray = np.ascontiguousarray(stored.T).astype(np.float32)
        check_scales(self.name, scales)
        return scales


def _unpacked(words: npt.NDArray[Any], first: int, last: int) -> ByteArray:
    """The codes of the outputs `first` to `last`: uint8 [rows, outputs] of words int32 [rows, N / 8]."""
    start, stop = first // _FIELDS, -(-last // _FIELDS)
    fields = unpack_bits(np.ascontiguousarray(words[:, start:stop]).view(np.uint8), _BITS)
    ordered = fields.reshape(len(words), -1, _FIELDS)[..., _FIELD_OF_OUTPUT].reshape(len(words), -1)
    return ordered[:, first - start * _FIELDS : last - start * _FIELDS]


def views(settings: Mapping[str, Any], headers: Mapping[str, Header], source: Source) -> dict[str, PackedTensor]:  # noqa: ARG001 - headers say it all
    """The packed linears of a checkpoint, by the names of their weights. Raises ConfigError for settings and
    CheckpointError for shapes that AWQ does not have."""
    group_size, has_zeros = _read_settings(settings)
    stems = [name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")]
    found = [_matrix(stem, headers, group_size, has_zeros=has_zeros) for stem in stems]
    return {matrix.name: matrix for matrix in found}


def _read_settings(settings: Mapping[str, Any]) -> tuple[int, bool]:
    """Group size, and whether there are zero points. transformers and AutoAWQ name the settings differently."""
    bits = settings.get("bits", settings.get("w_bit"))
    group_size = settings.get("group_size", settings.get("q_group_size"))
    has_zeros = settings.get("zero_point", True)
    version = str(settings.get("version", "gemm")).lower()
    problems = []
    if version != "gemm":
        problems.append(
            f"version is {shown(settings.get('version'))}, whose words are laid out otherwise, expected 'gemm'"
        )
    if bits != _BITS or isinstance(bits, bool):
        problems.append(f"bits is {shown(bits)}, expected 4")
    if not isinstance(group_size, int) or isinstance(group_size, bool) or (group_size < 1 and group_size != -1):
        problems.append(f"group_size is {shown(group_size)}, expected a positive number, or -1 for one group a row")
    if not isinstance(has_zeros, bool):
        problems.append(f"zero_point is {shown(has_zeros)}, expected true or false")
    if problems:
        raise ConfigError(
            f"reading the settings of the AWQ weights: {'; '.join(problems)}; take the checkpoint in AutoAWQ's version "
            "gemm, or as it was before quantisation"
        )
    return int(group_size), bool(has_zeros)


def _matrix(stem: str, headers: Mapping[str, Header], group_size: int, *, has_zeros: bool) -> AwqMatrix:
    kinds = ("qweight", "qzeros", "scales") if has_zeros else ("qweight", "scales")
    parts = {kind: header for kind in kinds if (header := headers.get(f"{stem}.{kind}")) is not None}
    if len(parts) < len(kinds):
        missing = names(f"{stem}.{kind}" for kind in kinds if kind not in parts)
        raise refuse(f"{stem}.weight", f"{missing} is missing beside {stem}.qweight; download the file again")
    wrong = [
        f"{header.name} is {header.dtype}"
        for kind, header in parts.items()
        if header.dtype not in (_SCALES if kind == "scales" else ("I32",))
    ]
    if wrong:
        raise refuse(f"{stem}.weight", f"{', '.join(wrong)}, expected I32 codes and float scales; take another copy")
    weight, scales = parts["qweight"].shape, parts["scales"].shape
    flat = len(weight) == len(scales) == 2 and min(*weight, *scales) > 0
    features, rows = (weight[0], weight[1] * _FIELDS) if flat else (0, 0)
    size = features if group_size == -1 else group_size
    fits = flat and features % size == 0 and scales == (features // size, rows)
    if not fits or (has_zeros and parts["qzeros"].shape != (features // size, rows // _FIELDS)):
        said = f"4 bits in groups of {group_size if group_size > 0 else 'a whole row'}"
        shapes = ", ".join(f"{kind} {list(header.shape)}" for kind, header in parts.items())
        raise refuse(
            f"{stem}.weight",
            f"its packed shapes do not fit {said}: found {shapes}; are the settings from another checkpoint?",
        )
    return AwqMatrix(
        name=f"{stem}.weight", shape=(rows, features), sources=tuple(header.name for header in parts.values()),
        label=f"awq int4 in groups of {size}", bits=_BITS, group_size=size, stem=stem, has_zeros=has_zeros,
    )  # fmt: skip


FORMAT = Format(methods=("awq",), views=views)
