"""Matrices whose values are (code - zero point) * scale, with scales and zero points for groups of input features."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export.formats.view import ByteArray, FloatArray, Grid, PackedTensor, Source, refuse

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class GroupedMatrix(PackedTensor):
    """A matrix [out, in] of codes of `bits` bits. A group has `group_size` input features; the last may have fewer."""

    bits: int
    group_size: int

    @property
    def num_groups(self) -> int:
        return -(-self.features // self.group_size)

    @abstractmethod
    def codes(self, source: Source, first: int, last: int) -> ByteArray:
        """The codes of some rows, uint8 [rows, features]."""

    @abstractmethod
    def zero_points(self, source: Source, first: int, last: int) -> ByteArray | None:
        """The zero points of some rows, uint8 [rows, groups]; None if all are 2^(bits-1)."""

    @abstractmethod
    def scales(self, source: Source, first: int, last: int) -> FloatArray:
        """The scales of some rows, float32 [rows, groups], checked."""

    def group_of_feature(self, source: Source) -> IndexArray | None:  # noqa: ARG002 - few formats store an order
        """The group of each input feature, checked; None if the features of a group are neighbours, in order."""
        return None

    def read(self, source: Source, first: int, last: int) -> FloatArray:
        """Dequantise rows. The product of a float16 or bfloat16 scale and a code is exact in float32, or infinite."""
        values = self.codes(source, first, last).astype(np.float32)
        scales, zeros = self._group_steps(source, first, last)
        order, shifts = self.group_of_feature(source), zeros.astype(np.float32)
        with np.errstate(over="ignore"):  # who reads the values refuses infinite ones
            if order is None and self.features % self.group_size == 0:
                grouped = values.reshape(len(values), self.num_groups, self.group_size)
                grouped -= shifts[..., None]
                grouped *= scales[..., None]
                return values
            groups = np.arange(self.features) // self.group_size if order is None else order
            values -= shifts[:, groups]
            values *= scales[:, groups]
            return values

    def steps(self, source: Source, first: int, last: int) -> tuple[FloatArray, ByteArray]:
        scales, zeros = self._group_steps(source, first, last)
        size = math.gcd(self.group_size, self.features)
        if size == self.group_size:
            return scales, zeros
        # The last group is shorter: each group is taken as several smaller ones.
        more, number = self.group_size // size, self.features // size
        return np.repeat(scales, more, axis=1)[:, :number], np.repeat(zeros, more, axis=1)[:, :number]

    def _group_steps(self, source: Source, first: int, last: int) -> tuple[FloatArray, ByteArray]:
        scales = self.scales(source, first, last)
        zeros = self.zero_points(source, first, last)
        return scales, np.full(scales.shape, 1 << (self.bits - 1), dtype=np.uint8) if zeros is None else zeros

    def grid(self, source: Source) -> Grid | None:
        if self.group_of_feature(source) is not None:
            return None
        zeros = self.zero_points(source, 0, self.num_rows)
        has_zeros = zeros is not None and bool((zeros != 1 << (self.bits - 1)).any())
        return Grid(bits=self.bits, group_size=math.gcd(self.group_size, self.features), has_zeros=has_zeros)


def check_order(matrix: GroupedMatrix, groups: IndexArray) -> IndexArray | None:
    """The group of each input feature as a file states it; None if the features of a group are neighbours, in order.
    Raises CheckpointError unless every group has its number of features."""
    expected = np.arange(matrix.features) // matrix.group_size
    if (groups == expected).all():
        return None
    if groups.min() < 0 or groups.max() >= matrix.num_groups:
        raise refuse(
            matrix.name,
            f"its g_idx names the groups {groups.min()} to {groups.max()}, expected 0 to {matrix.num_groups - 1}; "
            "the file is damaged or was made with other settings: take another copy",
        )
    sizes = np.bincount(groups, minlength=matrix.num_groups)
    if not (sizes == np.bincount(expected, minlength=matrix.num_groups)).all():
        wrong = int(np.flatnonzero(sizes != np.bincount(expected, minlength=matrix.num_groups))[0])
        raise refuse(
            matrix.name,
            f"its g_idx is no permutation of the groups: group {wrong} has {sizes[wrong]} input features, expected "
            f"{matrix.group_size}; the file is damaged or was made with other settings: take another copy",
        )
    return groups
