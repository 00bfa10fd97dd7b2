"""Checks models before a merge: refuses those that do not fit the base, and measures what the merge would lose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export.checkpoint.safetensors_header import FLOAT_LABELS
from export.checkpoint.tensor_table import CHUNK_ELEMENTS
from export.errors import MergeError, listing
from export.families import Model
from export.merge.outputs import Output

SAMPLED_ROWS = 16
_COMPARED = (
    "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffn_size", "rotary_dim",
)  # fmt: skip
# Facts that a merge takes from the base, so that an expert may have another: it loses its own.
_OF_THE_BASE = ("vocab_size", "rope_base", "rotary_scaling", "norm_epsilon", "sliding_window")
# Stored dtype -> largest relative difference that may be rounding, if two models are stored in different dtypes.
_ROUNDING = {"F64": 0.0, "F32": 0.0, "F16": 2.0**-10, "BF16": 2.0**-7}


def check_models(output: Output, base: Model, experts: Sequence[Model], shared: Model | None) -> None:
    """Raise MergeError that lists every model that is not of the base's family or does not have its dimensions, what of
    the base the output's layout cannot say, and a shared expert that is missing or has no place."""
    if output.has_shared and shared is None:
        raise MergeError(
            f"merging into {_where(base)}: a {output.name} has an MLP that every token goes through, a shared expert, "
            "and the YAML names no model for it; add shared_experts with one entry: a source_model, the base say, its "
            "positive_prompts and a small residual_scale such as 0.1"
        )
    if shared is not None and not output.has_shared:
        raise MergeError(
            f"merging into {_where(base)}: the YAML names a shared expert, and a {output.name} has none, only a "
            "qwen2_moe of Qwen2s has; put the model under experts or leave it out"
        )
    named = [(f"expert {index}", expert) for index, expert in enumerate(experts)]
    if shared is not None:
        named.append(("the shared expert", shared))
    problems = [
        f"{name} ({_where(model)}) is of family {model.family.name}, the base of {base.family.name}; "
        f"a {output.name} is merged from models of one family"
        for name, model in named
        if model.family.name != base.family.name
    ]
    if not problems:
        problems = [problem for name, model in named for problem in _differences(name, model, base)]
    problems += output.problems(base)
    if problems:
        raise MergeError(f"merging into {_where(base)}: leave out or replace what does not fit:{listing(problems)}")


def _differences(name: str, model: Model, base: Model) -> list[str]:
    pairs = [(key, getattr(model.architecture, key), getattr(base.architecture, key)) for key in _COMPARED]
    return [
        f"{name} ({_where(model)}) has {key} {found}, the base {expected}"
        for key, found, expected in pairs
        if found != expected
    ]


def _where(model: Model) -> str:
    return model.weights.checkpoint.identity


def output_dtype(asked: str | None, base: Model) -> str:
    """The dtype to write, as a safetensors label: `asked`, else the dtype of the base. Raises MergeError if the base
    has tensors of several dtypes."""
    stored = base.weights.stored_dtypes()
    if asked is not None:
        return asked
    if len(stored) != 1 or stored[0] not in FLOAT_LABELS.values():
        raise MergeError(
            f"merging into {_where(base)}: it stores {' and '.join(stored)}; "
            f"say which to write with dtype in the YAML: {', '.join(FLOAT_LABELS)}"
        )
    return stored[0]


@dataclass(frozen=True, kw_only=True)
class LostTraining:
    """How much an expert differs from the base outside the MLPs: training that a merge would lose. `relative` is
    |expert - base| / |base| of the tensor `tensor`. `facts` are numbers of the architecture that the base has
    otherwise: name -> the expert's, the base's."""

    expert: int
    num_differing: int
    num_compared: int
    relative: float
    tensor: str
    facts: Mapping[str, tuple[object, object]]


