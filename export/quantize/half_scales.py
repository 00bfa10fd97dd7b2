"""Counts the quantised blocks whose scales are too small for float16, and measures the error of those scales."""

from __future__ import annotations

import numpy as np

from export.quantize.grid import SLICE_VALUES, FloatArray, quantize_blocks

SMALLEST_NORMAL = 2.0**-14  # smallest normal float16; below it a number has fewer than 11 bits, below 2^-25 it is 0


class SmallScales:
    """Counts the blocks of a matrix whose scale float16 holds with fewer than 11 bits, and measures the worst error.

    `blocks` is the number of such blocks among `num_blocks`. Blocks of zeros are not counted, since their scale is 0 in
    any type. `worst_error` is the largest |float16(s) - s| / |s| over the float32 scales s of the counted blocks; it is
    1 if a scale becomes 0 and its block with it.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self.num_blocks = 0
        self.worst_error = 0.0

    def add(self, values: FloatArray, scales: FloatArray, bits: int, block_size: int) -> None:
        """Count the small scales of values [..., K]; `scales` [..., K / block_size] are already rounded to float16."""
        self.num_blocks += scales.size
        places = np.flatnonzero(np.abs(scales) < SMALLEST_NORMAL)
        blocks = np.ascontiguousarray(values).reshape(-1, block_size)
        step = max(1, SLICE_VALUES // block_size)  # bounds memory if all blocks of a matrix have small scales
        for start in range(0, len(places), step):
            few = blocks[places[start : start + step]]
            few = few[few.any(axis=1)]
            if len(few):
                self._measure(quantize_blocks(few, bits, block_size)[1])

    def _measure(self, exact: FloatArray) -> None:
        """Count the float32 scales `exact` and update the worst error."""
        wide = exact.astype(np.float64)
        errors = np.abs(exact.astype(np.float16).astype(np.float64) - wide)
        relative = np.divide(errors, np.abs(wide), out=np.ones_like(wide), where=wide != 0)
        self.blocks += exact.size
        self.worst_error = max(self.worst_error, float(relative.max()))

    def warning(self, name: str) -> str | None:
        """The warning about the matrix `name` for the user who builds; None if no block was counted."""
        if not self.blocks:
            return None
        return (
            f"quantising {name}: {self.blocks} of {self.num_blocks} blocks have scales below float16's smallest normal "
            f"number {SMALLEST_NORMAL:.1e}, where it rounds a scale by up to {self.worst_error:.1%}; if `moeship "
            "verify` finds the engine too far off, build it with --kernels onnxruntime, whose scales are float32"
        )
