"""Builds and plans engines for ONNX Runtime as the command line asks, and describes them."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from export.checkpoint.folder import open_checkpoint
from export.conversion.writer import Progress
from export.errors import ConfigError
from export.families import read_model
from export.provider import FLOAT, INT8, named_with_kernels
from export.rows import Rows, in_units
from trt_build.calibration import duration, method_rows
from trt_build.engine_flags import DEFAULT_PROVIDER, read_calibration, read_checkpoint
from trt_build.machine.bandwidth import measure_read_bandwidth
from trt_build.machine.memory import available_memory
from trt_build.manifest import MANIFEST_FILE
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import Engine
from trt_build.ort.planning.dropping import DropOptions
from trt_build.ort.planning.plan import EnginePlan, plan_engine
from trt_build.ort.planning.prepare import EngineOptions, prepare_build
from trt_build.ort.questions.weights import ask_about_weights
from trt_build.results import Built, Planned

logger = logging.getLogger(__name__)

GB = 1e9


def build(arguments: argparse.Namespace, progress: Callable[[Progress], None] | None) -> Built:
    """Build an engine, and ask whether its weights are the checkpoint's. Raises what `read_checkpoint` and
    `build_engine` raise."""
    options = _read_options(arguments)
    engine = build_engine(BuildOptions(output=arguments.output, **vars(options)), progress)
    return Built(
        text=_summary(engine),
        json_text=(engine.folder / MANIFEST_FILE).read_text(encoding="utf-8"),
        failure=None if arguments.unchecked else _fault_of_weights(engine, options),
    )


def _fault_of_weights(engine: Engine, options: EngineOptions) -> str | None:
    """What of a built engine's weights is not the checkpoint's; None if nothing is."""
    start = time.monotonic()
    model = read_model(open_checkpoint(options.checkpoint), options.experts_per_token)
    answer = ask_about_weights(engine, model)
    seconds = time.monotonic() - start
    logger.info("compared the %s stored weights with the checkpoint's in %.1f s",
                f"{answer.figures['num_weights']:,}", seconds)  # fmt: skip
    if answer.passed:
        return None
    return f"building {engine.folder}: its weights are not those of {options.checkpoint}: {'; '.join(answer.failures)}"


def plan(arguments: argparse.Namespace) -> Planned:
    """Plan an engine, and compute what follows from the machine's memory and bandwidth."""
    options = _read_options(arguments)
    found = plan_engine(prepare_build(options))
    machine = _machine(arguments, found)
    tables = [
        (f"{options.checkpoint} as {found.precision} for {named_with_kernels(found.provider, found.kernels)}",
         _role_rows(found)),
        ("stored as", [(name, role.words) for name, role in found.stored.items()]),
        ("engine", _engine_rows(found)),
        ("notes", [("", note) for note in found.notes]),
        (f"decoding one sequence of up to {found.max_sequence} tokens", _decoding_rows(found, machine)),
    ]  # fmt: skip
    if machine["device_memory_bytes"] is not None:
        tables.append((f"in {in_units(machine['device_memory_bytes'])} of memory", _memory_rows(found, machine)))
    return Planned(values={**found.to_json(), **machine}, tables=tables, num_sequences=machine["sequences"])


def _read_options(arguments: argparse.Namespace) -> EngineOptions:
    return EngineOptions(
        checkpoint=read_checkpoint(arguments),
        precision=arguments.precision,
        provider=arguments.provider or DEFAULT_PROVIDER,
        experts_per_token=arguments.experts_per_token,
        max_sequence=arguments.max_sequence,
        kernels=arguments.kernels,
        recipe=arguments.recipe,
        calibration=read_calibration(arguments),
        keep_all_experts=arguments.keep_all_experts,
        dropping=_read_dropping(arguments),
        kv_cache=arguments.kv or FLOAT,
    )


def _read_dropping(arguments: argparse.Namespace) -> DropOptions | None:
    """What the flags say of dropping experts. Raises ConfigError for flags that mean nothing without --drop-below."""
    if arguments.drop_below is not None:
        texts = tuple(arguments.text or ())
        return DropOptions(below=arguments.drop_below, texts=texts, num_tokens=arguments.drop_tokens)
    given = [f"--{name}" for name in ("text", "drop-tokens") if getattr(arguments, name.replace("-", "_")) is not None]
    if given:
        raise ConfigError(
            f"reading the flags: {' and '.join(given)} {'belong' if len(given) > 1 else 'belongs'} to --drop-below; "
            f"name that, or leave {'them' if len(given) > 1 else 'it'} out"
        )
    return None


def _summary(engine: Engine) -> str:
    manifest = engine.manifest
    return (
        f"{engine.folder}: {manifest.family} {manifest.precision.name} for "
        f"{named_with_kernels(manifest.provider, manifest.kernels)}, "
        f"{engine.num_bytes / 1e6:.1f} MB, {manifest.precision.average_bits_per_weight:.2f} bits per weight, "
        f"context {manifest.max_sequence} tokens"
    )


