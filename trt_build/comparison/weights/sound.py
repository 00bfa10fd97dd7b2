"""What a sound engine makes of the values of one row of the table, and the limits that hold for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trt_build.comparison.limits import Limits, half_scale_error, kept_limits, limits_of
from trt_build.comparison.read_back import FloatArray, ReadBack, Recipe


@dataclass(frozen=True)
class Quantiser:
    """What a sound engine makes of the values of one row of the table."""

    stored: ReadBack
    name: str
    keeps_codes: bool  # of the checkpoint, whose values it then has

    @property
    def is_known(self) -> bool:
        """Whether it is known what the engine's search for scales gives."""
        return self.keeps_codes or not self.stored.searched_otherwise(self.name)

    def requantized(self, values: FloatArray) -> FloatArray:
        return values if self.keeps_codes else self.stored.requantized(self.name, values)

    def scales(self, blocks: FloatArray) -> FloatArray:
        """The scales [n] of blocks [n, B]."""
        return self.stored.sound_scales(self.name, blocks)[:, 0]

    def steps(self, values: FloatArray, scales: FloatArray | None) -> FloatArray:
        """About how far neighbouring codes are apart in each block of values, with the sign of the scales, if they are
        known."""
        steps = self.stored.steps(self.name, values)
        return steps if scales is None else np.copysign(steps, scales)


def recipe_limits(recipe: Recipe | None) -> Limits | None:
    """The limits of codes of a recipe; None for values that are not quantised, and for a recipe without limits."""
    return None if recipe is None else limits_of(recipe.bits, recipe.block, recipe.scale_type)


def limits_of_row(stored: ReadBack, name: str, *, keeps: bool) -> Limits | None:
    """The limits of a row of the table; `keeps`: whether it should have the checkpoint's own codes."""
    recipe = stored.recipe(name)
    limits = recipe_limits(recipe)
    if recipe is None or limits is None or not keeps:
        return limits
    return kept_limits(limits, recipe.scale_type, rounds_zeros=stored.rounds_zeros(name))


def row_half_error(stored: ReadBack, name: str) -> float:
    """`half_scale_error` of one value of a row of the table; 0 where its scales are not float16."""
    recipe = stored.recipe(name)
    if recipe is None or recipe.scale_type != "float16":
        return 0.0
    return half_scale_error(recipe.bits, 1) / stored.row_factor(name)
