"""Builds and plans TensorRT-LLM engines as the command line asks (`trt_build/trtllm_flags.py`), and describes them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.conversion.writer import Progress
from export.errors import listing
from export.rows import Rows, in_units
from export.trtllm.checkpoint import differing_settings, options_of, plan_checkpoint
from trt_build.calibration import method_rows
from trt_build.comparison.cost.measuring import CostOptions
from trt_build.comparison.evaluation_text import EvaluationText
from trt_build.comparison.verified import Verified
from trt_build.engine_flags import read_calibration, read_checkpoint
from trt_build.errors import EngineError, LibraryMissing
from trt_build.machine.readings import read_machine
from trt_build.manifest import MANIFEST_FILE
from trt_build.results import Built, Planned
from trt_build.source import open_source, with_built_experts
from trt_build.trtllm.build import Outcome, build_trtllm
from trt_build.trtllm.engine import open_trtllm_engine
from trt_build.trtllm.library import Library, find_library
from trt_build.trtllm.options import TrtllmOptions
from trt_build.trtllm.plan import TrtllmPlan
from trt_build.trtllm.questions.logits import GENERATION_LIMITS
from trt_build.trtllm.questions.weights import RankFolder
from trt_build.trtllm.verify import LIMITS, record_trtllm, verify_trtllm
from trt_build.trtllm_flags import STAGES

GB = 1e9
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrtllmOptions)}


def build(arguments: argparse.Namespace, progress: Callable[[Progress], None] | None) -> Built:
    """Run the stages of a build. `failure` of the result names each figure of the comparison that is past its limit."""
    options = read_trtllm_options(arguments, arguments.output)
    outcome = build_trtllm(options, progress)
    failures = outcome.verification.failures if outcome.verification is not None else ()
    problem = (
        f"verifying {options.output} ({options.precision}): {'; '.join(failures)}; the result is in its engine.json"
    )
    return Built(
        text=_summary(outcome, options), json_text=f"{_json(outcome)}\n", failure=problem if failures else None
    )


def verify(
    folder: Path,
    location: str,
    rank_folder: Path | None,
    text: EvaluationText,
    num_tokens: int,
    progress: Callable[[str], None],
    cost: CostOptions | None = None,
) -> Verified:
    """Verify an engine against the checkpoint at `location`. `rank_folder` holds the rank files that it was built from
    (None: beside the engine). With `cost` the cost of the quantiser is told apart by layer, role and expert. Raises
    EngineError for another model's checkpoint, and LibraryMissing where TensorRT-LLM or a GPU is missing."""
    engine = open_trtllm_engine(folder)
    manifest = engine.manifest
    facts = manifest.architecture
    source = open_source(location, None, manifest.max_sequence)
    model, findings = with_built_experts(source.model, facts)
    source = dataclasses.replace(source, model=model)
    options = options_of(manifest.settings.get("checkpoint") or {})
    planned = plan_checkpoint(source.model, options)
    different = differing_settings(manifest.settings.get("checkpoint"), planned)
    if source.model.architecture != facts or different:
        raise EngineError(
            f"verifying {folder} against {source.checkpoint.identity}: they are not the same model; name the "
            f"checkpoint that the engine was built from{listing(different) if different else ''}"
        )
    library = find_library(read_machine())
    if not isinstance(library, Library):
        raise LibraryMissing(f"verifying {folder} needs TensorRT-LLM and a GPU: {'; '.join(library)}")
    beside = folder.resolve().with_name(f"{folder.resolve().name}.checkpoint")
    ranks = RankFolder(plan=planned, folder=rank_folder or beside, max_sequence=manifest.max_sequence)
    found = verify_trtllm(engine, source, ranks, library.python, text, num_tokens, progress, cost=cost)
    found = dataclasses.replace(found, findings=(*findings, *found.findings))
    return Verified(
        verification=found,
        precision=manifest.precision.name,
        limits=LIMITS[manifest.precision.name],
        serving_limits=GENERATION_LIMITS[manifest.precision.dtype],
        record=lambda: record_trtllm(engine, found),
    )


def plan(arguments: argparse.Namespace) -> Planned:
    """Plan an engine, and compute what follows from the memory and bandwidth of one GPU. Raises EngineError for a flag
    that does not apply to GPUs."""
    if arguments.measure_bandwidth:
        raise EngineError(
            "reading the flags: --measure-bandwidth: it measures this machine's memory, and the engine is in a GPU's "
            "memory; give the GPU's rate with --bandwidth"
        )
    options = read_trtllm_options(arguments, arguments.output or Path("engine"))
    options = dataclasses.replace(options, until=STAGES[0])
    found = build_trtllm(options).plan
    machine = _machine(arguments, found, options)
    return Planned(
        values={**found.to_json(), **machine},
        tables=_tables(options.checkpoint, found, machine),
        num_sequences=machine["sequences"],
    )


def read_trtllm_options(arguments: argparse.Namespace, output: Path) -> TrtllmOptions:
    """The options that the command line gives. A flag that is missing keeps the default of TrtllmOptions."""
    values = {
        name: getattr(arguments, name)
        for name in _DEFAULTS
        if getattr(arguments, name, None) is not None and name not in ("checkpoint", "output", "max_seq_len")
    }
    values["calibration"] = read_calibration(arguments)
    return TrtllmOptions(
        checkpoint=read_checkpoint(arguments), output=output, max_seq_len=arguments.max_sequence, **values
    )


