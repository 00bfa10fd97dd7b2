"""Packs integer codes in the order that TensorRT-LLM's kernels for integer weights and float activations read.

The library itself permutes rows, transposes to column-major, interleaves columns and reorders the codes of a 32-bit
word (cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp). On a matrix [N = out, K = in], as checkpoints
store it, all of these steps together move codes only a little: 32 consecutive codes of 4 bits along K (16 of 8 bits)
become 16 bytes, in which the codes of k and k + 8 are neighbours. 64 columns form a tile, and the tiles of four rows
(two rows at 8 bits) alternate. So a few rows at a time can be packed, and their bytes are consecutive in the file. As a
formula, for int4:

    word = (n div 4) * K/2 + (k div 64) * 32 + (n mod 4) * 8 + ((k div 32) mod 2) * 4 + (k mod 8) div 2
    nibble = 4 * (k mod 2) + (k mod 32) div 8,  value = q + 8

and for int8

    word = (n div 2) * K/2 + (k div 64) * 32 + (n mod 2) * 16 + ((k mod 64) div 16) * 4 + (k mod 8) div 2
    byte = 2 * (k mod 2) + (k mod 16) div 8,  value = q + 128
"""

from __future__ import annotations

import numpy as np

from export.quantize.grid import ByteArray

TILE = 64  # columns (K) of a tile; both dimensions of a packed matrix must be multiples of it
INTERLEAVED_ROWS = {4: 4, 8: 2}  # bits -> number of rows whose tiles alternate


def interleaves_columns(sm: int, *, experts: bool) -> bool:
    """Whether the tiles of neighbouring rows alternate on GPUs of compute capability `sm`: always for experts (3-D
    weights), and for other matrices on every GPU except SM 90."""
    return experts or sm != 90


def pack(codes: ByteArray, bits: int, *, interleave: bool) -> ByteArray:
    """Pack unsigned codes [n, K] (q + 2^(bits-1)) into bytes [n, K * bits / 8]. K is a multiple of TILE, and with
    `interleave` n is a multiple of INTERLEAVED_ROWS.

    With `interleave` the bytes of a group of rows are mixed: the flat order of the result is right, and a row of the
    result is not the row of the matrix.
    """
    rows, features = codes.shape
    blocks = _blocks(codes, bits)  # [n * blocks of a row] of 16 bytes
    if not interleave:
        return blocks.view(np.uint8).reshape(rows, -1)
    group = INTERLEAVED_ROWS[bits]
    tiled = blocks.reshape(rows // group, group, features // TILE, -1)
    return np.ascontiguousarray(tiled.transpose(0, 2, 1, 3)).view(np.uint8).reshape(rows, -1)


def unpack(packed: ByteArray, bits: int, *, interleave: bool) -> ByteArray:
    """Unpack bytes [n, K * bits / 8] to unsigned codes [n, K]; the inverse of `pack`, with the same conditions on n and
    K."""
    rows = len(packed)
    blocks = np.ascontiguousarray(packed).view(np.complex128)  # of 16 bytes
    if interleave:
        group = INTERLEAVED_ROWS[bits]
        tiled = blocks.reshape(rows // group, -1, group, TILE * bits // 128)
        blocks = np.ascontiguousarray(tiled.transpose(0, 2, 1, 3))
    turns = blocks.reshape(-1, 1).view(np.uint8).reshape(-1, 8, 2)  # the bytes of two groups of eight alternate
    if bits == 8:
        return np.ascontiguousarray(turns.swapaxes(1, 2)).reshape(rows, -1)
    codes = np.empty((len(turns), 2, 2, 8), dtype=np.uint8)  # block, byte of a pair, nibble, k mod 8
    pairs = turns.swapaxes(1, 2)
    np.bitwise_and(pairs, np.uint8(15), out=codes[:, :, 0])
    np.right_shift(pairs, np.uint8(4), out=codes[:, :, 1])
    return codes.reshape(rows, -1)


def pack_pairs(codes: ByteArray) -> ByteArray:
    """Pack unsigned 4-bit codes [n, K] into bytes [n / 2, K] of two signed codes, as AWQ checkpoints store them: the
    even row in the low four bits."""
    signed = codes ^ np.uint8(8)  # q + 8 as the two's complement of q
    pairs: ByteArray = signed[0::2] | signed[1::2] << np.uint8(4)
    return pairs


def unpack_pairs(pairs: ByteArray) -> ByteArray:
    """Unpack bytes [n / 2, K] to unsigned 4-bit codes [n, K]; the inverse of `pack_pairs`."""
    codes = np.empty((2 * len(pairs), pairs.shape[1]), dtype=np.uint8)
    codes[0::2], codes[1::2] = pairs & np.uint8(15), pairs >> np.uint8(4)
    codes ^= np.uint8(8)
    return codes


def _blocks(codes: ByteArray, bits: int) -> np.ndarray[tuple[int], np.dtype[np.complex128]]:
    """The codes as blocks of 16 bytes, in which the bytes of two neighbouring groups of eight codes alternate."""
    eights = np.ascontiguousarray(codes).view(np.uint64)  # groups of eight codes, the first code in the lowest byte
    if bits == 4:
        quarters = eights.reshape(-1, 4)  # the groups of 32 codes
        low = quarters[:, 0] | quarters[:, 1] << np.uint64(4)
        high = quarters[:, 2] | quarters[:, 3] << np.uint64(4)
    else:
        low, high = np.ascontiguousarray(eights[..., 0::2].reshape(-1)), np.ascontiguousarray(eights[..., 1::2])
    turns = low.view(np.uint8).astype("<u2")
    turns |= high.reshape(-1).view(np.uint8).astype("<u2") << np.uint16(8)
    return turns.view(np.complex128)
