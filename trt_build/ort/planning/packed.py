"""What became of weights that the checkpoint stores packed: their codes were kept, or they were quantised anew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from export.checkpoint.tensor_table import Weights
from export.conversion.parts import PartRecord
from export.onnx_graph.weights import Layout, WeightJob
from export.quantize.recipe import GPTQ
from trt_build.ort.engine import PackedRole

LARGE_ERROR = 0.02  # relative error of int4 codes is 7 to 10 %, of int8 codes 0.6 %


def packed_roles(
    jobs: Sequence[WeightJob], weights: Weights, records: Sequence[PartRecord] = ()
) -> dict[str, PackedRole]:
    """What became of the packed weights by role; empty for a checkpoint without any. Without `records` the errors are
    not known, and 0."""
    losses = {record.part: record.loss for record in records if record.loss is not None}
    found: dict[str, list[WeightJob]] = {}
    for job in jobs:
        if any(part.packed_in(weights.checkpoint) for part in weights.table[job.source].parts):
            found.setdefault(str(job.role), []).append(job)
    return {role: _role(own, weights, [losses.get(job.source, (0.0, 0.0)) for job in own])
            for role, own in found.items()}  # fmt: skip


def sentences(roles: Mapping[str, PackedRole], labels: Sequence[str]) -> list[str]:
    """One sentence a role for whoever builds the engine. `labels` name how the checkpoint packs its weights."""
    made = f"the checkpoint packs its weights as {', '.join(labels)}"
    return [f"{made}: {role}: {_became(found)}" for role, found in roles.items()]


def _became(role: PackedRole) -> str:
    said = []
    if role.codes_kept:
        exactly = "exactly" if not role.quantised_anew and not float(role.relative_error or 0) else "as they are"
        said.append(f"the codes of {_weights(role.codes_kept)} are kept {exactly}")
    if role.as_floats:
        said.append(f"{_weights(role.as_floats)} {_are(role.as_floats)} stored as floats")
    if role.quantised_anew:
        anew = role.quantised_anew
        said.append(f"{_weights(anew)} {_are(anew)} quantised anew, because {'; '.join(role.reasons)}")
    error = float(role.relative_error or 0)
    added = f"; the relative error that this adds is {error:.2%}" if error else ""
    return ", ".join(said) + added + (", --precision int8 adds less" if error > LARGE_ERROR else "")


def _weights(count: int) -> str:
    return f"{count} weight{'' if count == 1 else 's'}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _role(jobs: Sequence[WeightJob], weights: Weights, losses: Sequence[Sequence[float]]) -> PackedRole:
    plain = [job for job in jobs if job.layout is Layout.PLAIN]
    anew = [job for job in jobs if job.grid is None and job.layout is not Layout.PLAIN]
    error, size = (sum(loss[place] for loss in losses) for place in (0, 1))
    solved = any(job.storage is not None and job.storage.method == GPTQ for job in anew)
    return PackedRole(
        codes_kept=len(jobs) - len(plain) - len(anew),
        quantised_anew=len(anew),
        as_floats=len(plain),
        reasons=tuple(sorted({_reason(job, weights) for job in anew})),
        relative_error=None if solved else f"{math.sqrt(error / size) if size else 0.0:.3e}",
    )


def _reason(job: WeightJob, weights: Weights) -> str:
    grid = weights.grid(job.source)
    if grid is None:
        return "their values lie on no uniform grid of neighbouring input features"
    if grid.bits > job.bits:
        return f"their codes have {grid.bits} bits and the engine's {job.bits}"
    if grid.group_size % job.block_size == 0:
        return "the kernels of the experts are not known to take zero points there"
    return f"their groups of {grid.group_size} are no multiple of the kernels' blocks of {job.block_size}"
