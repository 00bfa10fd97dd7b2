"""The integer grid: float32 blocks to packed unsigned integers with one scale a block, and back.

Symmetric, b bits: value = (q - 2^(b-1)) * scale, 0 <= q < 2^b, one float32 scale for each `block_size` neighbours
along the last axis (the input features). Packing puts the lower index in the lower bits of a byte.
Source of the layout: ONNX Runtime's MatMulNBits, QMoE and GatherBlockQuantized operator schemas.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from export.errors import QuantizationError

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
# At 4 bits a block whose extreme is an outlier gains by clipping it: five stretches take a quarter off the perplexity
# that plain rounding costs the tiny phixtral (+2.4 % instead of +3.4 %). At 8 bits nothing is to be gained.
STRETCHES = {4: (1.0, 0.93, 0.87, 0.8, 1.07), 8: (1.0,)}


def check_blocks(name: str, num_features: int, bits: int, block_size: int) -> None:
    """Raise QuantizationError when a tensor's input features do not fall into whole blocks."""
    if bits not in STRETCHES:
        raise QuantizationError(f"quantising {name}: {bits} bits asked, the grid has {tuple(STRETCHES)}")
    if num_features % block_size:
        raise QuantizationError(
            f"quantising {name}: its {num_features} input features are not a multiple of the block size {block_size}; "
            "build fp32, or choose a block size that divides them"
        )


def quantize_blocks(values: FloatArray, bits: int, block_size: int) -> tuple[ByteArray, FloatArray]:
    """Round to the nearest grid point: [..., K] to uint8 [..., K] and scales [..., K / block_size].

    A scale of stretch 1 maps the block's largest magnitude, with its sign, onto the grid's end that has one value
    more (-2^(b-1)), so that this value is met exactly and no code is wasted. Of the stretches tried for these bits
    the one with the least squared error over the block is taken.
    """
    blocks = values.reshape(*values.shape[:-1], -1, block_size)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return _best_stretch(values, blocks, bits)


def _best_stretch(values: FloatArray, blocks: FloatArray, bits: int) -> tuple[ByteArray, FloatArray]:
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    extreme = np.where(-low >= high, low, high)
    unit = (extreme / np.float32(-(1 << (bits - 1)))).astype(np.float32)
    # The first is taken whatever its error, which overflows for weights past 1e18.
    scales = unit * np.float32(STRETCHES[bits][0])
    codes, least = _round(blocks, scales, bits)
    for stretch in STRETCHES[bits][1:]:
        tried = unit * np.float32(stretch)
        found, error = _round(blocks, tried, bits)
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(scales, tried, where=better)
        np.copyto(codes, found, where=better[..., None])
    return (codes.view(np.uint8) ^ np.uint8(1 << (bits - 1))).reshape(values.shape) & np.uint8((1 << bits) - 1), scales


def _round(blocks: FloatArray, scales: FloatArray, bits: int) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Signed codes of [..., blocks, block_size] under the given scales, and each block's squared error."""
    half = 1 << (bits - 1)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    grid = blocks * inverse[..., None]
    np.rint(grid, out=grid)
    np.clip(grid, -half, half - 1, out=grid)
    codes = grid.astype(np.int8)
    grid *= scales[..., None]
    grid -= blocks
    return codes, np.einsum("...i,...i->...", grid, grid)


def pack(codes: ByteArray, bits: int) -> ByteArray:
    """uint8 codes [..., K] to bytes [..., K * bits / 8], lower index in the lower bits."""
    if bits == 8:
        return codes
    packed: ByteArray = codes[..., 0::2] | np.left_shift(codes[..., 1::2], 4, dtype=np.uint8)
    return packed


def unpack(packed: ByteArray, bits: int) -> ByteArray:
    """The codes [..., K] of bytes [..., K * bits / 8]."""
    if bits == 8:
        return packed
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    codes[..., 0::2] = packed & 0xF
    codes[..., 1::2] = packed >> 4
    return codes


def dequantize_blocks(codes: ByteArray, scales: FloatArray, bits: int) -> FloatArray:
    """Codes [..., K] and scales [..., K / block_size] to float32 [..., K]."""
    blocks = codes.reshape(*scales.shape, -1).astype(np.float32) - np.float32(1 << (bits - 1))
    return (blocks * scales[..., None]).reshape(codes.shape)
