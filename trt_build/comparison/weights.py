"""First question: are these the checkpoint's weights? No text is needed.

Each matrix, of each expert by itself, is compared with the checkpoint's, in its place. Quantised values keep the limits
of `limits.py`; others are equal, after rounding to the engine's float type. A backend adds what is wrong with the
facts beside the weights, such as attributes of nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from export.checkpoint.digests import num_cores
from export.checkpoint.tensor_table import CHUNK_ELEMENTS, Role, TensorSpec
from export.families import Model
from export.floats import widen
from export.quantize.grid import SLICE_VALUES
from export.quantize.layout import GROUP_ROWS
from trt_build.comparison.answers import Answer, listed
from trt_build.comparison.limits import BAND_VALUES, Limits, half_scale_error, limits_of
from trt_build.comparison.read_back import FloatArray, ReadBack, Recipe

QUESTION = "Are these the checkpoint's weights?"
# Adding 0.5 before truncation would round up values just below a half, since the sum is rounded. The largest float32
# below 0.5 takes exact halves up and everything below them down.
_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """Rows of one group of a table row, compared by one thread."""

    spec: TensorSpec
    group: int
    copy: int  # an index of `ReadBack.copies`
    first: int
    last: int


@dataclass
class _Sums:
    """Sums over one part of a group: of w^2 and e^2, over `count` values, and what is wrong."""

    weights: float = 0.0
    errors: float = 0.0
    count: int = 0
    factor: float = 0.0  # the largest |factor - 1| of a band
    shift: float = 0.0
    row: float = 0.0  # the largest |e| / |w| of a row
    rows: list[tuple[int, float]] = field(default_factory=list)  # rows past the limit, and their |e| / |w|
    bands: list[str] = field(default_factory=list)
    different: list[tuple[int, float, float]] = field(default_factory=list)  # row, found, expected

    def add(self, other: _Sums) -> None:
        for name in ("weights", "errors", "count"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("factor", "shift", "row"):
            setattr(self, name, float(np.maximum(getattr(self, name), getattr(other, name))))  # keeps NaN
        self.rows += other.rows
        self.bands += other.bands
        self.different += other.different


def compare_weights(stored: ReadBack, model: Model, failures: Sequence[str], progress: Callable[[str], None]) -> Answer:
    """Compare the weights of an engine with the model that it was built from; `failures` of the facts beside them come
    first. Raises CheckpointError for weights that cannot be read or are not finite."""
    found, worst = list(failures), _Worst()
    comparable = []
    for spec in stored.table.values():
        problem = stored.misfit(spec.name) or _recipe_problem(stored, spec)
        if problem:
            found.append(f"{_where(model, spec, None, 0)}: {problem}")
        else:
            comparable.append(spec)
    units = [unit for spec in comparable for unit in _units(stored, spec)]
    sums: dict[tuple[str, int, int, int], _Sums] = {}
    with ThreadPoolExecutor(max_workers=num_cores()) as pool:
        done = 0
        for unit, compared in zip(units, pool.map(lambda unit: _compare(stored, unit), units), strict=True):
            done += sum(part.count for part in compared)
            progress(f"compared {done:,} weights with the checkpoint's")
            for turn, part in enumerate(compared):
                sums.setdefault((unit.spec.name, unit.group, unit.copy, turn), _Sums()).add(part)
    for (name, group, copy, turn), part in sums.items():
        spec = stored.table[name]
        where = _where(model, spec, group, turn) + stored.copies(name)[copy]
        found += [f"{where}{problem}" for problem in _problems(stored, spec, part)]
        worst.add(stored, spec, part)
    figures = {"num_weights": sum(part.count for part in sums.values()), "num_matrices": len(sums), **worst.figures()}
    return Answer(question=QUESTION, figures=figures, failures=listed(found))


class _Worst:
    """The largest figures of each recipe, such as "int4 in blocks of 64"."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, float]] = {}

    def add(self, stored: ReadBack, spec: TensorSpec, part: _Sums) -> None:
        recipe = stored.recipe(spec.name)
        if recipe is None:
            return
        figures = self._found.setdefault(str(recipe), {})
        error = math.sqrt(part.errors / part.weights) if part.weights else 0.0
        values = (("factor", part.factor), ("shift", part.shift), ("matrix", error), ("row", part.row))
        for name, value in values:
            figures[name] = float(np.maximum(figures.get(name, 0.0), value))

    def figures(self) -> dict[str, dict[str, dict[str, float]]]:
        return {"largest": self._found}


def _recipe_problem(stored: ReadBack, spec: TensorSpec) -> str | None:
    """What is wrong with the recipe of a row's codes; None if nothing is."""
    recipe = stored.recipe(spec.name)
    return None if recipe is None or _limits(recipe) else f"there are no limits for {recipe}"


def _limits(recipe: Recipe | None) -> Limits | None:
    return None if recipe is None else limits_of(recipe.bits, recipe.block, recipe.scale_type)


