"""Decode and prefill on the CPU, side by side: our engine, llama.cpp, ik_llama.cpp, transformers.

    python benchmarks/cpu_decode.py --engine ENGINE --gguf CACHE [--rounds 5] [--contenders ours,llama-q4_0,...]
    python benchmarks/cpu_decode.py --plot benchmarks/results/cpu_decode-NAME.json
    python benchmarks/cpu_decode.py --check --gguf CACHE

llama.cpp runs a Mixtral, Qwen3-MoE, OLMoE, Granite-MoE or gpt-oss of the engine's own shape. It has no phixtral: it,
ik_llama.cpp and transformers run a Mixtral with as many weights, in all and for one token, which is shaped after the
engine (decode/shape.py). The model is written as GGUF with random weights into the cache folder, and quantised by
llama.cpp's own quantiser; ik_llama.cpp reads the same files. Each turn is a process of its own, and
nothing else runs meanwhile. The result is rewritten after every round. `--check` compares the logits of both with
transformers' on a small such model instead.

Needs the extra `bench`. Exit status 0 done, 1 a contender failed or the check did, 2 wrong input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from decode import machine
from decode.entrants import NAMES, USUAL, Entrant, prepare
from decode.plot import draw
from decode.results import FORMAT_VERSION, assemble, table
from decode.rounds import Record, run_rounds
from decode.worker import Lengths
from export.architecture import Architecture
from export.checkpoint.folder import read_json
from export.command import run_command
from export.errors import ConfigError, MoeshipError
from export.files.output import replace_file
from synthetic_checkpoint import PHIXTRAL
from trt_build.machine.bandwidth import NUM_BYTES
from trt_build.ort.engine import open_engine

RESULTS = Path(__file__).resolve().parent / "results"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a run. If `engine` is None, the other contenders get the shape of phixtral-4x2_8 with `layers`
    layers. `threads` None uses every core."""

    gguf: Path
    engine: Path | None = None
    contenders: tuple[str, ...] = USUAL
    rounds: int = 5
    threads: int | None = None
    layers: int | None = None
    scaled_layers: int = 8
    output: Path | None = None
    bandwidth_bytes: int = NUM_BYTES


def benchmark(options: Options) -> int:
    """Run the benchmark, write the result and the picture, print the table; returns 1 if a contender failed."""
    if options.rounds < 1:
        raise ConfigError(f"benchmarking: found {options.rounds} rounds, expected at least one")
    threads = options.threads or len(os.sched_getaffinity(0))
    about = _about(options, threads)
    lengths = Lengths()
    entrants, refused = _prepare(options)
    path = options.output or RESULTS / f"cpu_decode-{machine.slug(about['machine'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}

    def keep(records: list[Record], bandwidths: list[dict[str, float]]) -> None:
        nonlocal result
        result = assemble(about, lengths, records, refused, bandwidths)
        replace_file(path, json.dumps(result, indent=2) + "\n")

    run_rounds(entrants, lengths, threads, options.rounds, options.bandwidth_bytes, keep)
    if result["contenders"]:
        draw(result, path.with_suffix(".svg"))
    print(table(result))
    logger.info("written: %s", path)
    return 1 if result["not_run"] else 0


def _about(options: Options, threads: int) -> dict[str, Any]:
    facts = _facts(options)
    name = "phixtral-4x2_8" if replace(facts, num_layers=PHIXTRAL.num_layers) == PHIXTRAL else facts.family
    if facts.num_layers != PHIXTRAL.num_layers:
        name = f"{name}, {facts.num_layers} layers"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "threads": threads,
        "model": {"name": name, **dataclasses.asdict(facts)},
    }


def _facts(options: Options) -> Architecture:
    if options.engine is None:
        return replace(PHIXTRAL, num_layers=options.layers or PHIXTRAL.num_layers)
    facts = open_engine(options.engine, check_digests=False).manifest.architecture
    if options.layers not in (None, facts.num_layers):
        raise ConfigError(
            f"shaping the other models: --layers is {options.layers}, the engine {options.engine} has "
            f"{facts.num_layers}; leave --layers out, they are shaped after the engine"
        )
    return facts


def _prepare(options: Options) -> tuple[list[Entrant], dict[str, str]]:
    """The contenders that can run, and for each other contender the reason why it cannot. Raises the first reason if no
    contender can run."""
    facts = _facts(options)
    entrants, refused = [], {}
    problem: MoeshipError | None = None
    for name in options.contenders:
        try:
            entrants.append(prepare(name, options.engine, facts, options.gguf, options.scaled_layers))
        except MoeshipError as error:
            problem = problem or error
            refused[name] = str(error)
            logger.info("%s is left out: %s", name, error)
    if problem is not None and not entrants:
        raise problem
    return entrants, refused


def redraw(path: Path) -> int:
    """Draw the picture of a stored result again and print its table."""
    result = read_json(path, "result file of this benchmark")
    kind = (result.get("benchmark"), result.get("format_version"))
    if kind != ("cpu_decode", FORMAT_VERSION):
        raise ConfigError(
            f"reading {path}: found benchmark {kind[0]!r} of format {kind[1]!r}, expected 'cpu_decode' of format "
            f"{FORMAT_VERSION}; name a result that this version wrote"
        )
    draw(result, path.with_suffix(".svg"))
    print(table(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, metavar="DIR", help="our engine; the other models are shaped after it")
    parser.add_argument("--gguf", type=Path, metavar="DIR", help="folder that keeps the written GGUF files")
    parser.add_argument("--contenders", type=lambda text: tuple(text.split(",")), default=USUAL, metavar="A,B",
                        help=f"of {','.join(NAMES)} (default: all but the last)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=Options.rounds, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="default: every core")
    parser.add_argument("--layers", type=int, metavar="N", help="without --engine: layers of the model, for small runs")
    parser.add_argument("--scaled-layers", type=int, default=Options.scaled_layers, metavar="N",
                        help="layers of a model that does not fit in memory whole (default: %(default)s)")  # fmt: skip
    parser.add_argument("--bandwidth-bytes", type=int, default=Options.bandwidth_bytes, metavar="N",
                        help="size of the buffer for measuring bandwidth (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: benchmarks/results/cpu_decode-NAME.json")
    parser.add_argument("--plot", type=Path, metavar="RESULT", help="only draw the picture of a stored result again")
    parser.add_argument("--check", action="store_true", help="only compare the logits with those of transformers")
    return parser


def main() -> int:
    parser = _parser()
    arguments = vars(parser.parse_args())
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for ours in (logger, logging.getLogger("decode")):
        ours.setLevel(logging.INFO)
    plot, check = arguments.pop("plot"), arguments.pop("check")

    def run() -> int:
        if plot is not None:
            return redraw(plot)
        if arguments["gguf"] is None:
            raise ConfigError("benchmarking: no folder for the GGUF files; name one with --gguf")
        if check:
            from decode.check import check_peer

            return check_peer(arguments["gguf"])
        return benchmark(Options(**arguments))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
