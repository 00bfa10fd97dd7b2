"""Figures of neighbouring rows of a quantised matrix, a band: how the stored values q differ from the checkpoint's w.

What a sound quantiser gives is not quite 1 for a factor, and depends on how the weights are distributed. A band whose
figures lie well within the limits of what the recipe gives for normal weights is sound. Any other is quantised again
with the recipe, and judged by its distance from what that gives: a sound engine has none, however few values the band
has and however they are distributed. What is judged are the engine's own codes all the same.

Sums hide a single code or scale that is another one behind the quantiser's own error. But each code is the one nearest
to its weight on the scale that is stored, and with its scale a block is as large as its weights are along them or,
where codes moved when they were rounded again, what the recipe gives (export/quantize/grid.py), so each is looked at
by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trt_build.comparison.limits import HALF_ROUNDING, Limits

FloatArray = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
_SMALLEST_SCALE = 1e-36  # a smaller scale may have no accurate inverse in float32
_SIZES = (0.4, 1.5)  # of scales, relative to those of stretch 1; those of the recipes lie between 0.5 and 1.25
_EXACT = 1e-10  # part of <w, w> that the squared error of exact values may have
_BLOCKS_AGAIN = 4096
_NEAR = 0.5  # part of a limit up to which a distance is taken as it is


@dataclass(frozen=True, kw_only=True)
class Band:
    """Sums over each row of stored values q and the checkpoint's w, with e = q - w, all [rows]."""

    weights: Doubles  # <w, w>
    errors: Doubles  # <e, e>
    products: Doubles  # <e, w>
    steps: Doubles  # <s, s>, where s is the step between two codes of each value's block
    offsets: Doubles  # <e, s>

    def part(self, first: int, last: int) -> Band:
        """Some of the rows."""
        own = slice(first, last)
        return Band(
            weights=self.weights[own], errors=self.errors[own], products=self.products[own], steps=self.steps[own],
            offsets=self.offsets[own],
        )  # fmt: skip

    @property
    def factor(self) -> float:
        """<w, w> / <q, w>, by which q must be multiplied to be as large as w along it; 0 for a q of zeros."""
        total = float(self.weights.sum())
        along = total + float(self.products.sum())  # <q, w> = <w, w> + <e, w>
        return total / along if along else 0.0

    @property
    def offset(self) -> float:
        """The mean of e in steps between two codes, weighted by the squares of the steps."""
        squares = float(self.steps.sum())
        return float(self.offsets.sum()) / squares if squares else 0.0

    @property
    def rows(self) -> Doubles:
        """|e| / |w| of each row; 0 where both are zeros, infinite where w alone is."""
        nothing = np.where(self.errors > 0, np.inf, 0.0)
        relative: Doubles = np.sqrt(np.divide(self.errors, self.weights, out=nothing, where=self.weights > 0))
        return relative


@dataclass(frozen=True, kw_only=True)
class Distances:
    """How far a band's figures are from those of a sound engine."""

    factor: float
    offset: float
    excess: Doubles  # of the relative error of each row over that of a sound engine, [rows]


def measure(found: FloatArray, wanted: FloatArray, steps: FloatArray) -> Band:
    """The sums of a band, from its stored values [rows, K] and the checkpoint's; `steps` [rows, P] has the difference
    of two neighbouring codes of each block, with its sign."""
    error = found - wanted
    size = error.size // steps.size
    # Of each block. Not by a product of matrices, whose library would start threads in each of ours.
    sums = np.einsum("ij->i", error.reshape(-1, size)).reshape(steps.shape)
    return Band(
        weights=_products(wanted, wanted),
        errors=_products(error, error),
        products=_products(error, wanted),
        steps=_products(steps, steps) * size,
        offsets=_products(sums, steps),
    )


def _products(one: FloatArray, other: FloatArray) -> Doubles:
    return np.einsum("ij,ij->i", one, other).astype(np.float64)


def distances(band: Band, limits: Limits, again: Callable[[], Band] | None) -> Distances:
    """The distances of a band from a sound one. `again` gives the band that a sound engine has; it is called where a
    distance from the usual figures is not well within its limit. NaN stays NaN.

    Without `again` the search that chose the scales is not known. Whatever it is, <q, w> of sound values lies between
    <w, w> - <e, e>, which the scale with the least squared error gives, and <w, w>. No row has more error than
    `limits.row`, which is judged elsewhere, so none has an excess.
    """
    if again is None:
        lost = float(band.errors.sum() / band.weights.sum())
        factor = np.maximum(abs(band.factor - 1) - (lost / (1 - lost) if lost < 1 else 0.0), 0.0)
        return Distances(factor=float(factor), offset=abs(band.offset), excess=np.zeros_like(band.weights))
    found = _from(band, 1 + limits.bias, 0.0, np.full_like(band.weights, limits.usual))
    pairs = ((found.factor, limits.factor), (found.offset, limits.offset), (found.excess.max(), limits.excess))
    if all(distance <= _NEAR * limit for distance, limit in pairs):
        return found
    sound = again()
    nearer = _from(band, sound.factor, sound.offset, sound.rows)
    return Distances(
        factor=_least(found.factor, nearer.factor),
        offset=_least(found.offset, nearer.offset),
        excess=np.minimum(found.excess, nearer.excess),
    )


