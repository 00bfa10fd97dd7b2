"""A model and a precision in, two ONNX graphs over one data file out.

model.onnx          serving: logits of the last position, [B, 1, V]
model.0.onnx, ...   where weights are packed: the serving graph in halves, which are loaded side by side (stages.py)
model_scoring.onnx  verification: logits of every position, and each layer's router logits
model.onnx.data     the weights of both, written once, tensor by tensor
weights.jsonl       what each part of them was made of, and where it lies, with digests of both
kernels.onnx        a few rows of each kind of packed weight: tells machines whose kernels pack alike (packing.py)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.conversion.parts import PartRecord, records_text
from export.conversion.writer import Progress, write_parts
from export.families import Model
from export.onnx_graph.converter import onnx_converter
from export.onnx_graph.graph import GraphBuilder
from export.onnx_graph.initializers import with_packed_forms
from export.onnx_graph.packing import NO_KEY, probe_graph
from export.onnx_graph.stages import halves
from export.onnx_graph.weights import Placement, WeightJob, place
from export.optional import optional_package
from export.provider import PROVIDERS, Provider
from export.quantize.recipe import QuantPlan
from export.resume import PartialFolder
from export.tensor_table import Role

if TYPE_CHECKING:
    import onnx

SERVING_GRAPH = "model.onnx"
SCORING_GRAPH = "model_scoring.onnx"
STAGE_GRAPH = "model.{}.onnx"
DATA_FILE = "model.onnx.data"
RECORDS_FILE = "weights.jsonl"
PROBE_GRAPH = "kernels.onnx"


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """All that is decided before a weight is read."""

    serving: onnx.ModelProto
    scoring: onnx.ModelProto
    jobs: tuple[WeightJob, ...]
    placement: Placement
    stages: tuple[onnx.ModelProto, ...]  # the serving graph as a session loads it
    probe: bytes | None  # the graph that tells kernels apart, where weights are packed for them

    def graphs(self, keys: Mapping[str, str] | None = None) -> dict[str, onnx.ModelProto]:
        """Every graph by its file's name. `keys` are those of the packed weights, by job; None gives graphs of the
        same size that no session would find packed weights with."""
        if keys is None:
            keys = {job.source: NO_KEY.format(job.packed.operator) for job in self.jobs if job.packed}
        built = {SERVING_GRAPH: self.serving, SCORING_GRAPH: self.scoring}
        if len(self.stages) > 1:
            built |= dict(zip(self.stage_names, self.stages, strict=True))
        return {name: with_packed_forms(graph, self.jobs, self.placement, keys) for name, graph in built.items()}

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The files of the stages."""
        return (
            tuple(STAGE_GRAPH.format(n) for n in range(len(self.stages))) if len(self.stages) > 1 else (SERVING_GRAPH,)
        )

    @property
    def bytes_by_role(self) -> dict[Role, int]:
        totals: dict[Role, int] = {}
        for job in self.jobs:
            totals[job.role] = totals.get(job.role, 0) + sum(output.num_bytes for output in job.outputs)
        return totals

    @property
    def num_weights_bytes(self) -> int:
        return sum(self.bytes_by_role.values())


def plan_export(
    model: Model,
    plan: QuantPlan,
    provider: Provider = PROVIDERS["cpu"],
    *,
    max_sequence: int | None = None,
    portable: bool = False,
) -> ExportPlan:
    """Build both graphs and lay out their shared data file; reads no weights.

    The graphs take sequences of `max_sequence` tokens (None: all of the model's positions). Quantised weights are
    packed for this machine's kernels where the provider has such a form, unless `portable`.
    """
    with optional_package("onnx", "building an ONNX Runtime engine", "cpu"):
        import onnx  # noqa: F401 - asked for here, so that its absence is told before any work
    built = []
    for scoring in (False, True):
        graph = GraphBuilder(
            model.architecture, model.weights.table, plan, provider, scoring=scoring,
            packs=provider.packs_weights and not portable, max_sequence=max_sequence,
        )  # fmt: skip
        hidden = model.family.decoder(graph, model.architecture)
        logits = model.family.head(graph, model.architecture, hidden if scoring else graph.last_position(hidden))
        built.append((graph, logits))
    (serving, serving_logits), (scoring_graph, scoring_logits) = built
    jobs = tuple(serving.jobs)
    placement = place(jobs)
    weights = [job.packed for job in jobs if job.packed]
    whole = serving.finish(serving_logits, placement, DATA_FILE)
    return ExportPlan(
        serving=whole,
        stages=halves(whole) if weights else (whole,),
        scoring=scoring_graph.finish(scoring_logits, placement, DATA_FILE),
        jobs=jobs,
        probe=probe_graph(weights) if weights else None,
        placement=placement,
    )


def write_export(
    plan: ExportPlan, model: Model, folder: PartialFolder, progress: Callable[[Progress], None]
) -> list[PartRecord]:
    """Write every graph, the data file and its records; a worker holds a chunk, or a weight to pack."""
    data = folder.content / DATA_FILE
    converter = onnx_converter(plan.jobs, plan.placement, model.weights, data, folder.scratch)
    records = write_parts(converter, plan.jobs, folder, progress)
    keys = {record.part: record.key for record in records if record.key is not None}
    for name, graph in plan.graphs(keys).items():
        (folder.content / name).write_bytes(graph.SerializeToString())
    if plan.probe is not None:
        (folder.content / PROBE_GRAPH).write_bytes(plan.probe)
    (folder.content / RECORDS_FILE).write_text(records_text(records), encoding="utf-8")
    return records
