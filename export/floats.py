"""Converts float16 to float32 and checks that floats are finite, both at the speed of memory.

numpy converts float16 one value at a time. On the values' bits, read as integers, both tasks take a few vectorised
operations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# Bits of the exponent, read as an integer. All of them are set in an infinite number and in a NaN, and in no other.
_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F80_0000}
_HALF_FRACTION_SHIFT = 13  # a float32 has 13 more bits of fraction than a float16
_HALF_BITS = np.uint32(0x8FFF_E000).view(np.int32)  # sign, low five bits of the exponent, high ten of the fraction
_HALF_BIAS = np.float32(2.0**112)  # difference of the exponents' biases: 127 - 15


def widen(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Convert finite float16, bfloat16 or float32 values to float32; a float32 array is returned as it is."""
    if values.dtype != np.float16:
        return values.astype(np.float32, copy=False)
    bits = np.ascontiguousarray(values).view(np.int16).astype(np.int32)  # the sign fills the upper half
    np.left_shift(bits, _HALF_FRACTION_SHIFT, out=bits)
    np.bitwise_and(bits, _HALF_BITS, out=bits)
    wide: npt.NDArray[np.float32] = bits.view(np.float32)
    np.multiply(wide, _HALF_BIAS, out=wide)  # exact, for subnormal halves too
    return wide


def all_finite(values: npt.NDArray[Any]) -> bool:
    """Whether no float16, bfloat16 or float32 value is infinite or NaN."""
    if not values.size:
        return True
    signed, unsigned = (np.int32, np.uint32) if values.itemsize == 4 else (np.int16, np.uint16)
    exponent = _EXPONENT[values.dtype.name]
    sign = 1 << (8 * values.itemsize - 1)
    # Read as signed integers, positive floats keep their order and are above all negative ones. Read as unsigned
    # integers, negative floats are above all positive ones, ordered by magnitude. So the two maxima suffice.
    bits = np.ascontiguousarray(values)
    return int(bits.view(signed).max()) < exponent and int(bits.view(unsigned).max()) < sign + exponent
