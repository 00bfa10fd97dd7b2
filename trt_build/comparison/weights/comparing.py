"""First question: are these the checkpoint's weights? No text is needed.

Each matrix, of each expert by itself, is compared with the checkpoint's, in its place. Quantised values keep the limits
of `limits.py`; others are equal, after rounding to the engine's float type. A backend adds what is wrong with the
facts beside the weights, such as attributes of nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from export.checkpoint.digests import num_cores
from export.checkpoint.tensor_table import CHUNK_ELEMENTS, TensorSpec
from export.families import Model
from export.floats import widen
from trt_build.comparison.answers import Answer, listed
from trt_build.comparison.read_back import ROW_MULTIPLE, ReadBack
from trt_build.comparison.weights.fed_back import FedBack, matrix_limit, row_limit
from trt_build.comparison.weights.sound import Quantiser, limits_of_row, recipe_limits, row_half_error
from trt_build.comparison.weights.sums import LARGEST, Sums, add_codes, add_exact, add_rows, nearest_of_rows
from trt_build.comparison.weights.words import described, problems_of, recipe_problem, whose

QUESTION = "Are these the checkpoint's weights?"
OTHER_SEARCH = (
    "the scales of {count} quantised weights were chosen by another version's search: their codes, sizes and errors "
    "are compared with what holds for any search, and no scale by itself; build the engine again for that"
)
READ_VALUES = 1 << 18  # values that are dequantised and compared at a time
_KEPT_BYTES = 24 << 20  # several times the arrays of a thread; below 32 MiB, from which on glibc learns nothing
MOST_SEARCHES = 4  # for so many wrong matrices it is said whose weights they have


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """Rows of one group of a table row, compared by one thread."""

    spec: TensorSpec
    group: int
    copy: int  # an index of `ReadBack.copies`
    first: int
    last: int


def compare_weights(stored: ReadBack, model: Model, failures: Sequence[str], progress: Callable[[str], None]) -> Answer:
    """Compare the weights of an engine with the model that it was built from; `failures` of the facts beside them come
    first. Raises CheckpointError for weights that cannot be read or are not finite."""
    found, worst = list(failures), _Worst()
    comparable = []
    for spec in stored.table.values():
        problem = stored.misfit(spec.name) or recipe_problem(stored, spec)
        if problem:
            found.append(f"{described(model, spec, None, 0)}: {problem}")
        else:
            comparable.append(spec)
    misfits = len(stored.table) - len(comparable)
    units = [unit for spec in comparable for unit in _units(stored, spec)]
    _keep_freed_memory()
    sums: dict[tuple[str, int, int, int], Sums] = {}
    quantised = [spec for spec in comparable if stored.recipe(spec.name) is not None]
    kept = frozenset(spec.name for spec in comparable if stored.keeps_codes(spec.name))
    with ThreadPoolExecutor(max_workers=num_cores()) as pool:
        done = 0
        for unit, compared in zip(units, pool.map(lambda unit: _compare(stored, unit, kept), units), strict=True):
            done += sum(part.count for part in compared)
            progress(f"compared {done:,} weights with the checkpoint's")
            for turn, part in enumerate(compared):
                sums.setdefault((unit.spec.name, unit.group, unit.copy, turn), Sums()).add(part)
    searches = MOST_SEARCHES
    for (name, group, copy, turn), part in sums.items():
        spec = stored.table[name]
        where = described(model, spec, group, turn) + stored.copies(name)[copy]
        checksum = stored.checksums.get(name, {}).get(f"{group}.{turn}")
        problems = list(problems_of(stored, spec, part, keeps=name in kept, checksum=checksum))
        if part.wrong_rows and searches:
            searches -= 1
            problems[0] += whose(stored, model, (spec, group, turn), part.wrong_rows[0])
        found += [f"{where}{problem}" for problem in problems]
        worst.add(stored, spec, part)
    inexact = len(failures) + misfits + sum(bool(part.different) for part in sums.values())
    figures = {
        "num_weights": sum(part.count for part in sums.values()), "num_matrices": len(sums),
        "num_inexact": inexact, **worst.figures(),
    }  # fmt: skip
    otherwise = sum(not Quantiser(stored, spec.name, spec.name in kept).is_known for spec in quantised)
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


class _Worst:
    """The largest figures of each recipe, such as "int4 in blocks of 64", and what is allowed."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, float]] = {}
        self._limits: dict[str, dict[str, float]] = {}

    def add(self, stored: ReadBack, spec: TensorSpec, part: Sums) -> None:
        recipe = stored.recipe(spec.name)
        limits = recipe_limits(recipe)
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
        self._limits[str(recipe)] = {key: getattr(limits, key) for key in (*LARGEST, "matrix")}
        for key, value in (*((key, getattr(part, key)) for key in LARGEST), ("matrix", part.error)):
            figures[key] = float(np.maximum(figures.get(key, 0.0), value))

    def figures(self) -> dict[str, dict[str, dict[str, float]]]:
        return {"largest": self._found, "limits": self._limits}


def _units(stored: ReadBack, spec: TensorSpec) -> Iterator[_Unit]:
    places = [(group, copy) for group in stored.stored_groups(spec) for copy in range(len(stored.copies(spec.name)))]
    for group, copy in places:
        parts = spec.groups[group]
        num_rows, *others = parts[0].shape
        step = max(1, CHUNK_ELEMENTS // max(1, len(parts) * math.prod(others)))
        step = max(ROW_MULTIPLE, step - step % ROW_MULTIPLE)
        for row in range(0, num_rows, step):
            yield _Unit(spec=spec, group=group, copy=copy, first=row, last=min(row + step, num_rows))


def _compare(stored: ReadBack, unit: _Unit, kept: frozenset[str]) -> list[Sums]:
    """The sums of each part of a unit. `kept` names the rows that should have the checkpoint's own codes."""
    parts = unit.spec.groups[unit.group]
    rows = slice(unit.first, unit.last)
    expected = [part.read_stored(stored.checkpoint, rows) for part in parts]
    result = [Sums() for _ in parts]
    recipe = stored.recipe(unit.spec.name)
    keeps = unit.spec.name in kept
    limits = limits_of_row(stored, unit.spec.name, keeps=keeps)
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
                sums.fed.add_rows(values, widen(own), first, recipe.bits, row_half_error(stored, unit.spec.name))
                sums.count += values.size
            elif recipe is None or limits is None:
                add_exact(sums, values, stored.rounded(unit.spec.name, unit.group, first, own), first)
            else:
                halved = row_half_error(stored, unit.spec.name)
                wanted_values = widen(own) if recipe.block else nearest_of_rows(widen(own), recipe.bits)
                quantiser = Quantiser(stored, unit.spec.name, keeps)
                own_scales = None if scales is None else scales[turn]
                steps = quantiser.steps(wanted_values, own_scales)
                add_rows(sums, values, wanted_values, steps, first, limits, halved, quantiser)
                if own_scales is not None:
                    add_codes(sums, values, wanted_values, own_scales, steps, first, limits, recipe, quantiser)
    return result
