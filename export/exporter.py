"""Exports a model at a precision: ONNX graphs that share one data file of weights (export/onnx_graph/forms.py).

model.onnx          for onnxruntime-genai: logits of the last position, [B, 1, V]
model_serving.onnx  serving: one step of many sequences
model_scoring.onnx  verification: logits of every position, and each layer's router logits
model_serving_int8_cache.onnx  serving with keys and values in int8, where that is asked for
model.onnx.data     the weights of all graphs, stored once
weights.jsonl       one line a part: digests of the source bytes that were read and of the regions that were written
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.checkpoint.tensor_table import Role
from export.conversion.parts import PartRecord, records_text
from export.conversion.writer import Progress, write_parts
from export.families import Model
from export.files.resume import PartialFolder
from export.onnx_graph.converter import OnnxConverter
from export.onnx_graph.forms import GeneratingGraph, Int8ServingGraph, ScoringGraph, ServingGraph
from export.onnx_graph.graph import GraphBuilder
from export.onnx_graph.weights import Placement, WeightJob, place
from export.optional import optional_package
from export.provider import PROVIDERS, Provider
from export.quantize.recipe import Recipe
from export.quantize.solved import SolvedCodes

if TYPE_CHECKING:
    import onnx

GENERATING_GRAPH = "model.onnx"
SERVING_GRAPH = "model_serving.onnx"
SCORING_GRAPH = "model_scoring.onnx"
INT8_CACHE_GRAPH = "model_serving_int8_cache.onnx"
DATA_FILE = "model.onnx.data"
RECORDS_FILE = "weights.jsonl"
_FORMS: Mapping[str, Callable[..., GraphBuilder]] = {
    GENERATING_GRAPH: GeneratingGraph, SERVING_GRAPH: ServingGraph, SCORING_GRAPH: ScoringGraph,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """The graphs by file name, the jobs that produce their weights, and where each weight lies; made before a weight is
    read."""

    graphs: Mapping[str, onnx.ModelProto]
    jobs: tuple[WeightJob, ...]
    placement: Placement

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
    recipe: Recipe,
    provider: Provider = PROVIDERS["cpu"],
    *,
    max_sequence: int | None = None,
    left_out: Mapping[int, Collection[int]] | None = None,
    int8_cache: bool = False,
) -> ExportPlan:
    """Build the graphs and lay out their shared data file; reads no weights.

    The graphs take sequences of `max_sequence` tokens (None: all of the model's positions). `left_out`: layer ->
    experts that it does without (None: every layer has all). `int8_cache`: with a graph whose caches are in int8.
    Raises ExportError for a provider that has none.
    """
    with optional_package("onnx", "building an ONNX Runtime engine", "cpu"):
        import onnx  # noqa: F401 - imported here, so that a missing package is reported before any work
    rows_left_out = {name: experts for layer, experts in (left_out or {}).items() for name in model.mixture_rows(layer)}
    grids = model.weights.grids() if recipe.quantises else {}
    built = {}
    forms = {**_FORMS, INT8_CACHE_GRAPH: Int8ServingGraph} if int8_cache else _FORMS
    for name, form in forms.items():
        graph = form(
            model.architecture, model.weights.table, recipe, provider,
            max_sequence=max_sequence, left_out=rows_left_out, grids=grids,
        )  # fmt: skip
        hidden = model.family.decoder(graph, model.architecture)
        built[name] = graph, model.family.head(graph, model.architecture, graph.wanted(hidden))
    jobs = tuple(built[SERVING_GRAPH][0].jobs)
    placement = place(jobs)
    return ExportPlan(
        graphs={name: graph.finish(logits, placement, DATA_FILE) for name, (graph, logits) in built.items()},
        jobs=jobs,
        placement=placement,
    )


def write_export(
    plan: ExportPlan,
    model: Model,
    folder: PartialFolder,
    progress: Callable[[Progress], None],
    solved: SolvedCodes | None = None,
) -> list[PartRecord]:
    """Write the graphs, the data file and weights.jsonl; returns the parts' records. Codes that `solved` has are
    carried over. Each worker holds one chunk of a weight in memory at a time."""
    data = folder.content / DATA_FILE
    converter = OnnxConverter(weights=model.weights, data=data, placement=plan.placement, solved=solved)
    records = write_parts(converter, plan.jobs, folder, progress)
    for name, graph in plan.graphs.items():
        (folder.content / name).write_bytes(graph.SerializeToString())
    (folder.content / RECORDS_FILE).write_text(records_text(records), encoding="utf-8")
    return records