def measure_lost_training(base: Model, experts: Sequence[Model]) -> list[LostTraining]:
    """Compare SAMPLED_ROWS rows of every tensor that a merge takes from the base, and facts that it takes from there;
    returns one record for each expert that differs."""
    shared = shared_rows(base)
    found = []
    for index, expert in enumerate(experts):
        if expert is base:
            continue
        facts = facts_of_the_base(base, expert)
        relative = {name: _relative(*(_sample(model, name, _rows(base, expert, name)) for model in (expert, base)))
                    for name in shared}  # fmt: skip
        differing = [name for name in shared if relative[name] > rounding_between(base, expert, name)]
        if differing or facts:
            worst = max(shared, key=lambda name: relative[name])
            found.append(
                LostTraining(
                    expert=index,
                    num_differing=len(differing),
                    num_compared=len(shared),
                    relative=relative[worst],
                    tensor=worst,
                    facts=facts,
                )
            )
    return found


def facts_of_the_base(base: Model, expert: Model) -> dict[str, tuple[object, object]]:
    """The facts that a merge takes from the base and in which the expert differs: name -> the expert's, the base's."""
    pairs = {
        name: (getattr(expert.architecture, name), getattr(base.architecture, name)) for name in _OF_THE_BASE
    }  # fmt: skip
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def differences_by_role(base: Model, expert: Model) -> dict[str, float]:
    """Role -> |expert - base| / |base| over all weights of that role that a merge takes from the base, read in chunks.
    Differences of a weight that may be rounding count as 0."""
    sums: dict[str, list[float]] = {}
    for name in shared_rows(base):
        difference, size = _squares(base, expert, name)
        own = sums.setdefault(base.weights.table[name].role.value, [0.0, 0.0])
        own[0] += difference if difference > size * rounding_between(base, expert, name) ** 2 else 0.0
        own[1] += size
    return {role: math.sqrt(found / size) if size else float(found > 0) for role, (found, size) in sums.items()}


def _squares(base: Model, expert: Model, name: str) -> tuple[float, float]:
    """The sums of the squares of expert - base and of base, over the rows of a weight that both have."""
    num_rows, columns = _rows(base, expert, name), math.prod(base.weights.table[name].shape[1:])
    step, difference, size = max(1, CHUNK_ELEMENTS // columns), 0.0, 0.0
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        theirs, ours = (_read_rows(model, name, first, last).reshape(-1) for model in (base, expert))
        size += float(np.dot(theirs, theirs))
        ours = ours - theirs
        difference += float(np.dot(ours, ours))
    return difference, size


def shared_rows(base: Model) -> list[str]:
    """The rows of the table that a merge takes from the base."""
    return [name for name in base.weights.table if ".mlp." not in name]


def _rows(base: Model, expert: Model, name: str) -> int:
    """The number of rows of a weight that both models have: vocabularies may differ in size."""
    return min(model.weights.table[name].shape[0] for model in (base, expert))


def _sample(model: Model, name: str, num_rows: int) -> npt.NDArray[np.float64]:
    """SAMPLED_ROWS rows from the middle of the first `num_rows` of a weight, or `num_rows` values of a vector. The rows
    are counted in our table, so they are the same whatever names the checkpoint uses."""
    spec = model.weights.table[name]
    first = max(0, (num_rows - SAMPLED_ROWS) // 2) if len(spec.shape) > 1 else 0
    last = min(first + SAMPLED_ROWS, num_rows) if len(spec.shape) > 1 else num_rows
    return _read_rows(model, name, first, last).astype(np.float64)


def _read_rows(model: Model, name: str, first: int, last: int) -> npt.NDArray[np.float32]:
    """The rows from `first` to before `last` of a weight, across its parts."""
    pieces, offset = [], 0
    for part in model.weights.table[name].parts:
        rows = slice(max(first - offset, 0), min(max(last - offset, 0), part.shape[0]))
        if rows.start < rows.stop:
            pieces.append(model.weights.checkpoint.read_float32(part.name, rows))
        offset += part.shape[0]
    return np.concatenate(pieces)


def _relative(values: npt.NDArray[np.float64], reference: npt.NDArray[np.float64]) -> float:
    difference, size = float(np.linalg.norm(values - reference)), float(np.linalg.norm(reference))
    return difference / size if size else float(difference > 0)


def rounding_between(base: Model, expert: Model, name: str) -> float:
    """The largest relative difference of a weight that is rounding alone, 0 if both models store one dtype."""
    dtypes = {
        model.weights.checkpoint.tensors[model.weights.table[name].parts[0].name].dtype for model in (base, expert)
    }
    return max(_ROUNDING[dtype] for dtype in dtypes) if len(dtypes) > 1 else 0.0
