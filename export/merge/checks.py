"""Checks models before a merge: refuses those that do not fit the base, and measures what the merge would lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export.checkpoint.safetensors_header import FLOAT_LABELS
from export.errors import MergeError, listing
from export.families import Model
from export.families.phi_stack import ROPE_BASE

SAMPLED_ROWS = 16
_COMPARED = (
    "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffn_size", "vocab_size", "rotary_dim",
    "rope_base", "norm_epsilon",
)  # fmt: skip
# Stored dtype -> largest relative difference that may be rounding, if two models are stored in different dtypes.
_ROUNDING = {"F32": 0.0, "F16": 2.0**-10, "BF16": 2.0**-7}


def check_models(base: Model, experts: Sequence[Model]) -> None:
    """Raise MergeError that lists every model that is not a Phi-2 or does not have the dimensions of the base."""
    named = [("the base", base), *((f"expert {index}", expert) for index, expert in enumerate(experts))]
    problems = [
        f"{name} ({_where(model)}) is of family {model.family.name}; moeship merges dense Phi-2s (phi)"
        for name, model in named
        if model.family.name != "phi"
    ]
    if not problems:
        problems = [problem for name, model in named[1:] for problem in _differences(name, model, base)]
    if base.architecture.rope_base != ROPE_BASE:
        problems.append(
            f"the base ({_where(base)}) has rope_theta {base.architecture.rope_base:g}; "
            f"the phi-msft layout has no key for it and fixes it at {ROPE_BASE:g}"
        )
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
    if len(stored) != 1:
        raise MergeError(
            f"merging into {_where(base)}: it stores {' and '.join(stored)}; "
            f"say which to write with dtype in the YAML: {', '.join(FLOAT_LABELS)}"
        )
    return stored[0]


@dataclass(frozen=True, kw_only=True)
class LostTraining:
    """How much an expert differs from the base outside the MLPs: training that a merge would lose. `relative` is
    |expert - base| / |base| of the tensor `tensor`."""

    expert: int
    num_differing: int
    num_compared: int
    relative: float
    tensor: str


def measure_lost_training(base: Model, experts: Sequence[Model]) -> list[LostTraining]:
    """Compare SAMPLED_ROWS rows of every tensor that a merge takes from the base; returns one record for each expert
    that differs."""
    shared = [name for name in base.weights.table if ".mlp." not in name]
    ours = {name: _sample(base, name) for name in shared}
    found = []
    for index, expert in enumerate(experts):
        if expert.weights.checkpoint.folder.resolve() == base.weights.checkpoint.folder.resolve():
            continue
        relative = {name: _relative(_sample(expert, name), ours[name]) for name in shared}
        differing = [name for name in shared if relative[name] > _tolerance(base, expert, name)]
        if differing:
            worst = max(differing, key=lambda name: relative[name])
            found.append(
                LostTraining(
                    expert=index,
                    num_differing=len(differing),
                    num_compared=len(shared),
                    relative=relative[worst],
                    tensor=worst,
                )
            )
    return found


def _sample(model: Model, name: str) -> npt.NDArray[np.float64]:
    """SAMPLED_ROWS rows from the middle of a weight, or all of a vector. The rows are counted in our table, so they are
    the same whatever names the checkpoint uses."""
    spec = model.weights.table[name]
    first = max(0, (spec.shape[0] - SAMPLED_ROWS) // 2) if len(spec.shape) > 1 else 0
    last = first + SAMPLED_ROWS if len(spec.shape) > 1 else spec.shape[0]
    pieces, offset = [], 0
    for part in spec.parts:
        rows = slice(max(first - offset, 0), min(max(last - offset, 0), part.shape[0]))
        if rows.start < rows.stop:
            pieces.append(model.weights.checkpoint.read_float32(part.name, rows))
        offset += part.shape[0]
    return np.concatenate(pieces).astype(np.float64)


def _relative(values: npt.NDArray[np.float64], reference: npt.NDArray[np.float64]) -> float:
    difference, size = float(np.linalg.norm(values - reference)), float(np.linalg.norm(reference))
    return difference / size if size else float(difference > 0)


def _tolerance(base: Model, expert: Model, name: str) -> float:
    dtypes = {
        model.weights.checkpoint.tensors[model.weights.table[name].parts[0].name].dtype for model in (base, expert)
    }
    return max(_ROUNDING[dtype] for dtype in dtypes) if len(dtypes) > 1 else 0.0
