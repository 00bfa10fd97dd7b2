"""Block quantisation: float32 to unsigned integer codes with one scale a block, packing of the codes, and the inverses.

Symmetric, b bits: value = (q - 2^(b-1)) * scale, 0 <= q < 2^b, one float32 scale for each `block_size` neighbours
along the last axis (the input features). Packing puts the lower index in the lower bits of a byte.
Source of the layout: ONNX Runtime's MatMulNBits, QMoE and GatherBlockQuantized operator schemas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
# Factors by which the scale of a block's largest value is multiplied on trial. Each gives codes, and the codes give the
# scale that is stored. Factors above 1 leave the largest value short of the grid's end, those below 1 clip it. A
# negative factor changes the side that has one code more, which pays where codes are few. For normal weights in blocks
# of 32 to 128 the best of these has 0.8 % (4 bits), 1.2 % (5) and 1.9 % (6) more squared error than the best of all
# factors from 0.5 to 1.2, at 8 bits 13 % of an error that does not show. At 2 and 3 bits stronger clipping has less
# squared error and more KL divergence, since it clips the largest weights, and these matter most to the model.
STRETCHES = {
    2: (1.0, 0.85, -0.9),
    3: (1.0, 0.91, 1.08, -0.95),
    4: (1.0, 1.11, 0.96, 0.92, 0.87),
    5: (1.0, 1.06, 1.02, 0.98, 0.95),
    6: (1.0, 1.06, 1.03, 0.99, 0.98),
    8: (1.0,),
}
# Version of the search: of STRETCHES, of how one of them is chosen, and of the scale that its codes get. engine.json
# records it. A change of any of them is another version, since `moeship verify` compares scales with the search's own.
SEARCH_VERSION = 1
LANES = 4  # number of neighbouring values of a block that are moved together
SLICE_VALUES = 1 << 16  # values quantised at a time: 256 kB as float32, so that the arrays stay in a core's own cache


def quantize_blocks(
    values: FloatArray,
    bits: int,
    block_size: int,
    *,
    half_scales: bool = False,
    refit: bool = False,
    nearest: bool = False,
) -> tuple[ByteArray, FloatArray]:
    """Quantise float32 [..., K] to codes uint8 [..., K] and scales float32 [..., K / block_size], `block_size` a
    multiple of 4.

    The unit u of a block maps the value of largest magnitude, whatever its sign, onto the signed code -2^(b-1), the end
    of the grid without a counterpart on the other side. For each stretch t of STRETCHES the codes q are w / (u t),
    rounded to the nearest, of two the even one, and clipped. The stretch with the largest <q, w/u>^2 / <q, q> wins, the
    first of equals: its codes have the least squared error with the best scale for them. That scale would make the
    values too small along the weights, by as much as the squared error is of <w, w>. In a layer such a loss adds up
    over all inputs, which rounding errors of either sign do not. So the block's scale is s = u <w/u, w/u> / <q, w/u>,
    with which <s q, w> = <w, w>. The codes that are stored are then the nearest for that scale. With `half_scales` it
    is rounded to float16 before (infinite beyond its range), so that the codes fit the scale that is stored.

    With `refit` each scale is at last the one with the least squared error for the codes. Values that lie on another
    grid, as those that were quantised before, have errors that no stretch makes orthogonal to the stored values; they
    would be too large or too small together by a per cent or two. With `nearest` no scale is tried but the unit.
    """
    blocks = np.ascontiguousarray(values).reshape(-1, block_size)
    codes, scales = np.empty(blocks.shape, dtype=np.uint8), np.empty(len(blocks), dtype=np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        for part, turned, steps, grid in _slices(blocks):
            scales[part] = _scales(turned, bits, steps, grid, half_scales=half_scales, nearest=nearest)
            _round(turned, scales[part], 1 << (bits - 1), grid)
            if refit:
                scales[part] = _refitted(turned, grid, scales[part], half_scales=half_scales)
            _store_codes(grid, bits, codes[part])
    return codes.reshape(values.shape), scales.reshape(*values.shape[:-1], -1)


def block_scales(
    values: FloatArray, bits: int, block_size: int, *, half_scales: bool = False, nearest: bool = False
) -> FloatArray:
    """The scales float32 [..., K / block_size] that `quantize_blocks` gives float32 [..., K] without `refit`, to the
    bit. No codes are made."""
    blocks = np.ascontiguousarray(values).reshape(-1, block_size)
    scales = np.empty(len(blocks), dtype=np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        for part, turned, steps, grid in _slices(blocks):
            scales[part] = _scales(turned, bits, steps, grid, half_scales=half_scales, nearest=nearest)
    return scales.reshape(*values.shape[:-1], -1)


def _slices(blocks: FloatArray) -> Iterator[tuple[slice, FloatArray, FloatArray, FloatArray]]:
    """Parts of contiguous blocks [n, block_size], each transposed, and two arrays of its shape to work in. All slices
    have the same memory: to give it back and to take it again costs as much as the arithmetic."""
    step = max(1, SLICE_VALUES // blocks.shape[1])
    room = np.empty((3, min(step, len(blocks)) * blocks.shape[1]), dtype=np.float32)
    for start in range(0, len(blocks), step):
        part = slice(start, min(start + step, len(blocks)))
        own = room[:, : blocks[part].size].reshape(3, blocks.shape[1] // LANES, -1)
        _turn(blocks[part], own[0])
        yield part, own[0], own[1], own[2]


def _turn(blocks: FloatArray, turned: FloatArray) -> None:
    """Transpose contiguous blocks [n, block_size] to [block_size / 4, n * 4], four neighbouring values of a block side
    by side. So numpy's loops run along long rows, and each scale has to be repeated only four times."""
    np.copyto(_in_order_of_sum(turned.view(np.complex128)), _in_groups(blocks.view(np.complex128)))


