"""The layout in which moeship's own CPU kernels read a block-quantised matrix: one for every instruction set.

Sixteen output rows lie side by side, the rows of a group. A matrix [N, K] of b-bit codes in blocks of B input features
becomes three arrays, N padded to groups and K to blocks (G = ceil(N / 16), P = ceil(K / B)):

  codes   uint8 [G, P, 2 * B * b]            scales  [G, P, 16]            zeros  uint8 [G, P, 16]

A block of a group is B * b / 32 lines of 64 bytes. Byte j of line t belongs to the group's row j // 4. Counted from the
lowest, its p-th b bits hold the code of the block's feature 4 * (t * 8 / b + p) + j % 4. So one 32-bit lane of a
register has four neighbouring features of one row, which is what byte products add up (vpmaddubsw, vpdpbusd and the
tiles of AMX), and sixteen lanes are sixteen rows with sums of their own.

Padding holds the zero point as code and 0 as scale: it adds nothing. A stack of matrices has one axis more in front.
`trt_build/ort/kernels/layout.h` is the reader's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.errors import QuantizationError

LAYOUT = 1  # its version, an attribute of every node that reads it
GROUP_ROWS = 16
LINE_BYTES = 64
BITS = (2, 4, 8)
BLOCK_SIZES = (32, 64, 128)
_QUAD = 4  # neighbouring features of a row that stay together

ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class MatrixLayout:
    """Shapes of a matrix [rows, features] in this layout. Raises QuantizationError for what it does not have."""

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
        """Also the zero points'."""
        return (self.groups, self.blocks, GROUP_ROWS)

    @property
    def _lines(self) -> tuple[int, int]:
        """Lines of a block, and codes of a byte."""
        return self.block_size * self.bits // (LINE_BYTES // 2), 8 // self.bits

    def pack_codes(self, codes: ByteArray, zeros: ByteArray | None = None) -> ByteArray:
        """uint8 codes [..., N, K] to [..., G, P, 2 * B * b]; `zeros` [..., N, P] pad it, or 2^(b-1)."""
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
        """The codes [..., N, K] of [..., G, P, 2 * B * b]."""
        stack = packed.shape[:-3]
        lines, per_byte = self._lines
        ordered = packed.reshape(*stack, self.groups, self.blocks, lines, GROUP_ROWS, _QUAD)
        parts = np.moveaxis(ordered, -2, -4)
        mask = np.uint8((1 << self.bits) - 1)
        codes = np.stack([parts >> np.uint8(place * self.bits) & mask for place in range(per_byte)], axis=-2)
        padded = codes.reshape(*stack, self.groups * GROUP_ROWS, self.blocks * self.block_size)
        return np.ascontiguousarray(padded[..., : self.rows, : self.features])

    def pack_scales(self, scales: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Scales or zero points [..., N, P] to [..., G, P, 16], of their dtype."""
        stack = scales.shape[:-2]
        padded = np.zeros((*stack, self.groups * GROUP_ROWS, self.blocks), dtype=scales.dtype)
        padded[..., : self.rows, :] = scales
        parts = padded.reshape(*stack, self.groups, GROUP_ROWS, self.blocks)
        return np.ascontiguousarray(np.swapaxes(parts, -1, -2))

    def unpack_scales(self, packed: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The scales or zero points [..., N, P] of [..., G, P, 16]."""
        rows = np.swapaxes(packed, -1, -2).reshape(*packed.shape[:-3], self.groups * GROUP_ROWS, self.blocks)
        return np.ascontiguousarray(rows[..., : self.rows, :])

    def _padding(self, stack: tuple[int, ...], zeros: ByteArray | None) -> ByteArray:
        """Codes of the padded shape that stand for 0."""
        shape = (*stack, self.groups * GROUP_ROWS, self.blocks * self.block_size)
        padded = np.full(shape, 1 << (self.bits - 1) if zeros is None else 0, dtype=np.uint8)
        if zeros is not None:
            padded[..., : self.rows, :] = np.repeat(zeros, self.block_size, axis=-1)
        return padded