def _json(outcome: Outcome) -> str:
    engine, checkpoint = outcome.engine, outcome.checkpoint
    return json.dumps(
        {
            "plan": outcome.plan.to_json(),
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "engine": None
            if engine is None
            else json.loads((engine.folder / MANIFEST_FILE).read_text(encoding="utf-8")),
        },
        indent=2,
    )


def _summary(outcome: Outcome, options: TrtllmOptions) -> str:
    lines = plan_lines(outcome.plan)
    if outcome.checkpoint is not None:
        lines.append(f"{outcome.checkpoint}: written")
    if outcome.engine is not None:
        manifest = outcome.engine.manifest
        lines.append(
            f"{outcome.engine.folder}: {outcome.engine.num_bytes / 1e6:.1f} MB for {manifest.gpu.name or 'a GPU'}, "
            f"batches of {manifest.max_batch}, context {manifest.max_sequence} tokens"
        )
    if outcome.verification is not None:
        report = outcome.verification.report
        lines.append(
            f"against the reference: mean KL {report.mean_kl:.2e} scored and {report.mean_decoded_kl:.2e} decoded, "
            f"99 % of {report.num_tokens} tokens below {report.p99_kl:.2e}, the largest {report.max_kl:.2e}; top-1 "
            f"{report.top1_agreement:.1%}, perplexity {report.perplexity_increase:+.2%}"
        )
        lines += [f"finding: {text}" for text in outcome.verification.findings]
    elif options.until == STAGES[-1]:
        lines.append("not compared with the reference")
    return "\n".join(lines)


def plan_lines(plan: TrtllmPlan) -> list[str]:
    """The lines that describe a planned engine."""
    ranks = f"{len(plan.rank_bytes)} rank(s) of up to {plan.largest_rank_bytes / 1e6:.1f} MB"
    return [
        f"{plan.family} {plan.precision} ({plan.quant_algo or plan.dtype}): {ranks}, "
        f"{plan.average_bits_per_weight:.2f} bits per weight",
        f"keys and values {plan.kv_bytes_per_token / 1e3:.1f} kB a token and rank, context {plan.max_sequence} tokens; "
        f"writing the checkpoint takes up to {plan.conversion_bytes / 1e6:.0f} MB of memory",
    ]


def _machine(arguments: argparse.Namespace, plan: TrtllmPlan, options: TrtllmOptions) -> dict[str, Any]:
    memory = arguments.device_memory and round(arguments.device_memory * GB)
    bandwidth = arguments.bandwidth and arguments.bandwidth * GB
    # The ranks of a pipeline stage read at the same time, the stages one after the other.
    read_in_turn = plan.weights_bytes_per_token / plan.parallel["tp_size"]
    return {
        "device_memory_bytes": memory,
        "kv_cache_fraction": options.kv_cache_fraction,
        "max_batch_size": arguments.max_batch_size,
        "sequences": None if memory is None else plan.sequences_in(memory, options.kv_cache_fraction),
        "bandwidth_bytes_per_s": bandwidth,
        "tokens_per_s_at_start": bandwidth and bandwidth / read_in_turn,
    }


def _tables(checkpoint: str, plan: TrtllmPlan, machine: dict[str, Any]) -> list[tuple[str, Rows]]:
    shares = ", ".join(f"{name} {plan.parallel[name]}" for name in ("tp_size", "pp_size", "moe_tp_size", "moe_ep_size"))
    groups = f" in groups of {plan.group_size}" if plan.group_size else ""
    rows: Rows = [
        ("network", f"{plan.architecture}, {plan.quant_algo or plan.dtype}{groups}"),
        ("shared out", shares),
        ("bits per weight", f"{plan.average_bits_per_weight:.2f}"),
        ("rank files", f"{sum(plan.rank_bytes):,} bytes, {plan.largest_rank_bytes:,} the largest"),
        (
            "making them",
            f"reads {in_units(plan.source_bytes)}, holds up to {in_units(plan.conversion_bytes)} of memory",
        ),
        *method_rows(plan.gptq, solves=plan.is_calibrated),
    ]
    decoding: Rows = [
        ("weights read per token", f"{in_units(plan.weights_bytes_per_token)}, all ranks together"),
        ("keys and values of a token", f"{in_units(plan.kv_bytes_per_token)} a rank"),
    ]
    if machine["tokens_per_s_at_start"] is not None:
        rate = in_units(round(machine["bandwidth_bytes_per_s"]))
        decoding.append(("tokens per second, at most", f"{machine['tokens_per_s_at_start']:.1f} at {rate}/s a GPU"))
    if machine["sequences"] is not None:
        decoding.append(
            (
                "sequences beside the weights",
                f"{machine['sequences']} of {plan.max_sequence} tokens in {in_units(machine['device_memory_bytes'])}, "
                f"{machine['kv_cache_fraction']:.0%} of what is left, activations not counted",
            )
        )
    return [
        (f"{checkpoint} as {plan.precision} for TensorRT-LLM", rows),
        (f"decoding one sequence of up to {plan.max_sequence} tokens", decoding),
    ]
