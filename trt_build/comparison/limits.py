"""The limits of the questions about an engine's weights and its graph, each with its reason.

Of stored values q and the checkpoint's values w, e = q - w:

factor   <w, w> / <q, w>, the number by which q must be multiplied to be as large as w along it. The scale of a block
         makes it 1 for codes near its own (export/quantize/grid.py); `bias` is what is left for normal weights. For
         weights from uniform to heavy-tailed it lies between 0.017 and 0.18 at 2 bits, 0.004 and 0.033 at 3, 0.001 and
         0.016 at 4 and within 0.003 above, so a band that is further off than the limit is judged by what the recipe
         gives for its own weights (`bands.py`), from which a sound engine has no distance.
offset   the mean of e in steps between two codes of a block, with the sign of its scale: a zero point or rounding that
         is off by a part of a step; judged alike. Measured: within 0.082 at 2 bits, 0.047 at 3 (uniform), 0.014 above;
         for normal weights 0.02 at 2 bits, 0.005 above; codes that are off by one give 0.9 or more.
excess   by how much |e| / |w| of one output row is more than in a sound engine; judged alike, beginning with `usual`,
         which is that of normal weights. A sound engine has none. Rows that changed places with a row much like them
         give 0.07, a row of zeros 0.9, a row that took the place of another row 1.3.
code     by how much of a step the worst code is past half a step from its weight, on the scale that is stored. 0 where
         each code is the nearest; products and inverses in float32 move it by 1e-4. Where codes were computed before
         the scale was rounded to float16, 2^(b-1) 2^-11 is taken off. A code off by one gives 0.5 on average.
scale    by how much the squared error of a block is more than what the recipe's scale leaves, as a part of it. Only the
         order of summation is left. A scale that is 1 % off gives 0.01 at 4 bits in blocks of 64, 1.8 at 8 bits.
matrix   |e| / |w| of a matrix. Measured: at most 0.15 (4 bits, blocks of 64, Student's t with 3 degrees of freedom) and
         0.017 (8 bits, blocks of 64, one value in 500 fifty times as large); 0.09 and 0.006 for normal weights. Other
         bits and blocks: 1.4 to 1.8 times what that distribution gives.
row      |e| / |w| of one output row. Proved for the scale of the largest value, to which others that leave less are
         preferred; of rows made to be the worst they reach 0.99 of it at 5 to 8 bits and 0.8 at 4. A value is rounded
         to the nearest of 2^b steps, and the block's largest value m is 2^(b-1) steps and exact, so a value is off by
         at most m / 2^b. Over a block of B values that is at most sqrt(B-1) / 2^b / sqrt(1 + (B-1) / 4^b). A row of
         zeros has 1, another row 1.4.

A matrix with one scale a row, as TensorRT-LLM has them, is not compared with w. There the recipe says which value of
the grid each weight becomes, the nearest (`weights.py: nearest_of_rows`), and w is that value. What is left is the
rounding of the scale to its dtype, which is proved: 2^-11 of it for float16, 2^-8 for bfloat16. All four keep it.

The first two are judged for each BAND_VALUES values of neighbouring rows, so that a small part of a large matrix cannot
hide. These are the limits for rounding to the nearest; a quantiser that feeds errors back needs its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

BAND_VALUES = 1 << 16
# Rounding of scales to float16: 2^-11 of a scale above 2^-14, and at most 2^-25 below it.
HALF_ROUNDING, HALF_STEP = 2.0**-11, 2.0**-25
_ROUNDING: Mapping[str, float] = MappingProxyType({"float32": 0.0, "float16": HALF_ROUNDING, "bfloat16": 2.0**-8})
_SUMMATION = 1e-5  # of sums in float32
_NEAREST = 1e-3  # steps
_SAME_ERROR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a quantised weight, as this module's text defines them."""

    factor: float
    bias: float  # factor - 1 of normal weights
    offset: float  # steps
    usual: float  # |e| / |w| of normal weights
    excess: float
    matrix: float
    row: float
    code: float  # steps
    scale: float


