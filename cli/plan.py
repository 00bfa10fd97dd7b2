"""Say what an engine will contain and need before it is built: bytes, memory, and the speed that memory allows.

The configuration of a merge (a .yml) is explained instead: what it makes, what each expert loses of its training, which
experts no token can choose, and what the merge needs. `moeship merge` takes the same file.

With --target-rps R, --slo BOUNDS and --curves FILE the plan is of capacity: how many servers hold an objective at that
rate, from load tests of one server (`moeship bench --rate R,R,R --output FILE`).

Reads only headers and gates, and writes nothing. Decoding reads the weights that a token touches and the keys and
values before it, so bandwidth over those bytes bounds the tokens per second of one sequence. The flags are those of
moeship build: the same words plan the engine that they build.
Exit status: 0 done, 1 --max-batch-size sequences do not fit --device-memory, or no number of servers is enough, 2 wrong
input.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cli.plan_capacity import add_capacity_arguments, is_capacity, plan_servers
from cli.rows import print_rows
from export.errors import ConfigError, named
from export.files.reading import is_folder
from trt_build.backends import choose_backend
from trt_build.engine_flags import DEFAULT_PRECISION, add_engine_arguments, refuse_flags_of_others
from trt_build.manifest import BACKENDS


class _Default(str):
    """The value of a flag that was not given."""

    __slots__ = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(
        parser,
        output_help="accepted as in moeship build; a plan does not need it and writes nothing",
        output_required=False,
    )
    parser.set_defaults(backend=_Default(BACKENDS[0]), precision=_Default(DEFAULT_PRECISION))
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
    add_capacity_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Plan as the command line asks, and print the plan. Raises ConfigError for a number that is not above zero."""
    if is_capacity(arguments):
        if given := _given(arguments, shared=("target_rps", "slo", "curves", "percentile", "json")):
            raise ConfigError(f"planning capacity: it has no {given}, which plan an engine; leave them out here")
        return plan_servers(arguments)
    asked = arguments.checkpoint or arguments.checkpoint_flag or ""
    if Path(asked).suffix in (".yml", ".yaml") and not is_folder(Path(asked)):
        return _explain_merge(Path(asked), arguments)
    for name in ("max_batch_size", "device_memory", "bandwidth"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"planning: --{name.replace('_', '-')} is {value}, expected a number above 0")
    backend = choose_backend(arguments.backend)
    refuse_flags_of_others(arguments, shared=("max_batch_size",))
    planned = backend.plan(arguments)
    if arguments.json:
        print(json.dumps(planned.values, indent=2))
    else:
        for heading, rows in planned.tables:
            print_rows(heading, rows)
    if arguments.device_memory is None or arguments.max_batch_size is None or planned.num_sequences is None:
        return 0
    return int(planned.num_sequences < arguments.max_batch_size)


def _explain_merge(path: Path, arguments: argparse.Namespace) -> int:
    """Print what a merge would make and need. Raises ConfigError for flags that describe an engine."""
    from export.merge.config import read_merge_config
    from export.merge.explain import explain_merge

    if flags := _given(arguments, shared=("checkpoint", "checkpoint_flag", "json")):
        raise ConfigError(
            f"planning the merge {named(path)}: a merge has no {flags}, which moeship plan takes for a checkpoint; "
            "leave it out here, merge, and plan the merged folder with it"
        )
    explanation = explain_merge(read_merge_config(path))
    if arguments.json:
        print(json.dumps(explanation.to_json(), indent=2))
    else:
        for heading, rows in explanation.tables():
            print_rows(heading, rows)
    return 0


def _given(arguments: argparse.Namespace, shared: tuple[str, ...]) -> str:
    """The flags that were given, apart from some."""
    given = [
        name
        for name, value in vars(arguments).items()
        if name not in shared and value is not None and value is not False and not isinstance(value, _Default)
    ]
    return ", ".join("CHECKPOINT" if name == "checkpoint" else f"--{name.replace('_', '-')}" for name in given)
