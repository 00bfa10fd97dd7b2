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
from functools import partial

import numpy as np

from export.checkpoint.digests import num_cores
from export.checkpoint.tensor_table import CHUNK_ELEMENTS, Role, TensorSpec
from export.families import Model
from export.floats import widen
from export.quantize.grid import SLICE_VALUES
from trt_build.comparison.answers import Answer, listed
from trt_build.comparison.bands import Band, distances, measure, past_nearest, worse_scales
from trt_build.comparison.fed_back import FedBack, matrix_limit, row_limit
from trt_build.comparison.limits import BAND_VALUES, HALF_ROUNDING, Limits, half_scale_error, kept_limits, limits_of
from trt_build.comparison.read_back import ROW_MULTIPLE, FloatArray, ReadBack, Recipe

QUESTION = "Are these the checkpoint's weights?"
Place = tuple[TensorSpec, int, int]  # a row of the table, a group of it, and a part of the group
# Adding 0.5 before truncation would round up values just below a half, since the sum is rounded. The largest float32
# below 0.5 takes exact halves up and everything below them down.
_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))
OTHER_SEARCH = (
    "the scales of {count} quantised weights were chosen by another version's search: their codes, sizes and errors "
    "are compared with what holds for any search, and no scale by itself; build the engine again for that"
)
READ_VALUES = 1 << 18  # values that are dequantised and compared at a time
_KEPT_BYTES = 24 << 20  # several times the arrays of a thread; below 32 MiB, from which on glibc learns nothing
MOST_SEARCHES = 4  # for so many wrong matrices it is said whose weights they have
_LARGEST = ("factor", "offset", "excess", "row", "code", "scale")  # figures of _Sums: the largest counts


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

    def add(self, other: _Sums) -> None:
        if other.fed is not None:
            self.fed = self.fed or FedBack()
            self.fed.add(other.fed)
        for name in ("weights", "errors", "count"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _LARGEST:
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


@dataclass(frozen=True)
class _Quantiser:
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
    misfits = len(stored.table) - len(comparable)
    units = [unit for spec in comparable for unit in _units(stored, spec)]
    _keep_freed_memory()
    sums: dict[tuple[str, int, int, int], _Sums] = {}
    quantised = [spec for spec in comparable if stored.recipe(spec.name) is not None]
    kept = frozenset(spec.name for spec in comparable if stored.keeps_codes(spec.name))
    with ThreadPoolExecutor(max_workers=num_cores()) as pool:
        done = 0
        for unit, compared in zip(units, pool.map(lambda unit: _compare(stored, unit, kept), units), strict=True):
            done += sum(part.count for part in compared)
            progress(f"compared {done:,} weights with the checkpoint's")
            for turn, part in enumerate(compared):
                sums.setdefault((unit.spec.name, unit.group, unit.copy, turn), _Sums()).add(part)
    searches = MOST_SEARCHES
    for (name, group, copy, turn), part in sums.items():
        spec = stored.table[name]
        where = _where(model, spec, group, turn) + stored.copies(name)[copy]
        checksum = stored.checksums.get(name, {}).get(f"{group}.{turn}")
        problems = list(_problems(stored, spec, part, keeps=name in kept, checksum=checksum))
        if part.wrong_rows and searches:
            searches -= 1
            problems[0] += _whose(stored, model, (spec, group, turn), part.wrong_rows[0])
        found += [f"{where}{problem}" for problem in problems]
        worst.add(stored, spec, part)
    inexact = len(failures) + misfits + sum(bool(part.different) for part in sums.values())
    figures = {
        "num_weights": sum(part.count for part in sums.values()), "num_matrices": len(sums),
        "num_inexact": inexact, **worst.figures(),
    }  # fmt: skip
    otherwise = sum(not _Quantiser(stored, spec.name, spec.name in kept).is_known for spec in quantised)
    if otherwise:
        figures["other_search"] = OTHER_SEARCH.format(count=otherwise)
    return Answer(question=QUESTION, figures=figures, failures=listed(found))


def _keep_freed_memory() -> None:
    """Have the C library keep memory that is freed, for the arrays that are needed next: giving it back and taking it
    again, page by page, costs a third of this question's time.

    glibc keeps as much as twice the largest mapping that was ever freed (mallopt(3), M_MMAP_THRESHOLD: "dynamic mmap
    threshold"). Other libraries have rules of their own, and there this does nothing.
    """
    np.empty(_KEPT_BYTES, dtype=np.uint8)


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


def _whose(stored: ReadBack, model: Model, place: Place, row: int) -> str:
    """Words that say whose weights a wrong matrix has; none if it is nearer to its own than to others."""
    nearest, error = _nearest(stored, place, row)
    if nearest == place:
        return ""
    spec, group, turn = nearest
    return f"; from row {row} on they are nearer to {_where(model, spec, group, turn)} (relative error {error:.3g})"


class _Worst:
    """The largest figures of each recipe, such as "int4 in blocks of 64", and what is allowed."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, float]] = {}
        self._limits: dict[str, dict[str, float]] = {}

    def add(self, stored: ReadBack, spec: TensorSpec, part: _Sums) -> None:
        recipe = stored.recipe(spec.name)
        limits = _limits(recipe)
        if part.fed is not None and recipe is not None:
            own = f"{recipe}, solved"
            figures = self._found.setdefault(own, {})
            self._limits[own] = {"row": row_limit(recipe.bits), "matrix": matrix_limit(recipe.bits)}
            for key, value in (("row", part.fed.row), ("matrix", part.fed.error)):
                figures[key] = float(np.maximum(figures.get(key, 0.0), value))
            return
        if recipe is None or limits is None:
            return
        figures = self._found.setdefault(str(recipe), {})
        self._limits[str(recipe)] = {key: getattr(limits, key) for key in (*_LARGEST, "matrix")}
        for key, value in (*((key, getattr(part, key)) for key in _LARGEST), ("matrix", part.error)):
            figures[key] = float(np.maximum(figures.get(key, 0.0), value))

    def figures(self) -> dict[str, dict[str, dict[str, float]]]:
        return {"largest": self._found, "limits": self._limits}


def _recipe_problem(stored: ReadBack, spec: TensorSpec) -> str | None:
    """What is wrong with the recipe of a row's codes; None if nothing is."""
    recipe = stored.recipe(spec.name)
    return None if recipe is None or _limits(recipe) else f"there are no limits for {recipe}"


def _limits(recipe: Recipe | None) -> Limits | None:
    return None if recipe is None else limits_of(recipe.bits, recipe.block, recipe.scale_type)


def _limits_of_row(stored: ReadBack, name: str, *, keeps: bool) -> Limits | None:
    """The limits of a row of the table; `keeps`: whether it should have the checkpoint's own codes."""
    recipe = stored.recipe(name)
    limits = _limits(recipe)
    if recipe is None or limits is None or not keeps:
        return limits
    return kept_limits(limits, recipe.scale_type, rounds_zeros=stored.rounds_zeros(name))


def _units(stored: ReadBack, spec: TensorSpec) -> Iterator[_Unit]:
    places = [(group, copy) for group in stored.stored_groups(spec) for copy in range(len(stored.copies(spec.name)))]
    for group, copy in places:
        parts = spec.groups[group]
        num_rows, *others = parts[0].shape
        step = max(1, CHUNK_ELEMENTS // max(1, len(parts) * math.prod(others)))
        step = max(ROW_MULTIPLE, step - step % ROW_MULTIPLE)
        for row in range(0, num_rows, step):
            yield _Unit(spec=spec, group=group, copy=copy, first=row, last=min(row + step, num_rows))


def _compare(stored: ReadBack, unit: _Unit, kept: frozenset[str]) -> list[_Sums]:
    """The sums of each part of a unit. `kept` names the rows that should have the checkpoint's own codes."""
    parts = unit.spec.groups[unit.group]
    rows = slice(unit.first, unit.last)
    expected = [part.read_stored(stored.checkpoint, rows) for part in parts]
    result = [_Sums() for _ in parts]
    recipe = stored.recipe(unit.spec.name)
    keeps = unit.spec.name in kept
    limits = _limits_of_row(stored, unit.spec.name, keeps=keeps)
    width = max(1, math.prod(parts[0].shape[1:]))
    step = max(ROW_MULTIPLE, READ_VALUES // width // ROW_MULTIPLE * ROW_MULTIPLE)
    for first in range(unit.first, unit.last, step):
        last = min(first + step, unit.last)
        found = stored.part_rows(unit.spec.name, unit.group, first, last, unit.copy)
        scales = stored.part_scales(unit.spec.name, unit.group, first, last)
        for turn, (sums, values, wanted) in enumerate(zip(result, found, expected, strict=True)):
            own = wanted[first - unit.first : last - unit.first]
            if recipe is not None and unit.spec.name in stored.checksums:
                sums.fed = sums.fed or FedBack()
                sums.fed.add_rows(values, widen(own), first, recipe.bits, _half_scale_error(stored, unit.spec.name))
                sums.count += values.size
            elif recipe is None or limits is None:
                _add_exact(sums, values, stored.rounded(unit.spec.name, unit.group, first, own), first)
            else:
                halved = _half_scale_error(stored, unit.spec.name)
                wanted_values = widen(own) if recipe.block else nearest_of_rows(widen(own), recipe.bits)
                quantiser = _Quantiser(stored, unit.spec.name, keeps)
                own_scales = None if scales is None else scales[turn]
                steps = quantiser.steps(wanted_values, own_scales)
                _add_rows(sums, values, wanted_values, steps, first, limits, halved, quantiser)
                if own_scales is not None:
                    _add_codes(sums, values, wanted_values, own_scales, steps, first, limits, recipe, quantiser)
    return result


def _half_scale_error(stored: ReadBack, name: str) -> float:
    """`half_scale_error` of one value of a row of the table; 0 where its scales are not float16."""
    recipe = stored.recipe(name)
    if recipe is None or recipe.scale_type != "float16":
        return 0.0
    return half_scale_error(recipe.bits, 1) / stored.row_factor(name)


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


def _add_rows(
    sums: _Sums, found: FloatArray, wanted: FloatArray, steps: FloatArray, first: int, limits: Limits, halved: float,
    quantiser: _Quantiser,
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


def _add_codes(
    sums: _Sums, found: FloatArray, wanted: FloatArray, scales: FloatArray, steps: FloatArray, first: int,
    limits: Limits, recipe: Recipe, quantiser: _Quantiser,
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


def _sound(quantiser: _Quantiser, wanted: FloatArray, steps: FloatArray) -> Band:
    """The band of a sound engine."""
    return measure(quantiser.requantized(wanted), wanted, steps)


def _problems(stored: ReadBack, spec: TensorSpec, part: _Sums, *, keeps: bool, checksum: str | None) -> Iterator[str]:
    """What is wrong with one part of a group, to be read after its name. `checksum` is that of solved codes."""
    if part.different:
        _, found, expected = part.different[0]
        yield f", {_rows([row for row, *_ in part.different])}: found {found:.8g}, expected {expected:.8g}, exactly"
    recipe = stored.recipe(spec.name)
    limits = _limits_of_row(stored, spec.name, keeps=keeps)
    if part.fed is not None and recipe is not None:
        slack = _half_scale_error(stored, spec.name) * math.sqrt(part.count)
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
    slack = _half_scale_error(stored, spec.name) * math.sqrt(part.count)
    if not math.sqrt(part.errors) <= limits.matrix * math.sqrt(part.weights) + slack:
        yield f": found relative error {part.error:.3g}, allowed {limits.matrix:.3g}"


def _single_problems(part: _Sums, limits: Limits) -> Iterator[str]:
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
