"""Sums over one part of a group of weights: how far the stored values are from the checkpoint's, and which rows are
past a limit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from export.quantize.grid import SLICE_VALUES
from trt_build.comparison.limits import BAND_VALUES, HALF_ROUNDING, Limits
from trt_build.comparison.read_back import ROW_MULTIPLE, FloatArray, Recipe
from trt_build.comparison.weights.bands import Band, distances, measure, past_nearest, worse_scales
from trt_build.comparison.weights.fed_back import FedBack
from trt_build.comparison.weights.sound import Quantiser

# Adding 0.5 before truncation would round up values just below a half, since the sum is rounded. The largest float32
# below 0.5 takes exact halves up and everything below them down.
_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))
LARGEST = ("factor", "offset", "excess", "row", "code", "scale")  # figures of Sums: the largest counts


@dataclass
class Sums:
    """Sums over one part of a group: of w^2 and e^2, over `count` values, and what is wrong."""

    weights: float = 0.0
    errors: float = 0.0
    count: int = 0
    factor: float = 0.0  # the largest distance of a band from a sound one
    offset: float = 0.0
    excess: float = 0.0  # the largest of a row over a sound one
    row: float = 0.0  # the largest |e| / |w| of a row
    code: float = 0.0
    scale: float = 0.0
    rows: list[tuple[int, float]] = field(default_factory=list)  # rows past the limit, and their |e| / |w|
    excesses: list[tuple[int, float, float]] = field(default_factory=list)  # other wrong rows, |e| / |w| and the excess
    codes: list[tuple[int, float]] = field(default_factory=list)  # rows with a code that is not the nearest
    scales: list[tuple[int, float]] = field(default_factory=list)  # rows with a scale that is not the recipe's
    bands: list[tuple[int, str]] = field(default_factory=list)  # the first row, and what is wrong
    different: list[tuple[int, float, float]] = field(default_factory=list)  # row, found, expected
    fed: FedBack | None = None  # of a matrix whose codes were solved

    def add(self, other: Sums) -> None:
        if other.fed is not None:
            self.fed = self.fed or FedBack()
            self.fed.add(other.fed)
        for name in ("weights", "errors", "count"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in LARGEST:
            self.raise_to(name, getattr(other, name))
        self.rows += other.rows
        self.excesses += other.excesses
        self.codes += other.codes
        self.scales += other.scales
        self.bands += other.bands
        self.different += other.different

    def raise_to(self, name: str, value: float) -> None:
        """Make a figure the larger of itself and a value; NaN is kept."""
        setattr(self, name, float(np.maximum(getattr(self, name), value)))

    @property
    def error(self) -> float:
        """|e| / |w| of the matrix."""
        return math.sqrt(self.errors / self.weights) if self.weights else 0.0

    @property
    def wrong_rows(self) -> list[int]:
        """First rows of bands and rows past a limit."""
        fed = [] if self.fed is None else self.fed.rows
        return sorted({row[0] for found in (self.rows, self.excesses, self.bands, fed) for row in found})


def add_exact(sums: Sums, found: FloatArray, expected: FloatArray, first: int) -> None:
    """Count values that are not the expected ones."""
    sums.count += found.size
    same = found == expected
    if not same.all():
        for row in np.flatnonzero(~same.reshape(len(same), -1).all(axis=1)).tolist():
            place = int(np.flatnonzero(~same[row].reshape(-1))[0])
            pair = float(found[row].reshape(-1)[place]), float(expected[row].reshape(-1)[place])
            sums.different.append((first + row, *pair))


def nearest_of_rows(rows: FloatArray, bits: int) -> FloatArray:
    """The nearest values [n, K] to `rows` of a grid with one scale a row: the row's largest magnitude over 2^(bits-1).
    The codes are the whole numbers from -2^(bits-1) to 2^(bits-1) - 1, of two as near the one farther from zero."""
    half, nearest = 1 << (bits - 1), np.empty_like(rows)
    step = max(1, SLICE_VALUES // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part, codes = rows[start : start + step], nearest[start : start + step]
        scales = np.maximum(part.max(axis=1), -part.min(axis=1))[:, None] / np.float32(half)
        np.divide(part, np.where(scales == 0, np.float32(1), scales), out=codes)
        codes += np.copysign(_BELOW_HALF, codes)
        np.trunc(codes, out=codes)
        np.clip(codes, np.float32(-half), np.float32(half - 1), out=codes)
        codes *= scales
    return nearest


def add_rows(
    sums: Sums, found: FloatArray, wanted: FloatArray, steps: FloatArray, first: int, limits: Limits, halved: float,
    quantiser: Quantiser,
) -> None:  # fmt: skip
    """Add neighbouring rows [n, K] of a quantised matrix; `steps` [n, P] is between the codes of a block, and `halved`
    is `half_scale_error` of one value."""
    rows = measure(found, wanted, steps)
    sums.weights += float(rows.weights.sum())
    sums.errors += float(rows.errors.sum())
    sums.count += found.size
    relative = rows.rows
    past = ~(np.sqrt(rows.errors) <= limits.row * np.sqrt(rows.weights) + halved * math.sqrt(found.shape[1]))
    sums.raise_to("row", relative.max())
    sums.rows += [(first + row, float(relative[row])) for row in np.flatnonzero(past).tolist()]
    for begin, end in _bands(*found.shape):
        band = rows.part(begin, end)
        if not band.weights.any():
            continue
        part = slice(begin, end)
        again = partial(_sound, quantiser, wanted[part], steps[part]) if quantiser.is_known else None
        off = distances(band, limits, again)
        sums.raise_to("factor", off.factor)
        sums.raise_to("offset", off.offset)
        sums.raise_to("excess", off.excess.max())
        wrong = begin + np.flatnonzero(~(off.excess <= limits.excess) & ~past[part])
        sums.excesses += [(first + row, float(relative[row]), float(off.excess[row - begin])) for row in wrong.tolist()]
        where = f", rows {first + begin} to {first + end - 1}"
        if not off.factor <= limits.factor:
            times = f"{1 / band.factor:.4f}" if band.factor else "0"
            problem = f"{where}: found them {times} times the checkpoint's, expected 1 within {limits.factor}"
            sums.bands.append((first + begin, problem))
        if not off.offset <= limits.offset:
            problem = f"{where}: found the codes {band.offset:.3g} steps off on average, allowed {limits.offset}"
            sums.bands.append((first + begin, problem))


def add_codes(
    sums: Sums, found: FloatArray, wanted: FloatArray, scales: FloatArray, steps: FloatArray, first: int,
    limits: Limits, recipe: Recipe, quantiser: Quantiser,
) -> None:  # fmt: skip
    """Look at each code and each scale of neighbouring rows [n, K] of a quantised matrix."""
    codes = past_nearest(found, wanted, scales, recipe.bits)
    if recipe.late:
        codes -= np.float32(2 ** (recipe.bits - 1) * HALF_ROUNDING)
    sums.raise_to("code", codes.max())
    sums.codes += [(first + row, float(codes[row])) for row in np.flatnonzero(~(codes <= limits.code)).tolist()]
    if not quantiser.is_known:
        return
    off = worse_scales(found, wanted, scales, steps, quantiser.scales, quantiser.requantized)
    sums.raise_to("scale", off.max())
    sums.scales += [(first + row, float(off[row])) for row in np.flatnonzero(~(off <= limits.scale)).tolist()]


def _bands(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """First rows and ends of bands of BAND_VALUES values. A last band that is short joins the one before."""
    step = max(ROW_MULTIPLE, BAND_VALUES // width // ROW_MULTIPLE * ROW_MULTIPLE)
    starts = list(range(0, max(rows - step, 0) + 1, step))
    yield from zip(starts, [*starts[1:], rows], strict=True)


def _sound(quantiser: Quantiser, wanted: FloatArray, steps: FloatArray) -> Band:
    """The band of a sound engine."""
    return measure(quantiser.requantized(wanted), wanted, steps)
