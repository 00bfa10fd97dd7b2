"""The layout in which moeship's own CPU kernels read a block-quantised matrix: the same for every instruction set.

Sixteen output rows form a group and are stored side by side. A matrix [N, K] of b-bit codes in blocks of B input
features becomes three arrays, with N padded to whole groups and K to whole blocks (G = ceil(N / 16), P = ceil(K / B)):

  codes   uint8 [G, P, 2 * B * b]            scales  [G, P, 16]            zeros  uint8 [G, P, 16]

A block of all rows of a group is B / 32 units of 32 input features, one after the other. A unit is b lines of 64 bytes.
Its codes are split into planes whose widths w are powers of two, the lowest bits first: `PLANES` has 3 = 2 + 1,
5 = 4 + 1, 6 = 4 + 2, and one plane for 2, 4 and 8. A plane of w bits takes w lines. Byte j of its line t belongs to row
j // 4 of the group. The byte's p-th w bits, counted from the lowest, are those of feature 4 * (t * 8 / w + p) + j % 4
of the unit. So one 32-bit lane of a register holds four neighbouring features of one row, and the byte products
(vpmaddubsw, vpdpbusd and the tiles of AMX) add up the four of a lane. The sixteen lanes of a register sum sixteen rows.

In the padding the code is the zero point and the scale is 0, so that it adds nothing to a product. A stack of matrices
has one more axis in front. `trt_build/ort/kernels/layout.h` describes the same layout for the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from export.errors import QuantizationError

LAYOUT = 1  # version of the layout; an attribute of every node that reads it
GROUP_ROWS = 16
LINE_BYTES = 64
BLOCK_SIZES = (32, 64, 128)
# Bits of a code -> the widths of the planes into which it is split, the plane of the lowest bits first.
PLANES: Mapping[int, tuple[int, ...]] = MappingProxyType({2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)})
BITS = tuple(PLANES)
_QUADS = 8  # groups of four neighbouring features of a row, which are stored together, in a unit
_UNIT = 32

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

    def pack_codes(self, codes: ByteArray, zeros: ByteArray | None = None) -> ByteArray:
        """Pack uint8 codes [..., N, K] into bytes [..., G, P, 2 * B * b]. The padding gets the zero points `zeros`
        [..., N, P], or 2^(b-1) if they are None."""
        stack = codes.shape[:-2]
        padded = self._padding(stack, zeros)
        padded[..., : self.rows, : self.features] = codes
        # Items of four features: [..., group, row, block, unit, quad]. A code and its shifts stay within a byte.
        items = padded.view(np.uint32).reshape(*stack, self.groups, GROUP_ROWS, self.blocks, self._units, _QUADS)
        lines = np.empty((*items.shape[:-1], self.bits), dtype=np.uint32)
        below = 0
        for width in PLANES[self.bits]:
            plane = items if width == self.bits else items >> np.uint32(below) & _in_bytes(width)
            parts = plane.reshape(*items.shape[:-1], width, 8 // width)
            packed = lines[..., below : below + width]
            packed[...] = parts[..., 0]
            for place in range(1, 8 // width):
                packed |= parts[..., place] << np.uint32(place * width)
            below += width
        ordered = np.moveaxis(lines, -4, -1)  # [..., group, block, unit, line, row]
        return np.ascontiguousarray(ordered).view(np.uint8).reshape(*stack, *self.codes_shape)

    def unpack_codes(self, packed: ByteArray) -> ByteArray:
        """Unpack bytes [..., G, P, 2 * B * b] to uint8 codes [..., N, K]; the inverse of `pack_codes`."""
        stack = packed.shape[:-3]
        codes = self.unpack_groups(packed.reshape(-1, self.blocks * self.codes_shape[2]))
        padded = codes.reshape(*stack, self.groups * GROUP_ROWS, self.blocks * self.block_size)
        return np.ascontiguousarray(padded[..., : self.rows, : self.features])

    def unpack_groups(self, packed: ByteArray) -> ByteArray:
        """Unpack the bytes of some groups [g, P * 2 * B * b] to uint8 codes [g, 16, P * B], padding included."""
        items = np.ascontiguousarray(packed).view(np.uint32)
        items = items.reshape(len(packed), self.blocks * self._units, self.bits, GROUP_ROWS)
        by_row = np.ascontiguousarray(items.transpose(0, 3, 1, 2))
        codes = np.empty((*by_row.shape[:-1], _QUADS), dtype=np.uint32)
        below = 0
        for width in PLANES[self.bits]:
            lines = by_row[..., below : below + width]
            for place in range(8 // width):
                part = lines >> np.uint32(place * width) & _in_bytes(width)
                if below:
                    codes[..., place :: 8 // width] |= part << np.uint32(below)
                else:
                    codes[..., place :: 8 // width] = part
            below += width
        return codes.view(np.uint8).reshape(len(packed), GROUP_ROWS, self.blocks * self.block_size)

    @property
    def _units(self) -> int:
        """The number of units in a block."""
        return self.block_size // _UNIT

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


def _in_bytes(width: int) -> np.uint32:
    """The mask of the lowest `width` bits of each of the four bytes of an item."""
    return np.uint32(0x01010101 * ((1 << width) - 1))
