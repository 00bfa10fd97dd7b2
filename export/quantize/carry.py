"""Carries codes of a checkpoint's own grid over into blocks, and measures what quantising anew loses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from export.checkpoint.tensor_table import OnGrid
from export.quantize.grid import ByteArray, FloatArray, dequantize_blocks


@dataclass
class Loss:
    """Sums over what is stored of a packed matrix: of squared errors against the checkpoint's values, and of their
    squares."""

    error: float = 0.0
    size: float = 0.0

    def add(self, values: FloatArray, codes: ByteArray, scales: FloatArray, bits: int) -> None:
        """Add values [n, K] that are stored as codes [n, K] with scales [n, K / block], without zero points."""
        with np.errstate(over="ignore", invalid="ignore"):  # the writer refuses infinite scales
            self._add(values, dequantize_blocks(codes, scales, bits) - values)

    def add_rounded(self, values: FloatArray, exact: FloatArray, rounded: FloatArray) -> None:
        """Add values [n, K] that keep their codes, and whose scales [n, blocks] are rounded."""
        if (exact == rounded).all():
            self._add(values, np.float32(0))
            return
        factors = rounded / exact - np.float32(1)
        self._add(values, (values.reshape(*exact.shape, -1) * factors[..., None]).reshape(values.shape))

    def _add(self, values: FloatArray, error: FloatArray | np.float32) -> None:
        flat, wrong = values.reshape(-1), np.asarray(error).reshape(-1)
        self.size += float(np.dot(flat, flat))
        self.error += float(np.dot(wrong, wrong))


def carried_blocks(
    chunk: OnGrid, bits: int, block_size: int, *, has_zeros: bool
) -> tuple[ByteArray, FloatArray, ByteArray]:
    """Codes uint8 [n, K], scales float32 [n, K / block_size] and zero points uint8 of that shape, with exactly the
    values of the chunk. Without `has_zeros` every zero point is 2^(bits-1). The block size divides the group size.

    A value is a whole number of scales, so dividing and rounding gives back its code less its zero point.
    """
    rows, features = chunk.values.shape
    per_group = features // block_size // chunk.scales.shape[1]
    scales = np.repeat(chunk.scales, per_group, axis=1)
    half = np.full_like(chunk.zero_points, 1 << (bits - 1))
    zeros = np.repeat(chunk.zero_points if has_zeros else half, per_group, axis=1)
    steps = chunk.values.reshape(rows, -1, block_size) / scales[..., None]
    np.rint(steps, out=steps)
    steps += zeros[..., None].astype(np.float32)
    return steps.astype(np.uint8).reshape(rows, features), scales, zeros