# Factor, offset and excess by bits.
_MEASURED: Mapping[int, tuple[float, float, float]] = MappingProxyType(
    {
        2: (0.002, 0.02, 0.03), 3: (0.002, 0.02, 0.03), 4: (0.002, 0.05, 0.03), 5: (0.0015, 0.05, 0.015),
        6: (0.001, 0.05, 0.008), 8: (0.001, 0.05, 0.002),
    }
)  # fmt: skip
# Bias and relative error of normal weights, and the largest relative error of a matrix, by bits and block.
_NORMAL: Mapping[tuple[int, int], tuple[float, float, float]] = MappingProxyType(
    {
        (2, 32): (0.045, 0.35, 0.5), (2, 64): (0.054, 0.377, 0.6), (2, 128): (0.055, 0.401, 0.7),
        (3, 32): (0.0068, 0.166, 0.3), (3, 64): (0.0106, 0.183, 0.37), (3, 128): (0.0121, 0.197, 0.45),
        (4, 32): (0.002, 0.0815, 0.2), (4, 64): (0.0035, 0.0905, 0.25), (4, 128): (0.0051, 0.0976, 0.3),
        (5, 32): (0.0004, 0.0404, 0.1), (5, 64): (0.0007, 0.0456, 0.13), (5, 128): (0.001, 0.05, 0.18),
        (6, 32): (0.0003, 0.0199, 0.06), (6, 64): (0.0003, 0.0227, 0.085), (6, 128): (0.0003, 0.0251, 0.12),
        (8, 32): (0.0, 0.0052, 0.02), (8, 64): (0.0, 0.0059, 0.03), (8, 128): (0.0, 0.0064, 0.035),
    }
)  # fmt: skip


def limits_of(bits: int, block: int, scale_type: str = "float16") -> Limits | None:
    """The limits of a recipe; `block` 0 stands for one scale a row. None if there is no such recipe."""
    if bits in _MEASURED and block == 0:
        rounding = _ROUNDING[scale_type] + _SUMMATION
        return Limits(
            factor=rounding, bias=0.0, offset=_MEASURED[bits][1], usual=0.0, excess=rounding, matrix=rounding,
            row=rounding, code=_NEAREST, scale=rounding,
        )  # fmt: skip
    if (bits, block) not in _NORMAL:
        return None
    factor, offset, excess = _MEASURED[bits]
    bias, usual, matrix = _NORMAL[bits, block]
    row = proved_row_error(bits, block) + max(0.0, _ROUNDING[scale_type] - HALF_ROUNDING)
    return Limits(
        factor=factor, bias=bias, offset=offset, usual=usual, excess=excess, matrix=matrix, row=row,
        code=_NEAREST, scale=_SAME_ERROR,
    )  # fmt: skip


def kept_limits(limits: Limits, scale_type: str, *, rounds_zeros: bool) -> Limits:
    """The limits of a matrix that has the checkpoint's own codes: only the rounding of its scales is left. Zero points
    that are stored as rounded floats (`rounds_zeros`) move values by a part of a step, whatever the values are."""
    if rounds_zeros:
        return replace(limits, bias=0.0, usual=0.0)
    rounding = _ROUNDING[scale_type] + _SUMMATION
    return replace(limits, bias=0.0, usual=0.0, matrix=rounding, row=rounding)


def graph_limit(float_type: str) -> float:
    """The largest difference between a graph and the reference on its codes, relative to the largest logit. float32:
    only the order of summation differs, by 1.1e-6 at most on both trained examples at every precision. float16: values
    are rounded to 11 bits between the operations, by 1.4e-3 at most there, by ONNX Runtime's CPU kernels."""
    return 1e-4 if float_type == "float32" else 5e-3


def proved_row_error(bits: int, block: int) -> float:
    """The largest |e| / |w| of values that are rounded to the nearest code of their block."""
    return math.sqrt(block - 1) / 2**bits / math.sqrt(1 + (block - 1) / 4**bits) + HALF_ROUNDING


def half_scale_error(bits: int, num_values: int) -> float:
    """The most by which |e| of that many values grows where scales are too small for float16."""
    return math.sqrt(num_values) * 2 ** (bits - 1) * HALF_STEP