def _units(stored: ReadBack, spec: TensorSpec) -> Iterator[_Unit]:
    places = [(group, copy) for group in stored.stored_groups(spec) for copy in range(len(stored.copies(spec.name)))]
    for group, copy in places:
        parts = spec.groups[group]
        num_rows, *others = parts[0].shape
        step = max(1, CHUNK_ELEMENTS // max(1, len(parts) * math.prod(others)))
        step = max(GROUP_ROWS, step - step % GROUP_ROWS)
        for row in range(0, num_rows, step):
            yield _Unit(spec=spec, group=group, copy=copy, first=row, last=min(row + step, num_rows))


def _compare(stored: ReadBack, unit: _Unit) -> list[_Sums]:
    """The sums of each part of a unit."""
    parts = unit.spec.groups[unit.group]
    rows = slice(unit.first, unit.last)
    expected = [part.read_stored(stored.checkpoint, rows) for part in parts]
    result = [_Sums() for _ in parts]
    recipe = stored.recipe(unit.spec.name)
    limits = _limits(recipe)
    # A last band that is short would be judged by few values, so it joins the one before.
    step = max(GROUP_ROWS, BAND_VALUES // max(1, math.prod(parts[0].shape[1:])) // GROUP_ROWS * GROUP_ROWS)
    starts = list(range(unit.first, unit.last, step))
    if len(starts) > 1 and unit.last - starts[-1] < step:
        starts.pop()
    for first, last in zip(starts, [*starts[1:], unit.last], strict=True):
        found = stored.part_rows(unit.spec.name, unit.group, first, last, unit.copy)
        for sums, values, wanted in zip(result, found, expected, strict=True):
            own = wanted[first - unit.first : last - unit.first]
            if recipe is None or limits is None:
                _add_exact(sums, values, stored.rounded(unit.spec.name, unit.group, first, own), first)
            else:
                halved = half_scale_error(recipe.bits, 1) if recipe.scale_type == "float16" else 0.0
                wanted_values = widen(own) if recipe.block else nearest_of_rows(widen(own), recipe.bits)
                _add_band(sums, values, wanted_values, first, limits, halved)
    return result


def _add_exact(sums: _Sums, found: FloatArray, expected: FloatArray, first: int) -> None:
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


def _add_band(sums: _Sums, found: FloatArray, wanted: FloatArray, first: int, limits: Limits, halved: float) -> None:
    """Add neighbouring rows [n, K] of a quantised matrix; `halved` is `half_scale_error` of one value."""
    error = found - wanted
    squares = np.einsum("ij,ij->i", wanted, wanted).astype(np.float64)
    errors = np.einsum("ij,ij->i", error, error).astype(np.float64)
    products = float(np.einsum("ij,ij->i", error, wanted).sum(dtype=np.float64))
    offset = float(np.add.reduce(error, axis=1).sum(dtype=np.float64))
    sums.weights += float(squares.sum())
    sums.errors += float(errors.sum())
    sums.count += error.size
    slack = halved * math.sqrt(error.shape[1])
    past = ~(np.sqrt(errors) <= limits.row * np.sqrt(squares) + slack)
    relative = np.sqrt(np.divide(errors, squares, out=np.where(errors > 0, np.inf, 0.0), where=squares > 0))
    sums.row = float(np.maximum(sums.row, relative.max()))
    sums.rows += [(first + row, float(relative[row])) for row in np.flatnonzero(past).tolist()]
    total = float(squares.sum())
    if not total:
        return
    # <q, q> = <w, w> + 2 <e, w> + <e, e>, and <q, w> = <w, w> + <e, w>
    own = total + 2 * products + float(errors.sum())
    factor = (total + products) / own if own else math.inf
    shift = abs(offset) / math.sqrt(error.size * total)
    # A band of few values, as small models have, scatters by |e| / |w| / sqrt(n); six times that is once in 1e9.
    scatter = 6 * min(math.sqrt(float(errors.sum()) / total), limits.matrix) / math.sqrt(error.size)
    more = halved * math.sqrt(error.size / total) + scatter
    sums.factor, sums.shift = max(sums.factor, abs(factor - 1)), max(sums.shift, shift)
    rows = f"rows {first} to {first + len(error) - 1}"
    if not abs(factor - 1) <= limits.factor + more:
        sums.bands.append(f", {rows}: found them {1 / factor if factor else math.inf:.4f} times the checkpoint's, "
                          f"expected 1 within {limits.factor}")  # fmt: skip
    if not shift <= limits.shift + more:
        sums.bands.append(f", {rows}: found them shifted by {shift:.2g} of their size, allowed {limits.shift}")


def _problems(stored: ReadBack, spec: TensorSpec, part: _Sums) -> Iterator[str]:
    """What is wrong with one part of a group, to be read after its name."""
    if part.different:
        _, found, expected = part.different[0]
        yield f", {_rows([row for row, *_ in part.different])}: found {found:.8g}, expected {expected:.8g}, exactly"
    recipe = stored.recipe(spec.name)
    limits = _limits(recipe)
    if recipe is None or limits is None:
        return
    if part.rows:
        yield (
            f", {_rows([row for row, _ in part.rows])}: found relative error "
            f"{max(error for _, error in part.rows):.3g}, allowed {limits.row:.3g}"
        )
    yield from part.bands[:2]
    error = math.sqrt(part.errors / part.weights) if part.weights else 0.0
    slack = half_scale_error(recipe.bits, part.count) if recipe.scale_type == "float16" else 0.0
    if not math.sqrt(part.errors) <= limits.matrix * math.sqrt(part.weights) + slack:
        yield f": found relative error {error:.3g}, allowed {limits.matrix}"


def _rows(rows: Sequence[int]) -> str:
    if len(rows) == 1:
        return f"row {rows[0]}"
    return f"rows {', '.join(map(str, rows[:4]))}{f' and {len(rows) - 4} more' if len(rows) > 4 else ''}"


def _where(model: Model, spec: TensorSpec, group: int | None, turn: int) -> str:
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
