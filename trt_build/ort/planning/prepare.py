"""Makes every decision of a build for ONNX Runtime: reads the checkpoint's facts and plans the engine.

Of the weights only the gates are read, which decide the experts that are left out. `moeship build` carries out a
prepared build; `moeship plan` computes its figures.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.calibration.layers import Wanted
from export.calibration.store import CalibrationText
from export.calibration.work import Work, work_of
from export.checkpoint.folder import Checkpoint
from export.checkpoint.tensor_table import Role, Weights
from export.conversion.parts import PartRecord
from export.conversion.sources import source_files
from export.errors import ConfigError, KernelsError, unknown
from export.exporter import ExportPlan, plan_export
from export.families import Model
from export.files.resume import SourceFile
from export.onnx_graph.weights import WeightJob
from export.provider import (
    FLOAT,
    INT8,
    KERNELS,
    KV_CACHES,
    ONNX_RUNTIME,
    OWN_KERNELS,
    PER_POSITION,
    PROVIDERS,
    Provider,
    provider_of,
)
from export.quantize.grid import SEARCH_VERSION
from export.quantize.presets import recipe_for
from export.quantize.recipe import GPTQ, Recipe
from export.quantize.recipe_file import read_recipe_file
from export.routing import RoutingReport, left_out_by_layer, left_out_note
from export.tokenizer.settings import Settings
from trt_build.calibration import MOST_PRODUCTS, Calibration, planned_record
from trt_build.engine_files import FileRecord
from trt_build.manifest import ORT_BACKEND, Source, libraries
from trt_build.ort.engine import FORMAT_VERSION, KEPT, DroppedExperts, KvCache, Manifest, Precision, StoredRole
from trt_build.ort.kernels import check_level, found_fault, is_usable
from trt_build.ort.planning.dropping import DropOptions, choose_dropping, dropping_notes
from trt_build.ort.planning.genai_config import genai_config
from trt_build.ort.planning.packed import packed_roles, sentences
from trt_build.source import open_source

logger = logging.getLogger(__name__)

CACHE_TOKENS = 2048  # of the text that the scales of int8 caches are found over


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The options of an engine for ONNX Runtime. If `experts_per_token` or `max_sequence` (tokens) is None, the
    checkpoint's value is used. `kernels` are the kernels that multiply quantised matrices; None takes those of
    `chosen_kernels`, and ONNX Runtime's for a model that moeship's do not compute. With `keep_all_experts` the engine
    has the experts that can never be chosen too. `recipe` is a recipe file, in place of the precision.
    `calibration` says by which method codes are found, and over which text. With `dropping` the engine does without
    experts that a text hardly uses. `kv_cache` int8: the engine can also be served with keys and values in int8."""

    checkpoint: str
    precision: str = "int4"
    provider: str = "cpu"
    experts_per_token: int | None = None
    max_sequence: int | None = None
    kernels: str | None = None
    keep_all_experts: bool = False
    recipe: Path | None = None
    calibration: Calibration = field(default_factory=Calibration)
    dropping: DropOptions | None = None
    kv_cache: str = FLOAT

    @property
    def int8_cache(self) -> bool:
        return self.kv_cache == INT8


