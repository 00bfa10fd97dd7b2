"""Block quantisation: float32 to unsigned integer codes with one scale a block, packing of the codes, and the inverses.

Symmetric, b bits: value = (q - 2^(b-1)) * scale, 0 <= q < 2^b, one float32 scale for each `block_size` neighbours
along the last axis (the input features). Packing puts the lower index in the lower bits of a byte.
Source of the layout: ONNX Runtime's MatMulNBits, QMoE and GatherBlockQuantized operator schemas.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
_Ends = tuple[FloatArray | None, FloatArray | None]
# Factors by which a block's scale is multiplied on trial. At 4 bits a smaller scale, which clips an outlier, is often
# better for the rest of the block. The tiny phixtral's int4 engine has a mean KL divergence of 0.034 to 0.046 nats on
# other packages' code, licences and headers with five factors, 0.037 to 0.055 with plain rounding; on the held-out
# slices of the standard library 0.020 to 0.026 and 0.020 to 0.030 (docs/quality.md). At 8 bits other factors than 1
# gain nothing.
STRETCHES = {
    2: (1.0, 0.9, 0.8, 0.7, 0.6), 3: (1.0, 0.92, 0.84, 0.76, 1.08), 4: (1.0, 0.93, 0.87, 0.8, 1.07),
    5: (1.0, 0.96, 0.92, 0.88, 1.04), 6: (1.0, 0.97, 0.94, 1.03), 8: (1.0,),
}  # fmt: skip
LANES = 4  # number of neighbouring values of a block that are moved together
SMALLEST_SCALE = 1e-36  # smallest scale whose stretched value surely has an accurate inverse in float32
SLICE_VALUES = 1 << 16  # values quantised at a time: 256 kB as float32, so that the arrays stay in a core's own cache


def quantize_blocks(
    values: FloatArray, bits: int, block_size: int, *, half_scales: bool = False, refit: bool = False
) -> tuple[ByteArray, FloatArray]:
    """Quantise float32 [..., K] to codes uint8 [..., K] and scales float32 [..., K / block_size], `block_size` a
    multiple of 4.

    The scale of stretch 1 maps the value of largest magnitude, whatever its sign, onto the signed code -2^(b-1), the
    end of the grid without a counterpart on the other side. So that value is exact and no code is unused. Each block
    takes the stretch of STRETCHES with the least squared error. With `half_scales` every scale is rounded to float16
    (infinite beyond its range) before the codes are computed, so that they fit the scale that is stored.

    With `refit` each scale is at last the one with the least squared error for the codes. Values that lie on another
    grid, as those that were quantised before, have errors that no stretch makes orthogonal to the stored values; they
    would be too large or too small together by a per cent or two.
    """
    blocks = np.ascontiguousarray(values).reshape(-1, block_size)
    codes, scales = np.empty(blocks.shape, dtype=np.uint8), np.empty(len(blocks), dtype=np.float32)
    step = max(1, SLICE_VALUES // block_size)
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            scales[part] = _quantize_slice(blocks[part], bits, codes[part], half_scales=half_scales, refit=refit)
    return codes.reshape(values.shape), scales.reshape(*values.shape[:-1], -1)


def _quantize_slice(blocks: FloatArray, bits: int, codes: ByteArray, *, half_scales: bool, refit: bool) -> FloatArray:
    """Write the codes of contiguous blocks [n, block_size] into `codes`; returns the blocks' scales [n].

    The blocks are transposed to [block_size / 4, n * 4], four neighbouring values of a block side by side. So numpy's
    loops run along long rows, and each scale has to be repeated only four times.
    """
    half = 1 << (bits - 1)
    turned = np.empty((blocks.shape[1] // LANES, len(blocks) * LANES), dtype=np.float32)
    np.copyto(_in_order_of_sum(turned.view(np.complex128)), _in_groups(blocks.view(np.complex128)))
    low = _across_lanes(np.minimum, np.minimum.reduce(turned, axis=0))
    high = _across_lanes(np.maximum, np.maximum.reduce(turned, axis=0))
    unit = np.where(-low >= high, low, high) / np.float32(-half) + np.float32(0)  # + 0 turns a scale of -0 into +0
    scales, grid = _best_scales(turned, unit, bits, half_scales=half_scales), np.empty_like(turned)
    _round(turned, _in_lanes(scales), _ends(scales, half), grid)
    if refit:
        scales = _refitted(turned, grid, scales, half_scales=half_scales)
    unsigned = grid.astype(np.int8).view(np.uint8)
    np.bitwise_xor(unsigned, np.uint8(half), out=unsigned)
    np.bitwise_and(unsigned, np.uint8(2 * half - 1), out=unsigned)
    np.copyto(_in_groups(codes.view(np.uint32)), _in_order_of_sum(unsigned.view(np.uint32)))
    return scales


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


def _best_scales(turned: FloatArray, unit: FloatArray, bits: int, *, half_scales: bool) -> FloatArray:
    """The scales [n]: for each block `unit` [n] times the stretch with the least squared error."""
    # The first stretch is taken without a comparison, since errors overflow for weights past 1e18.
    scales = _stretched(unit, STRETCHES[bits][0], half=half_scales)
    if len(STRETCHES[bits]) == 1:
        return scales
    grid = np.empty_like(turned)
    lowest, highest = _ends(unit, 1 << (bits - 1))
    # With a stretch of 1 or more no code is below the lowest, and with more than 1 none is above the highest, so
    # clipping can be left out. A float16 scale or a very small one is too inexact for that.
    every = half_scales or float(np.abs(unit).min(initial=1)) < SMALLEST_SCALE
    least = None
    for stretch in STRETCHES[bits]:
        ends = lowest if every or stretch < 1 else None, highest if every or stretch <= 1 else None
        tried = _stretched(unit, stretch, half=half_scales)
        error = _squared_errors(turned, _in_lanes(tried), ends, grid)
        if least is None:
            least = error
            continue
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(scales, tried, where=better)
    return scales


def _refitted(turned: FloatArray, grid: FloatArray, scales: FloatArray, *, half_scales: bool) -> FloatArray:
    """The scales [n] with the least squared error for the signed codes `grid`: <q, w> / <q, q> of each block. Blocks
    without a code other than 0 keep theirs."""
    products = _across_lanes(np.add, np.einsum("ij,ij->j", grid, turned))
    squares = _across_lanes(np.add, np.einsum("ij,ij->j", grid, grid))
    found = np.divide(products, squares, out=scales.copy(), where=squares > 0)
    return _stretched(found, 1.0, half=half_scales)


def _stretched(unit: FloatArray, stretch: float, *, half: bool) -> FloatArray:
    scales: FloatArray = unit * np.float32(stretch)
    return scales.astype(np.float16).astype(np.float32) if half else scales


def _squared_errors(turned: FloatArray, scales: FloatArray, ends: _Ends, grid: FloatArray) -> FloatArray:
    """The squared error of each block, [n], when its values are rounded with `scales` [n * 4]."""
    _round(turned, scales, ends, grid)
    grid *= scales
    grid -= turned
    return _across_lanes(np.add, np.einsum("ij,ij->j", grid, grid))


def _round(turned: FloatArray, scales: FloatArray, ends: _Ends, grid: FloatArray) -> None:
    """Write the signed codes of transposed blocks into `grid`, as float32; `scales` [n * 4] has one scale a column."""
    inverse = np.divide(np.float32(1), scales)
    if not scales.all():
        inverse[scales == 0] = 0
    np.multiply(turned, inverse, out=grid)
    np.rint(grid, out=grid)
    lowest, highest = ends
    if lowest is not None:
        np.maximum(grid, lowest, out=grid)
    if highest is not None:
        np.minimum(grid, highest, out=grid)


def _ends(scales: FloatArray, half: int) -> tuple[FloatArray, FloatArray]:
    """The lowest and the highest signed code, as rows [n * 4]: numpy's loops over two arrays are faster than loops over
    an array and a number."""
    lowest = np.full(len(scales) * LANES, -half, dtype=np.float32)
    return lowest, np.full_like(lowest, half - 1)


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
