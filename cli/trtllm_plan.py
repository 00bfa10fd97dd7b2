"""Prints the plan of a TensorRT-LLM engine for `moeship plan`: its ranks, and the GPU memory that they leave free."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.rows import Rows, in_units, print_rows

if TYPE_CHECKING:
    from trt_build.trtllm.options import TrtllmOptions
    from trt_build.trtllm.plan import TrtllmPlan

GB = 1e9


def run_trtllm_plan(arguments: argparse.Namespace, checkpoint: str) -> int:
    """Print the plan of an engine. Returns 1 if --max-batch-size sequences do not fit --device-memory, the memory of
    one GPU. Raises EngineError for a flag that does not apply to GPUs."""
    from dataclasses import replace

    from trt_build.errors import EngineError
    from trt_build.trtllm.build import build_trtllm
    from trt_build.trtllm.command import read_trtllm_options

    if arguments.measure_bandwidth:
        raise EngineError(
            "reading the flags: --measure-bandwidth: it measures this machine's memory, and the engine is in a GPU's "
            "memory; give the GPU's rate with --bandwidth"
        )
    options = replace(read_trtllm_options(arguments, checkpoint, arguments.output or Path("engine")), until="plan")
    plan = build_trtllm(options).plan
    machine = _machine(arguments, plan, options)
    if arguments.json:
        print(json.dumps({**plan.to_json(), **machine}, indent=2))
    else:
        _print(checkpoint, plan, machine)
    asked = arguments.device_memory is not None and arguments.max_batch_size is not None
    return int(asked and machine["sequences"] < arguments.max_batch_size)


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


def _print(checkpoint: str, plan: TrtllmPlan, machine: dict[str, Any]) -> None:
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
    ]
    print_rows(f"{checkpoint} as {plan.precision} for TensorRT-LLM", rows)
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
    print_rows(f"decoding one sequence of up to {plan.max_sequence} tokens", decoding)
