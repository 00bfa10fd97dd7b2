"""What is wrong with the weights of an engine, said in words: which matrix, what was found, what is allowed, and whose
weights they are instead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from export.checkpoint.tensor_table import Role, TensorSpec
from export.families import Model
from export.floats import widen
from trt_build.comparison.limits import BAND_VALUES, Limits
from trt_build.comparison.read_back import ReadBack
from trt_build.comparison.weights.sound import limits_of_row, recipe_limits, row_half_error
from trt_build.comparison.weights.sums import Sums

Place = tuple[TensorSpec, int, int]  # a row of the table, a group of it, and a part of the group


def described(model: Model, spec: TensorSpec, group: int | None, turn: int) -> str:
    """Layer, role and expert of a matrix, and its names here and in the checkpoint."""
    prefixes = {f"{model.family.layer(layer)}.": layer for layer in range(model.architecture.num_layers)}
    layer = next((number for prefix, number in prefixes.items() if spec.name.startswith(prefix)), None)
    words = [f"layer {layer}"] if layer is not None else []
    words.append(str(Role(spec.role)))
    if group is None:
        return f"{', '.join(words)} {spec.name}"
    part = spec.groups[group][turn]
    if spec.stacks_experts:
        words.append(f"expert {group}")
    return f"{', '.join(words)} {part.name}"


def recipe_problem(stored: ReadBack, spec: TensorSpec) -> str | None:
    """What is wrong with the recipe of a row's codes; None if nothing is."""
    recipe = stored.recipe(spec.name)
    return None if recipe is None or recipe_limits(recipe) else f"there are no limits for {recipe}"


def problems_of(stored: ReadBack, spec: TensorSpec, part: Sums, *, keeps: bool, checksum: str | None) -> Iterator[str]:
    """What is wrong with one part of a group, to be read after its name. `checksum` is that of solved codes."""
    if part.different:
        _, found, expected = part.different[0]
        yield f", {_rows([row for row, *_ in part.different])}: found {found:.8g}, expected {expected:.8g}, exactly"
    recipe = stored.recipe(spec.name)
    limits = limits_of_row(stored, spec.name, keeps=keeps)
    if part.fed is not None and recipe is not None:
        slack = row_half_error(stored, spec.name) * math.sqrt(part.count)
        yield from part.fed.problems(recipe.bits, checksum, slack)
        return
    if recipe is None or limits is None:
        return
    if part.rows:
        yield (
            f", {_rows([row for row, _ in part.rows])}: found relative error "
            f"{max(error for _, error in part.rows):.3g}, allowed {limits.row:.3g}"
        )
    if part.excesses:
        _, error, excess = max(part.excesses, key=lambda row: row[2])
        yield (
            f", {_rows([row for row, *_ in part.excesses])}: found relative error {error:.3g}, expected "
            f"{error - excess:.3g} within {limits.excess}"
        )
    yield from (problem for _, problem in part.bands[:2])
    if not any((part.rows, part.excesses, part.bands)):
        yield from _single_problems(part, limits)
    slack = row_half_error(stored, spec.name) * math.sqrt(part.count)
    if not math.sqrt(part.errors) <= limits.matrix * math.sqrt(part.weights) + slack:
        yield f": found relative error {part.error:.3g}, allowed {limits.matrix:.3g}"


def _single_problems(part: Sums, limits: Limits) -> Iterator[str]:
    """What is wrong with single codes and scales, which is said where it does not show in sums."""
    if part.scales:
        most = max(off for _, off in part.scales)
        yield (
            f", {_rows([row for row, _ in part.scales])}: found a scale whose block has {most:.3g} times more squared "
            f"error than the recipe's scale gives, allowed {limits.scale:.2g}"
        )
    if part.codes:
        most = max(past for _, past in part.codes)
        yield (
            f", {_rows([row for row, _ in part.codes])}: found a code that is not the nearest to its weight, by "
            f"{most:.3g} steps, allowed {limits.code:.2g}"
        )


def _rows(rows: Sequence[int]) -> str:
    if len(rows) == 1:
        return f"row {rows[0]}"
    return f"rows {', '.join(map(str, rows[:4]))}{f' and {len(rows) - 4} more' if len(rows) > 4 else ''}"


def _nearest(stored: ReadBack, place: Place, row: int) -> tuple[Place, float]:
    """The matrix of the checkpoint that is nearest to a stored one, and |e| / |w| from it, by at most BAND_VALUES
    values from `row` on. Matrices of the same role and shape are compared."""
    spec, group, turn = place
    shape = spec.groups[group][turn].shape
    last = min(shape[0], row + max(1, BAND_VALUES // math.prod(shape[1:])))
    found = stored.part_rows(spec.name, group, row, last)[turn]
    best, least = place, math.inf
    for other in (spec, *stored.table.values()):
        for number, parts in enumerate(other.groups if other.role == spec.role else ()):
            for at, part in enumerate(parts):
                if part.shape != shape:
                    continue
                wanted = widen(part.read_stored(stored.checkpoint, slice(row, last)))
                size = float(np.linalg.norm(wanted))
                error = float(np.linalg.norm(found - wanted)) / size if size else math.inf
                if error < least:
                    best, least = (other, number, at), error
    return best, least


def whose(stored: ReadBack, model: Model, place: Place, row: int) -> str:
    """Words that say whose weights a wrong matrix has; none if it is nearer to its own than to others."""
    nearest, error = _nearest(stored, place, row)
    if nearest == place:
        return ""
    spec, group, turn = nearest
    return f"; from row {row} on they are nearer to {described(model, spec, group, turn)} (relative error {error:.3g})"