def _from(band: Band, factor: float, offset: float, rows: Doubles) -> Distances:
    with np.errstate(invalid="ignore"):  # infinite less infinite
        excess = np.maximum(band.rows - rows, 0)
    return Distances(factor=abs(band.factor - factor), offset=abs(band.offset - offset), excess=excess)


def _least(one: float, other: float) -> float:
    return float(np.minimum(one, other))


def past_nearest(found: FloatArray, wanted: FloatArray, scales: FloatArray, bits: int) -> FloatArray:
    """By how many steps the code that is furthest from its weight is past a half step, [rows]; 0 or less where each is
    the nearest. `found` and `wanted` [rows, K], `scales` [rows, P]. Weights outside the grid count as its ends."""
    half = 1 << (bits - 1)
    inverse = np.zeros_like(scales)
    np.divide(np.float32(1), scales, out=inverse, where=np.abs(scales) >= _SMALLEST_SCALE)
    blocks = (*scales.shape, -1)
    steps = (wanted.reshape(blocks) * inverse[..., None]).reshape(wanted.shape)
    np.maximum(steps, _row(wanted, -half), out=steps)
    np.minimum(steps, _row(wanted, half - 1), out=steps)
    with np.errstate(invalid="ignore"):  # an infinite scale, which has an inverse of 0
        steps -= (found.reshape(blocks) * inverse[..., None]).reshape(wanted.shape)
    np.abs(steps, out=steps)
    past: FloatArray = steps.max(axis=1) - np.float32(0.5)
    return past


def _row(rows: FloatArray, value: float) -> FloatArray:
    """A number as a row of [n, K]: numpy's largest of two rows takes a third of the time of a row and a number."""
    return np.full(rows.shape[1], value, dtype=np.float32)


def worse_scales(
    found: FloatArray,
    wanted: FloatArray,
    scales: FloatArray,
    units: FloatArray,
    sound_scales: Callable[[FloatArray], FloatArray],
    again: Callable[[FloatArray], FloatArray],
) -> FloatArray:
    """By how much the squared error of the worst block is more than in a sound engine, as a part of it, [rows]; 0 or
    less in a sound engine. `found` and `wanted` [rows, K], `scales` and `units`, the scales of stretch 1, [rows, P],
    of either sign.

    A block counts as 0 that is as large as its weights along them, but for the rounding of its scale to float16, and
    whose scale is of the size that the recipe's have; and so does a block that has the very scale that `sound_scales`
    gives for its weights [n, K / P], as all others of a sound engine have on the machine that built it. Whether codes
    are the nearest on their scale is `past_nearest`'s to say. What is left is judged by its squared error: by that of
    the values [n, K / P] that `again` gives, which a sound engine has.
    """
    shape = (-1, wanted.shape[1] // units.shape[1])
    own, blocks, own_scales = found.reshape(shape), wanted.reshape(shape), scales.reshape(-1)
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        off = np.einsum("ij,ij->i", own, blocks) / np.einsum("ij,ij->i", blocks, blocks) - 1
        size = np.abs(scales / units).reshape(-1)
    places = np.flatnonzero(~((np.abs(off) <= 1.5 * HALF_ROUNDING) & (size >= _SIZES[0]) & (size <= _SIZES[1])))
    more = np.zeros(len(blocks))
    for start in range(0, len(places), _BLOCKS_AGAIN):
        few = places[start : start + _BLOCKS_AGAIN]
        few = few[sound_scales(blocks[few]) != own_scales[few]]
        if not len(few):
            continue
        sound = _errors(again(blocks[few]), blocks[few]) + _EXACT * _errors(blocks[few], np.float32(0))
        with np.errstate(invalid="ignore", divide="ignore"):
            more[few] = np.where(sound > 0, _errors(own[few], blocks[few]) / sound - 1, 0)
    worst: FloatArray = more.reshape(units.shape).max(axis=1)
    return worst


def _errors(one: FloatArray, other: FloatArray | np.float32) -> Doubles:
    """The squared differences of blocks [n, B], summed, [n]."""
    differences = (one - other).astype(np.float64)
    return np.einsum("ij,ij->i", differences, differences)
