"""The layout in which moeship's own CPU kernels read a block-quantised matrix: the same for every instruction set.

Sixteen output rows form a group and are stored side by side. A matrix [N, K] of b-bit codes in blocks of B input
features becomes three arrays, with N padded to whole groups and K to whole blocks (G = ceil(N / 16), P = ceil(K / B)):

  codes   uint8 [G, P, 2 * B * b]            scales  [G, P, 16]            zeros  uint8 [G, P, 16]

One block of all rows of a group is B * b / 32 lines of 64 bytes. Byte j of line t belongs to row j // 4 of the group.
Its p-th b bits, counted from the lowest, hold the code of feature 4 * (t * 8 / b + p) + j % 4 of the block. So one
32-bit lane of a register holds four neighbouring features of one row, and the byte products (vpmaddubsw, vpdpbusd and
the tiles of AMX) add up the four of a lane. The sixteen lanes of a register sum sixteen rows.

In the padding the code is the zero point and the scale is 0, so that it adds nothing to a product. A stack of matrices
has one more axis in front. `trt_build/ort/kernels/layout.h` describes the same layout for the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.errors import QuantizationError

LAYOUT = 1  # version of the layout; an attribute of every node that reads it
GROUP_ROWS = 16
LINE_BYTES = 64
BITS = (2, 4, 8)
BLOCK_SIZES = (32, 64, 128)
_QUAD = 4  # number of neighbouring features of a row that are stored together

ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class MatrixLayout:
    """A matrix [rows, features] in this layout: shapes of its arrays, and conversion from and to plain order.
    Raises QuantizationError for bits, block sizes or shapes that the layout does not support."""

    rows: int
    features: int
    bits: int
    block_size: int

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.block_size not in BLOCK_SIZES or self.rows < 1 or self.features < 1:
            raise QuantizationError(
                f"laying out a matrix {[self.rows, self.features]} for the CPU kernels: found {self.bits} bits in "
                f"blocks of {self.block_size}, expected {', '.join(map(str, BITS))} bits in blocks of "
                f"{', '.join(map(str, BLOCK_SIZES))} and at least one row and feature"
            )

    @property
    def groups(self) -> int:
        return -(-self.rows // GROUP_ROWS)

    @property
    def blocks(self) -> int:
        return -(-self.features // self.block_size)

    @property
    def codes_shape(self) -> tuple[int, int, int]:
        return (self.groups, self.blocks, GROUP_ROWS * self.block_size * self.bits // 8)

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        """The shape of the scales, and of the zero points."""
        return (self.groups, self.blocks, GROUP_ROWS)

    @property
    def _lines(self) -> tuple[int, int]:
        """The number of lines of a block, and the number of codes in a byte."""
        return self.block_size * self.bits // (LINE_BYTES // 2), 8 // self.bits

    def pack_codes(self, codes: ByteArray, zeros: ByteArray | None = None) -> ByteArray:
        """Pack uint8 codes [..., N, K] into bytes [..., G, P, 2 * B * b]. The padding gets the zero points `zeros`
        [..., N, P], or 2^(b-1) if they are None."""
        stack = codes.shape[:-2]
        padded = self._padding(stack, zeros)
        padded[..., : self.rows, : self.features] = codes
        lines, per_byte = self._lines
        # [..., group, row, block, line, place in the byte, feature of the quad]
        parts = padded.reshape(*stack, self.groups, GROUP_ROWS, self.blocks, lines, per_byte, _QUAD)
        packed = parts[..., 0, :].copy()
        for place in range(1, per_byte):
            packed |= parts[..., place, :] << np.uint8(place * self.bits)
        # [..., group, block, line, row, feature of the quad]
        ordered = np.moveaxis(packed, -4, -2)
        return np.ascontiguousarray(ordered).reshape(*stack, *self.codes_shape)

    def unpack_codes(self, packed: ByteArray) -> ByteArray:
        """Unpack bytes [..., G, P, 2 * B * b] to uint8 codes [..., N, K]; the inverse of `pack_codes`."""
        stack = packed.shape[:-3]
        lines, per_byte = self._lines
        ordered = packed.reshape(*stack, self.groups, self.blocks, lines, GROUP_ROWS, _QUAD)
        parts = np.moveaxis(ordered, -2, -4)
        mask = np.uint8((1 << self.bits) - 1)
        codes = np.stack([parts >> np.uint8(place * self.bits) & mask for place in range(per_byte)], axis=-2)
        padded = codes.reshape(*stack, self.groups * GROUP_ROWS, self.blocks * self.block_size)
        return np.ascontiguousarray(padded[..., : self.rows, : self.features])

    def pack_scales(self, scales: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Reorder scales or zero points [..., N, P] to [..., G, P, 16]; the dtype stays."""
        stack = scales.shape[:-2]
        padded = np.zeros((*stack, self.groups * GROUP_ROWS, self.blocks), dtype=scales.dtype)
        padded[..., : self.rows, :] = scales
        parts = padded.reshape(*stack, self.groups, GROUP_ROWS, self.blocks)
        return np.ascontiguousarray(np.swapaxes(parts, -1, -2))

    def unpack_scales(self, packed: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Reorder scales or zero points [..., G, P, 16] to [..., N, P]; the inverse of `pack_scales`."""
        rows = np.swapaxes(packed, -1, -2).reshape(*packed.shape[:-3], self.groups * GROUP_ROWS, self.blocks)
        return np.ascontiguousarray(rows[..., : self.rows, :])

    def _padding(self, stack: tuple[int, ...], zeros: ByteArray | None) -> ByteArray:
        """An array of codes in the padded shape, filled with the zero points."""
        shape = (*stack, self.groups * GROUP_ROWS, self.blocks * self.block_size)
        padded = np.full(shape, 1 << (self.bits - 1) if zeros is None else 0, dtype=np.uint8)
        if zeros is not None:
            padded[..., : self.rows, :] = np.repeat(zeros, self.block_size, axis=-1)
        return padded
