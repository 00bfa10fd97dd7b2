"""One scale an output channel, as TensorRT-LLM's weight-only products have it: float32 rows in, unsigned codes out.

b bits: value = (code - 2^(b-1)) * scale. The scale is the row's largest magnitude over 2^(b-1); a value is rounded to
the nearest code, halves away from zero, and the one that would need a code too many takes the last.
Source: symmetric_quantize in cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp, whose codes and scales
these are, so that a packed checkpoint holds what the library itself would make of the floats.
"""

from __future__ import annotations

import numpy as np

from export.quantize.grid import ByteArray, FloatArray


def quantize_channels(rows: FloatArray, bits: int) -> tuple[ByteArray, FloatArray]:
    """Rows [n, K] to codes uint8 [n, K] and scales [n]; a row of zeros has scale 0."""
    half = 1 << (bits - 1)
    scales = np.maximum(rows.max(axis=1), -rows.min(axis=1)) / np.float32(half)
    codes = rows / np.where(scales == 0, np.float32(1), scales)[:, None]
    codes += np.copysign(np.float32(0.5), codes)  # truncation then rounds halves away from zero
    np.minimum(codes, np.float32(half - 0.5), out=codes)
    unsigned = codes.astype(np.int8).view(np.uint8)
    unsigned += np.uint8(half)  # q + half, modulo 256
    return unsigned, scales