@dataclass(frozen=True, kw_only=True)
class PreparedBuild:
    """A build whose options and checkpoint are checked and whose output is planned. `sources` has the state of the
    checkpoint's files before the gates were read. `routing` is the diagnosis of the gates, None for a dense model;
    `left_out` has the experts that the engine does without, by layer; `dropped` says which of them were dropped by
    their load, None if none were asked for."""

    options: EngineOptions
    provider: Provider
    recipe: Recipe
    checkpoint: Checkpoint
    model: Model
    settings: Settings
    max_sequence: int
    sources: Mapping[str, SourceFile]
    routing: RoutingReport | None
    left_out: Mapping[int, tuple[int, ...]]
    dropped: DroppedExperts | None
    export: ExportPlan

    def wanted_codes(self) -> dict[str, Wanted]:
        """The rows whose codes GPTQ solves."""
        stored = {job.source: job.storage for job in self.export.jobs if job.storage is not None}
        return {name: one for name, one in solvable(self.export.jobs).items() if stored[name].method == GPTQ}

    def work(self) -> Work:
        """What it takes to solve by GPTQ all codes that can be solved."""
        return work_of(self.model, solvable(self.export.jobs), self.options.calibration.most_tokens)

    def calibration_text(self) -> CalibrationText | None:
        """The text that codes are solved over; None if none are. Raises ConfigError for a text that cannot be used."""
        if not self.wanted_codes():
            return None
        return self.options.calibration.text(self.settings.tokenizer, self.model.architecture.max_positions)

    def cache_text(self) -> CalibrationText | None:
        """The text that the scales of int8 caches are found over; None without such caches, and where each position has
        its own. Raises ConfigError for a text that cannot be used."""
        if not self.options.int8_cache or self.provider.cache_scales == PER_POSITION:
            return None
        calibration = dataclasses.replace(self.options.calibration, num_tokens=CACHE_TOKENS)
        return calibration.text(self.settings.tokenizer, self.max_sequence)

    def planned_calibration(self) -> dict[str, Any] | None:
        """What engine.json will say of the codes that are solved; None if none are. Raises ConfigError for a text that
        cannot be used, unless a build would then search the codes."""
        try:
            text = self.calibration_text()
        except ConfigError:
            if not self.options.calibration.is_nobodys_wish:
                raise
            text = None
        return None if text is None else planned_record(self.model, self.wanted_codes(), text)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the engine for whoever builds it."""
        found = []
        if self.routing is not None:
            dead = left_out_by_layer(self.routing, self.model.architecture.router) if self.left_out else {}
            found += [left_out_note(self.routing, dead)] if dead else []
            found += dropping_notes(self.dropped, self.routing) if self.dropped is not None else []
        return (*found, *self.packed_notes())

    def packed_notes(self, records: Sequence[PartRecord] = ()) -> list[str]:
        """What becomes of packed weights; with the `records` of the written parts, at what error."""
        weights = self.model.weights
        return sentences(packed_roles(self.export.jobs, weights, records), weights.packed_labels())

    def genai_text(self) -> str:
        """The text of genai_config.json."""
        config = genai_config(self.model.architecture, self.max_sequence, self.settings.ids, self.provider)
        return json.dumps(config, indent=2) + "\n"

    def manifest(
        self,
        source: Source,
        files: Mapping[str, FileRecord],
        records: Sequence[PartRecord] = (),
        calibration: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """The contents of engine.json. `records` are those of the parts, once they are written; `calibration` says what
        codes were solved, None if none were."""
        architecture, cache_text = self.model.architecture, self.cache_text()
        kv_cache = None
        if self.options.int8_cache:
            kv_cache = KvCache(dtype=INT8, scales=self.provider.cache_scales)
        if kv_cache is not None and cache_text is not None:
            kv_cache = dataclasses.replace(kv_cache, text=dict(cache_text.record), tokens=cache_text.num_tokens)
        return Manifest(
            format_version=FORMAT_VERSION,
            model=Path(self.options.checkpoint).resolve().name,
            family=self.model.family.name,
            backend=ORT_BACKEND,
            provider=self.provider.name,
            kernels=self.provider.kernels,
            precision=_precision(self.recipe, self.export, self.model.weights),
            architecture=architecture,
            expert_order=self.provider.expert_order(architecture.num_experts),
            max_sequence=self.max_sequence,
            max_batch=1,
            tokenizer_size=self.settings.tokenizer.size,
            eos_token_ids=self.settings.ids.eos,
            tokenizer=self.settings.facts,
            source=source,
            packed=packed_roles(self.export.jobs, self.model.weights, records),
            routing=None if self.routing is None else self.routing.to_json(),
            left_out_experts={str(layer): experts for layer, experts in self.left_out.items()},
            libraries=libraries(),
            files=files,
            calibration=calibration,
            dropped_experts=self.dropped,
            kv_cache=kv_cache,
        )


def solvable(jobs: Sequence[WeightJob]) -> dict[str, Wanted]:
    """The rows that GPTQ can solve. A matrix keeps the codes that its checkpoint has of it, and of the embedding single
    rows are read, so that no errors meet."""
    found = {}
    for job in jobs:
        storage = job.storage
        if storage is not None and job.grid is None and job.role is not Role.EMBEDDING:
            found[job.source] = Wanted(
                bits=storage.bits, block_size=storage.block_size, symmetric=storage.symmetric,
                experts=tuple(sorted(job.expert_order)) if job.expert_order is not None else (0,),
                scaled_rows=job.scaled_rows, row_factor=job.row_factor,
            )  # fmt: skip
    return found


def check_options(options: EngineOptions) -> tuple[Provider, Recipe]:
    """The provider and the recipe that options name. Raises ExportError or QuantizationError for an unknown name,
    QuantizationError for a recipe file that cannot be read, and ConfigError for a method that is none or has no use."""
    kernels = options.kernels or chosen_kernels(options.provider, None if options.recipe else options.precision)
    provider = provider_of(options.provider, kernels)
    recipe = (
        recipe_for(options.precision, provider)
        if options.recipe is None
        else read_recipe_file(options.recipe, provider)
    )
    if options.kv_cache not in KV_CACHES:
        raise ConfigError(f"choosing how keys and values are stored: {unknown(options.kv_cache, KV_CACHES)}")
    method, calibration = options.calibration.chosen(), options.calibration
    if not recipe.quantises and (method or calibration.codes or calibration.num_tokens is not None):
        raise ConfigError(
            f"choosing the method: {recipe.name} stores every matrix as floats, found flags that say how codes are "
            "found; leave out --method, --calibrate, --calibrate-tokens and --codes, or choose another precision"
        )
    return provider, recipe if method is None else recipe.with_method(method)


def chosen_kernels(provider: str, precision: str | None) -> str:
    """The kernels to use if the options name none: moeship's if they support the provider and the precision (None: any
    of theirs) and can be used on this machine, else ONNX Runtime's. A precision that ONNX Runtime's do not have gets
    moeship's on any machine."""
    alone = provider in PROVIDERS and precision is not None and precision not in PROVIDERS[provider].precisions
    fit = _fit_own_kernels(provider, precision)
    return OWN_KERNELS if fit and (alone or is_usable()) else ONNX_RUNTIME