def _store_codes(grid: FloatArray, bits: int, codes: ByteArray) -> None:
    """Write the signed codes of transposed blocks into `codes` [n, block_size]."""
    half = 1 << (bits - 1)
    unsigned = grid.astype(np.int8).view(np.uint8)
    np.bitwise_xor(unsigned, np.uint8(half), out=unsigned)
    np.bitwise_and(unsigned, np.uint8(2 * half - 1), out=unsigned)
    np.copyto(_in_groups(codes.view(np.uint32)), _in_order_of_sum(unsigned.view(np.uint32)))


def _scales(
    turned: FloatArray, bits: int, steps: FloatArray, grid: FloatArray, *, half_scales: bool, nearest: bool
) -> FloatArray:
    """The scales [n] of transposed blocks, as they are stored. `steps` and `grid` are overwritten."""
    low = _across_lanes(np.minimum, np.minimum.reduce(turned, axis=0))
    high = _across_lanes(np.maximum, np.maximum.reduce(turned, axis=0))
    # + 0 turns a scale of -0 into +0.
    unit = np.where(-low >= high, low, high) / np.float32(-(1 << (bits - 1))) + np.float32(0)
    return _as_stored(unit if nearest else unit * _best_factors(turned, unit, bits, steps, grid), half=half_scales)


