"""What float16 does to scales that are too small for it."""

from __future__ import annotations

import numpy as np

from export.quantize.grid import SLICE_VALUES, FloatArray, quantize_blocks

SMALLEST_NORMAL = 2.0**-14  # of float16; below it a number has fewer than 11 bits, and below 2^-25 it is 0


class SmallScales:
    """Counts a matrix's blocks whose scale float16 cannot hold to 11 bits, and measures the worst of them.

    `blocks` of `num_blocks` are such ones; blocks of zeros, whose scale is 0 in any type, are not. `worst_error` is the
    largest |float16(s) - s| / |s| over the scales s that a float32 would have had there: 1 where a block vanishes.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self.num_blocks = 0
        self.worst_error = 0.0

    def add(self, values: FloatArray, scales: FloatArray, bits: int, block_size: int) -> None:
        """Take in values [..., K] and their scales [..., K / block_size], which float16 holds as they are."""
        self.num_blocks += scales.size
        places = np.flatnonzero(np.abs(scales) < SMALLEST_NORMAL)
        blocks = np.ascontiguousarray(values).reshape(-1, block_size)
        step = max(1, SLICE_VALUES // block_size)  # so that a matrix of such blocks takes no more memory than others
        for start in range(0, len(places), step):
            few = blocks[places[start : start + step]]
            few = few[few.any(axis=1)]
            if len(few):
                self._measure(quantize_blocks(few, bits, block_size)[1])

    def _measure(self, exact: FloatArray) -> None:
        """Take in float32 scales."""
        wide = exact.astype(np.float64)
        errors = np.abs(exact.astype(np.float16).astype(np.float64) - wide)
        relative = np.divide(errors, np.abs(wide), out=np.ones_like(wide), where=wide != 0)
        self.blocks += exact.size
        self.worst_error = max(self.worst_error, float(relative.max()))

    def warning(self, name: str) -> str | None:
        """What whoever builds should know of the matrix of that name; None where nothing is to be said."""
        if not self.blocks:
            return None
        return (
            f"quantising {name}: {self.blocks} of {self.num_blocks} blocks have scales below float16's smallest normal "
            f"number {SMALLEST_NORMAL:.1e}, where it rounds a scale by up to {self.worst_error:.1%}; if `moeship "
            "verify` finds the engine too far off, build it with --kernels onnxruntime, whose scales are float32"
        )