def describe(engine: Engine) -> list[tuple[str, Rows]]:
    """Tables that describe an engine: what it is, how each role is stored, and its recipe."""
    manifest = engine.manifest
    facts, precision, cache = manifest.architecture, manifest.precision, manifest.kv_cache
    experts = f", {facts.num_experts} experts, {facts.experts_per_token} per token" if facts.is_moe else ""
    rows = [
        ("model", f"{manifest.model}, {manifest.family} of {facts.num_layers} layers{experts}"),
        ("precision", precision.name),
        ("kernels", named_with_kernels(manifest.provider, manifest.kernels)),
        ("size", f"{in_units(engine.num_bytes)}, {precision.average_bits_per_weight:.2f} bits per weight"),
        ("context", f"{manifest.max_sequence} tokens"),
        ("keys and values", "float" if cache is None else f"float, or {cache.dtype} with scales {cache.scales}"),
    ]
    stored = [
        (name, role.words + ("" if role.bits_per_weight is None else f": {role.bits_per_weight:.2f} bits per weight"))
        for name, role in precision.roles.items()
    ]
    recipe = manifest.recipe().to_json()
    rules = [("default", _in_words(recipe["default"])), *(("rule", _in_words(one)) for one in recipe.get("rules", ()))]
    return [(str(engine.folder), rows), ("by role, as stored", stored), (f"recipe {recipe['name']}", rules)]


def _in_words(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in values.items()
    )


def _machine(arguments: argparse.Namespace, plan: EnginePlan) -> dict[str, Any]:
    """The figures that follow from a plan and the machine's memory and bandwidth; None for unknown figures."""
    memory = arguments.device_memory and round(arguments.device_memory * GB)
    if memory is None and plan.provider == "cpu":
        memory = available_memory()
    bandwidth = arguments.bandwidth and arguments.bandwidth * GB
    if arguments.measure_bandwidth:
        logger.info("measuring how fast this machine reads its memory, with a buffer of 4 GB: about ten seconds")
        bandwidth = measure_read_bandwidth()
    return {
        "device_memory_bytes": memory,
        "max_batch_size": arguments.max_batch_size,
        "sequences": None if memory is None else max(0, plan.sequences_in(memory)),
        "longest_sequence": None if memory is None else max(0, plan.tokens_in(memory)),
        "bandwidth_bytes_per_s": bandwidth,
        "tokens_per_s_at_start": bandwidth and bandwidth / plan.bytes_per_token(0),
        "tokens_per_s_at_end": bandwidth and bandwidth / plan.bytes_per_token(plan.max_sequence - 1),
    }


def _role_rows(plan: EnginePlan) -> Rows:
    headings = "".join(f"{name:>12}" for name in ("codes", "scales", "plain", "together"))
    rows = [("role", f"{'weights':>15}{headings}{'bits':>7}{'per token':>12}")]
    for name, role in sorted(plan.roles.items(), key=lambda item: -item[1].total_bytes):
        parts = (role.codes_bytes, role.scales_bytes, role.plain_bytes, role.total_bytes)
        sizes = "".join(f"{in_units(size) if size else '-':>12}" for size in parts)
        bits = 8 * role.total_bytes / role.num_weights
        rows.append((name, f"{role.num_weights:>15,}{sizes}{bits:>7.2f}{in_units(role.bytes_per_token):>12}"))
    return rows


def _engine_rows(plan: EnginePlan) -> Rows:
    return [
        ("weights", f"{plan.weights_bytes:,} bytes, {plan.average_bits_per_weight:.2f} bits per weight"),
        ("all files", f"{plan.engine_bytes:,} bytes"),
        ("making it", f"reads {in_units(plan.source_bytes)}, holds up to {in_units(plan.conversion_bytes)} of memory"),
        *method_rows(plan.gptq, solves=plan.is_calibrated),
        *_cache_rows(plan),
    ]


def _cache_rows(plan: EnginePlan) -> Rows:
    """What caches in int8 take."""
    if plan.kv_cache != INT8:
        return []
    if not plan.cache_seconds:
        return [("int8 caches", "a scale for each position, found as it is written")]
    return [("int8 caches", f"scales by running the engine over a text: {duration(plan.cache_seconds)} of one core")]


def _decoding_rows(plan: EnginePlan, machine: dict[str, Any]) -> Rows:
    rows = [
        ("weights read per token", in_units(plan.weights_bytes_per_token)),
        ("keys and values of a token", f"{in_units(plan.kv_bytes_per_token)} in {plan.kv_cache}"),
        ("read for the last token", in_units(plan.bytes_per_token(plan.max_sequence - 1))),
    ]
    if machine["bandwidth_bytes_per_s"] is not None:
        first, last = machine["tokens_per_s_at_start"], machine["tokens_per_s_at_end"]
        rate = in_units(round(machine["bandwidth_bytes_per_s"]))
        rows.append(("tokens per second, at most", f"{first:.1f} for the first, {last:.1f} for the last, at {rate}/s"))
    return rows


def _memory_rows(plan: EnginePlan, machine: dict[str, Any]) -> Rows:
    fits = f"{machine['sequences']} of {plan.max_sequence} tokens, {in_units(plan.sequence_bytes)} each"
    if machine["max_batch_size"] is not None:
        short = machine["sequences"] < machine["max_batch_size"]
        fits += f"; {machine['max_batch_size']} asked: {'they do not fit' if short else 'they fit'}"
    rows = [("sequences beside the weights", fits)]
    if not machine["sequences"]:
        longest = machine["longest_sequence"]
        rows.append(("longest sequence that fits", f"{longest} tokens" if longest else "none, the weights do not fit"))
    return rows