def _in_groups(blocks: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """View [n, r] as [r / 4, 4, n], where each of the r items is four neighbouring values."""
    count, rows = blocks.shape
    group = 4 if rows % 4 == 0 else 1
    return blocks.reshape(count, rows // group, group).transpose(1, 2, 0)


def _in_order_of_sum(turned: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """View [r, n] as [r / 4, 4, n] with each group of four rows reversed. A sum over the rows then adds the errors in
    the same order as numpy's sum over one block."""
    rows, count = turned.shape
    group = 4 if rows % 4 == 0 else 1
    return turned.reshape(rows // group, group, count)[:, ::-1]


def _best_factors(turned: FloatArray, unit: FloatArray, bits: int, steps: FloatArray, grid: FloatArray) -> FloatArray:
    """The factors [n] of the blocks' units that give their scales, computed in units, so that no square leaves
    float32. The weights in units are written into `steps`, and codes into `grid`."""
    half = 1 << (bits - 1)
    np.divide(turned, _in_lanes(np.where(unit == 0, np.float32(1), unit)), out=steps)
    lowest, highest = _ends(turned, half)
    own = _across_lanes(np.add, np.einsum("ij,ij->j", steps, steps))
    best, most = np.zeros_like(unit), np.zeros_like(unit)
    for stretch in STRETCHES[bits]:
        np.multiply(steps, np.float32(1 / stretch), out=grid)
        np.rint(grid, out=grid)
        # The steps lie from -half to half. What cannot pass an end is not clipped there.
        if stretch < 1:
            np.maximum(grid, lowest, out=grid)
        if half / abs(stretch) >= half - 0.5:
            np.minimum(grid, highest, out=grid)
        products = _across_lanes(np.add, np.einsum("ij,ij->j", grid, steps))
        squares = _across_lanes(np.add, np.einsum("ij,ij->j", grid, grid))
        explained = np.divide(products * products, squares, out=np.zeros_like(unit), where=squares > 0)
        better = explained > most
        np.copyto(most, explained, where=better)
        np.copyto(best, products, where=better)
    return np.divide(own, best, out=np.zeros_like(unit), where=best != 0)


def _refitted(turned: FloatArray, grid: FloatArray, scales: FloatArray, *, half_scales: bool) -> FloatArray:
    """The scales [n] with the least squared error for the signed codes `grid`: <q, w> / <q, q> of each block. Blocks
    without a code other than 0 keep theirs."""
    products = _across_lanes(np.add, np.einsum("ij,ij->j", grid, turned))
    squares = _across_lanes(np.add, np.einsum("ij,ij->j", grid, grid))
    found = np.divide(products, squares, out=scales.copy(), where=squares > 0)
    return _as_stored(found, half=half_scales)


def _as_stored(scales: FloatArray, *, half: bool) -> FloatArray:
    return scales.astype(np.float16).astype(np.float32) if half else scales


def _round(turned: FloatArray, scales: FloatArray, half: int, grid: FloatArray) -> None:
    """Write the signed codes, -half to half - 1, of transposed blocks into `grid`, as float32; `scales` [n]."""
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    np.multiply(turned, _in_lanes(inverse), out=grid)
    np.rint(grid, out=grid)
    lowest, highest = _ends(turned, half)
    np.maximum(grid, lowest, out=grid)
    np.minimum(grid, highest, out=grid)


def _ends(turned: FloatArray, half: int) -> tuple[FloatArray, FloatArray]:
    """The lowest and the highest signed code, each as a row of the transposed blocks: numpy compares a row with a row
    by vector instructions, and with a single number without them, in three times the time."""
    lowest, highest = (np.full(turned.shape[1], end, dtype=np.float32) for end in (-half, half - 1))
    return lowest, highest


def _in_lanes(scales: FloatArray) -> FloatArray:
    """Repeat each value of [n] four times: [n * 4]."""
    wide = np.empty(len(scales) * LANES, dtype=np.float32)
    for lane in range(LANES):
        wide[lane::LANES] = scales
    return wide


def _across_lanes(operation: np.ufunc, lanes: FloatArray) -> FloatArray:
    """Reduce [n * 4] to [n]: `operation` over the four neighbours of each block."""
    left = operation(lanes[0::LANES], lanes[1::LANES])
    joined: FloatArray = operation(left, operation(lanes[2::LANES], lanes[3::LANES]))
    return joined


def pack(codes: ByteArray, bits: int) -> ByteArray:
    """Pack uint8 codes [..., K] into bytes [..., K * bits / 8], the lower index in the lower bits."""
    if bits == 8:
        return codes
    pairs = np.ascontiguousarray(codes).view("<u2")
    packed: ByteArray = (pairs | pairs >> np.uint16(4)).astype(np.uint8)
    return packed


def unpack(packed: ByteArray, bits: int) -> ByteArray:
    """Unpack bytes [..., K * bits / 8] to uint8 codes [..., K]; the inverse of `pack`."""
    if bits == 8:
        return packed
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    codes[..., 0::2] = packed & 0xF
    codes[..., 1::2] = packed >> 4
    return codes


def dequantize_blocks(codes: ByteArray, scales: FloatArray, bits: int) -> FloatArray:
    """Dequantise codes [..., K] with scales [..., K / block_size] to float32 [..., K]."""
    blocks = codes.reshape(*scales.shape, -1).astype(np.float32) - np.float32(1 << (bits - 1))
    return (blocks * scales[..., None]).reshape(codes.shape)
