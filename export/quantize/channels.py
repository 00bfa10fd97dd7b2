"""One scale an output channel, as TensorRT-LLM's weight-only products have it: float32 rows in, unsigned codes out.

b bits: value = (code - 2^(b-1)) * scale. The scale is the row's largest magnitude over 2^(b-1); a value is rounded to
the nearest code, halves away from zero, and the one that would need a code too many takes the last.
Source: symmetric_quantize in cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp, whose codes and scales
these are, so that a packed checkpoint holds what the library itself would make of the floats.
"""

from __future__ import annotations

import numpy as np

from export.quantize.grid import SLICE_VALUES, ByteArray, FloatArray

# Adding 0.5 here would round up values just below a half. Adding the largest float32 below 0.5 rounds exact halves up
# and everything below them down.
_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))


def quantize_channels(rows: FloatArray, bits: int) -> tuple[ByteArray, FloatArray]:
    """Rows [n, K] to codes uint8 [n, K] and scales [n]; a row of zeros has scale 0."""
    half = 1 << (bits - 1)
    codes, scales = np.empty(rows.shape, dtype=np.uint8), np.empty(len(rows), dtype=np.float32)
    step = max(1, SLICE_VALUES // max(1, rows.shape[1]))
    ratios = np.empty((min(step, len(rows)), rows.shape[1]), dtype=np.float32)
    halves = np.empty_like(ratios)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        found, away = ratios[: len(part)], halves[: len(part)]
        scales[start : start + step] = np.maximum(part.max(axis=1), -part.min(axis=1)) / np.float32(half)
        units = scales[start : start + step, None]
        np.divide(part, np.where(units == 0, np.float32(1), units), out=found)
        found += np.copysign(_BELOW_HALF, found, out=away)  # truncation then rounds halves away from zero
        # Under a scale below the normal floats codes may be out of range on either side.
        np.clip(found, np.float32(-half), np.float32(half - 0.5), out=found)
        np.copyto(codes[start : start + step].view(np.int8), found, casting="unsafe")
    codes += np.uint8(half)  # q + half, modulo 256
    return codes, scales
