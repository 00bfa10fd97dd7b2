"""Integer codes into the bytes that TensorRT-LLM's mixed matrix products read.

The library permutes rows, transposes to column-major, interleaves columns and reorders what stands in a 32-bit word
(cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp). Seen from a matrix as checkpoints keep it,
[N = out, K = in], all of it is local: 32 codes of 4 bits (16 of 8) that follow each other along K become 16 bytes, in
which the codes of k and k + 8 lie side by side; of 64 k a tile is made, and tiles of four rows (two of 8 bits)
alternate. So a few rows at a time are packed into the bytes that follow each other in the file. The closed form of the
same, for int4:

    word = (n div 4) * K/2 + (k div 64) * 32 + (n mod 4) * 8 + ((k div 32) mod 2) * 4 + (k mod 8) div 2
    nibble = 4 * (k mod 2) + (k mod 32) div 8,  value = q + 8

and for int8

    word = (n div 2) * K/2 + (k div 64) * 32 + (n mod 2) * 16 + ((k mod 64) div 16) * 4 + (k mod 8) div 2
    byte = 2 * (k mod 2) + (k mod 16) div 8,  value = q + 128
"""

from __future__ import annotations

import numpy as np

from export.quantize.grid import ByteArray

TILE = 64  # of K, and what both dimensions of a packed matrix are multiples of
INTERLEAVED_ROWS = {4: 4, 8: 2}  # rows whose tiles alternate, by bits


def interleaves_columns(sm: int, *, experts: bool) -> bool:
    """Whether the tiles of rows alternate on GPUs of compute capability `sm`: for experts (3-D weights) always, for
    other matrices everywhere but on SM 90."""
    return experts or sm != 90


def pack(codes: ByteArray, bits: int, *, interleave: bool) -> ByteArray:
    """Unsigned codes [n, K] (q + 2^(bits-1)) to bytes [n, K * bits / 8]; rows as INTERLEAVED_ROWS, K as TILE asks.

    With `interleave` the bytes of a group of rows are one run: only the flat order of the result means something.
    """
    rows, features = codes.shape
    blocks = _blocks(codes, bits)  # [n * blocks of a row] of 16 bytes
    if not interleave:
        return blocks.view(np.uint8).reshape(rows, -1)
    group = INTERLEAVED_ROWS[bits]
    tiled = blocks.reshape(rows // group, group, features // TILE, -1)
    return np.ascontiguousarray(tiled.transpose(0, 2, 1, 3)).view(np.uint8).reshape(rows, -1)


def pack_pairs(codes: ByteArray) -> ByteArray:
    """Unsigned 4-bit codes [n, K] to signed nibbles [n / 2, K]: the even row in the low one, as in AWQ checkpoints."""
    signed = codes ^ np.uint8(8)  # q + 8 as the two's complement of q
    pairs: ByteArray = signed[0::2] | signed[1::2] << np.uint8(4)
    return pairs


def _blocks(codes: ByteArray, bits: int) -> np.ndarray[tuple[int], np.dtype[np.complex128]]:
    """Blocks of 16 bytes in the order of their codes: of each two groups of eight the bytes in turn."""
    eights = np.ascontiguousarray(codes).view(np.uint64)  # eight codes, the lowest first
    if bits == 4:
        quarters = eights.reshape(-1, 4)  # the groups of 32 codes
        low = quarters[:, 0] | quarters[:, 1] << np.uint64(4)
        high = quarters[:, 2] | quarters[:, 3] << np.uint64(4)
    else:
        low, high = np.ascontiguousarray(eights[..., 0::2].reshape(-1)), np.ascontiguousarray(eights[..., 1::2])
    turns = low.view(np.uint8).astype("<u2")
    turns |= high.reshape(-1).view(np.uint8).astype("<u2") << np.uint16(8)
    return turns.view(np.complex128)