def _fit_own_kernels(provider: str, precision: str | None) -> bool:
    record = KERNELS[OWN_KERNELS].get(provider)
    return record is not None and (precision is None or precision in record.precisions)


def prepare_build(options: EngineOptions) -> PreparedBuild:
    """Open the checkpoint and plan the engine. Logs a warning if moeship's kernels would be chosen and cannot be used
    on this machine or do not compute this model.

    Raises the MoeshipError of the stage that failed.
    """
    provider, recipe = check_options(options)
    if provider.kernels == OWN_KERNELS:
        check_level()
    source = open_source(options.checkpoint, options.experts_per_token, options.max_sequence)
    sources = source_files(source.checkpoint)
    routing = source.model.routing_report()
    left_out = {} if options.keep_all_experts else left_out_by_layer(routing, source.model.architecture.router)
    dropping = None
    if options.dropping is not None:
        options.dropping.check(source.model, options.keep_all_experts)
        dropping = choose_dropping(source, options.dropping, left_out)
        left_out = left_out | dict(dropping.lacking)
    fault = found_fault()
    wanted = options.kernels is None and _fit_own_kernels(provider.name, None if options.recipe else options.precision)
    if fault and wanted and provider.kernels == ONNX_RUNTIME:
        logger.warning(
            "the engine is for ONNX Runtime's CPU kernels, which decode at two thirds of the speed of moeship's or "
            "less, because moeship's cannot be used here (%s); %s",
            fault.reason,
            fault.remedy,
        )

    table = source.model.weights.table.values()

    def planned() -> ExportPlan:
        if options.recipe is not None:
            recipe.for_model(table).check(table)
        return plan_export(
            source.model, recipe, provider,
            max_sequence=source.max_sequence, left_out=left_out, int8_cache=options.int8_cache,
        )  # fmt: skip

    try:
        export = planned()
    except KernelsError as error:
        if options.kernels is not None or provider.kernels == ONNX_RUNTIME:
            raise
        provider, recipe = check_options(dataclasses.replace(options, kernels=ONNX_RUNTIME))
        export = planned()
        logger.warning(
            "the engine is for ONNX Runtime's CPU kernels, because moeship's do not support this model (%s)", error
        )
    work = work_of(source.model, solvable(export.jobs), options.calibration.most_tokens)
    if options.calibration.is_open and recipe.default.method is None and 0 < work.products <= MOST_PRODUCTS:
        recipe = recipe.with_method(GPTQ)
        export = planned()
    return PreparedBuild(
        options=dataclasses.replace(options, kernels=provider.kernels),
        provider=provider,
        recipe=recipe,
        checkpoint=source.checkpoint,
        model=source.model,
        settings=source.settings,
        max_sequence=source.max_sequence,
        sources=sources,
        routing=routing,
        left_out=left_out,
        dropped=None if dropping is None else dropping.record(export, source.model),
        export=export,
    )


def stored_roles(jobs: Sequence[WeightJob], weights: Weights) -> dict[str, StoredRole]:
    """How the weights of each role are stored."""
    by_role: dict[str, list[WeightJob]] = {}
    for job in jobs:
        by_role.setdefault(str(job.role), []).append(job)
    return {role: _stored_role(own, weights) for role, own in by_role.items()}


def _precision(recipe: Recipe, export: ExportPlan, weights: Weights) -> Precision:
    return Precision(
        name=recipe.name,
        recipe=recipe.to_json(),
        roles=stored_roles(export.jobs, weights),
        accuracy_level=recipe.accuracy_level,
        average_bits_per_weight=_bits_per_weight(export.jobs, weights),
        search=SEARCH_VERSION,
    )


def _stored_role(jobs: Sequence[WeightJob], weights: Weights) -> StoredRole:
    stored = [job.storage for job in jobs if job.storage is not None]
    methods = {job.storage.method if job.grid is None else KEPT for job in jobs if job.storage is not None}
    return StoredRole(
        bits=tuple(sorted({storage.bits for storage in stored})),
        block_sizes=tuple(sorted({storage.block_size for storage in stored})),
        methods=tuple(sorted(methods)),
        bits_per_weight=_bits_per_weight(jobs, weights),
    )


def _bits_per_weight(jobs: Sequence[WeightJob], weights: Weights) -> float:
    """The bits of all that the jobs write, codes, scales, zero points and floats, for each weight."""
    num_weights = sum(job.num_weights(weights.table[job.source]) for job in jobs)
    num_bytes = sum(output.num_bytes for job in jobs for output in job.outputs)
    return round(8 * num_bytes / num_weights, 3)
