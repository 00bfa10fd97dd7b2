"""Say what an engine will contain and need before it is built: bytes, memory, and the speed that memory allows.

Reads only headers and gates, and writes nothing. Decoding reads the weights that a token touches and the keys and
values before it, so bandwidth over those bytes bounds the tokens per second of one sequence. The flags are those of
moeship build: the same words plan the engine that they build.
Exit status: 0 done, 1 --max-batch-size sequences do not fit --device-memory, 2 wrong input.
"""

from __future__ import annotations

import argparse
import json
import logging
from typing import TYPE_CHECKING, Any

from cli.rows import Rows, in_units, print_rows
from cli.trtllm_plan import run_trtllm_plan
from export.provider import named_with_kernels
from trt_build.engine_flags import add_engine_arguments, read_checkpoint, read_engine_options
from trt_build.manifest import TRTLLM_BACKEND
from trt_build.trtllm_flags import refuse_trtllm_flags

if TYPE_CHECKING:
    from trt_build.plan import EnginePlan

logger = logging.getLogger(__name__)

GB = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(
        parser,
        output_help="accepted as in moeship build; a plan does not need it and writes nothing",
        output_required=False,
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device-memory", type=float, metavar="GB",
        help="memory for weights, keys and values (default for cpu: what this machine has available)",
    )  # fmt: skip
    speed = machine.add_mutually_exclusive_group()
    speed.add_argument("--bandwidth", type=float, metavar="GB/S", help="rate at which the device reads its memory")
    speed.add_argument(
        "--measure-bandwidth", action="store_true",
        help="measure that rate on this machine, with a buffer of 4 GB; takes about ten seconds",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from trt_build.plan import plan_engine
    from trt_build.prepare import prepare_build

    _check(arguments)
    if arguments.backend == TRTLLM_BACKEND:
        return run_trtllm_plan(arguments, read_checkpoint(arguments))
    refuse_trtllm_flags(arguments, allowed=("max_batch_size",))
    options = read_engine_options(arguments)
    plan = plan_engine(prepare_build(options))
    machine = _machine(arguments, plan)
    if arguments.json:
        print(json.dumps({**plan.to_json(), **machine}, indent=2))
    else:
        _print_plan(options.checkpoint, plan, machine)
    asked = arguments.device_memory is not None and arguments.max_batch_size is not None
    return int(asked and machine["sequences"] < arguments.max_batch_size)


def _check(arguments: argparse.Namespace) -> None:
    """Check the flags. Raises ConfigError for a number that is not above zero."""
    from export.errors import ConfigError

    for name in ("max_batch_size", "device_memory", "bandwidth"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"planning: --{name.replace('_', '-')} is {value}, expected a number above 0")


def _machine(arguments: argparse.Namespace, plan: EnginePlan) -> dict[str, Any]:
    """The figures that follow from a plan and the machine's memory and bandwidth; None for unknown figures."""
    from trt_build.machine.bandwidth import measure_read_bandwidth
    from trt_build.machine.memory import available_memory

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


def _print_plan(checkpoint: str, plan: EnginePlan, machine: dict[str, Any]) -> None:
    print_rows(
        f"{checkpoint} as {plan.precision} for {named_with_kernels(plan.provider, plan.kernels)}", _role_rows(plan)
    )
    print_rows("engine", _engine_rows(plan))
    print_rows("notes", [("", note) for note in plan.notes])
    print_rows(f"decoding one sequence of up to {plan.max_sequence} tokens", _decoding_rows(plan, machine))
    if machine["device_memory_bytes"] is not None:
        print_rows(f"in {in_units(machine['device_memory_bytes'])} of memory", _memory_rows(plan, machine))


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
    ]


def _decoding_rows(plan: EnginePlan, machine: dict[str, Any]) -> Rows:
    rows = [
        ("weights read per token", in_units(plan.weights_bytes_per_token)),
        ("keys and values of a token", in_units(plan.kv_bytes_per_token)),
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
