"""Quantises float32 rows with one scale an output channel, for TensorRT-LLM's weight-only matrix products.

b bits: value = (code - 2^(b-1)) * scale. The scale is the row's largest magnitude divided by 2^(b-1). A value is
rounded to the nearest code, halves away from zero. A value that would need the code 2^b gets the largest code,
2^b - 1.
Source: symmetric_quantize in cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp. Codes and scales are
equal to those of that function, so that a checkpoint packed here is the one that the library itself would write.
"""

from __future__ import annotations

import numpy as np

from export.quantize.grid import SLICE_VALUES, ByteArray, FloatArray

# Adding 0.5 here would round up values just below a half. Adding the largest float32 below 0.5 rounds exact halves up
# and everything below them down.
_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))


def quantize_channels(rows: FloatArray, bits: int) -> tuple[ByteArray, FloatArray]:
    """Quantise rows [n, K] to codes uint8 [n, K] and scales float32 [n]; a row of zeros has scale 0."""
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
        # A subnormal scale is so inexact that a code may be out of range on either side.
        np.clip(found, np.float32(-half), np.float32(half - 0.5), out=found)
        np.copyto(codes[start : start + step].view(np.int8), found, casting="unsafe")
    codes += np.uint8(half)  # q + half, modulo 256
    return codes, scales
