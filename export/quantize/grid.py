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
SUPPORTED_BITS = (4, 8)


def check_blocks(name: str, num_features: int, bits: int, block_size: int) -> None:
    """Raise QuantizationError when a tensor's input features do not fall into whole blocks."""
    if bits not in SUPPORTED_BITS:
        raise QuantizationError(f"quantising {name}: {bits} bits asked, the grid has {SUPPORTED_BITS}")
    if num_features % block_size:
        raise QuantizationError(
            f"quantising {name}: its {num_features} input features are not a multiple of the block size {block_size}; "
            "build fp32, or choose a block size that divides them"
        )


def quantize_blocks(values: FloatArray, bits: int, block_size: int) -> tuple[ByteArray, FloatArray]:
    """Round to the nearest grid point: [..., K] to uint8 [..., K] and scales [..., K / block_size].

    The scale maps the block's largest magnitude, with its sign, onto the grid's end that has one value more
    (-2^(b-1)), so that this value is met exactly and no code is wasted.
    """
    half = 1 << (bits - 1)
    blocks = values.reshape(*values.shape[:-1], -1, block_size)
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    extreme = np.where(-low >= high, low, high)
    scales = (extreme / np.float32(-half)).astype(np.float32)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    codes = blocks * inverse[..., None]
    np.rint(codes, out=codes)
    codes += half
    np.clip(codes, 0, 2 * half - 1, out=codes)
    return codes.astype(np.uint8).reshape(values.shape), scales


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
