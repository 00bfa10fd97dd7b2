"""Decoding of runtimes that stay loaded, side by side in short turns.

    python benchmarks/decode_turns.py --engine ENGINE --gguf CACHE --output benchmarks/results/decode_turns-NAME.json
    python benchmarks/decode_turns.py --like qwen3-30b-a3b --layers 3 --gguf CACHE
    python benchmarks/decode_turns.py --table benchmarks/results/decode_turns-NAME.json

On a machine that shares its memory with others the read bandwidth can change by half within seconds. A turn of a
minute, as in cpu_decode.py, can then meet fast memory with one contender and slow memory with the next. Here each
contender is a process that keeps its model and is stopped (SIGSTOP) while another decodes. A round waits a minute at
most for other programs to leave the cores idle. Then each contender decodes 16 tokens, so all contenders of a round
meet nearly the same memory. The figures are medians over rounds: of the rates, of the ratios to the first contender in
the same round, and of the shares of the bandwidth of the same round.

`--like` measures a published model's shape by some of its layers: a checkpoint with random weights is written into the
cache folder, built to an engine beside it, and removed. `--layers` of the model's layers get the same share of its
vocabulary, so that the head keeps its share of a token. What a step costs besides its layers, a few hundredths of a
millisecond, weighs more than in the whole model.

llama.cpp and ik_llama.cpp run the model of cpu_decode.py without flash attention, and ik_llama.cpp repacks its weights
when it loads them: in cpu_decode.py's trials on an EPYC these settings decoded fastest after 1024 tokens. Memory must
hold the models of all contenders together.

Needs the extra `bench`. Exit status 0 done, 2 wrong input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from decode import machine
from decode.entrants import NAMES, Entrant, prepare
from decode.orders import Worker, worker_process
from decode.published import engine_of
from decode.rounds import await_quiet
from decode.turns import PROMPT_TOKENS
from decode.worker import task_as_json
from export.checkpoint.folder import read_json
from export.command import run_command
from export.errors import ConfigError
from export.files.output import replace_file
from synthetic_checkpoint import MODELS
from trt_build.machine.bandwidth import measure_read_bandwidth
from trt_build.ort.engine import open_engine

BANDWIDTH_BYTES = 1 << 28
TURN_TOKENS = 16
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "ours": {},
    "llama": {"flash_attention": False},
    "ik": {"flash_attention": False, "repack": True},
}
CONTENDERS = tuple(name for name in NAMES if name.partition("-")[0] in SETTINGS)

logger = logging.getLogger(__name__)


class Runner(Worker):
    """A contender's process, which runs while it loads and while it decodes, and is stopped otherwise."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        super().__init__(name, process)
        process.send_signal(signal.SIGSTOP)

    def tokens_per_s(self) -> float:
        """The rate of decoding TURN_TOKENS tokens."""
        self._process.send_signal(signal.SIGCONT)
        seconds: float = self.ask({"tokens": TURN_TOKENS})["seconds"]
        self._process.send_signal(signal.SIGSTOP)
        return TURN_TOKENS / seconds


@contextmanager
def started(entrant: Entrant, threads: int, rounds: int) -> Iterator[Runner]:
    """A contender that has loaded and run its prompt. Raises ConfigError if it refuses."""
    task = entrant.task(PROMPT_TOKENS + TURN_TOKENS * rounds, threads, _settings(entrant.name))
    with worker_process("decode.turns", [json.dumps(task_as_json(task))], threads) as process:
        try:
            yield Runner(entrant.name, process)
        finally:
            process.send_signal(signal.SIGCONT)  # a stopped process does not see that no more orders come


def benchmark(options: argparse.Namespace) -> int:
    """Measure, print and write the result."""
    if unknown := set(options.contenders) - set(CONTENDERS):
        raise ConfigError(
            f"decoding in turns: {', '.join(sorted(unknown))} is unknown. There are: {', '.join(CONTENDERS)}"
        )
    if options.rounds < 1:
        raise ConfigError(f"decoding in turns: found {options.rounds} rounds, expected at least one")
    engine = options.engine or engine_of(options.like, options.layers, options.precision, options.gguf)
    facts = open_engine(engine, check_digests=False).manifest.architecture
    entrants = [
        prepare(name, engine, facts, options.gguf, scaled_layers=facts.num_layers) for name in options.contenders
    ]
    _check_memory(entrants)
    with ExitStack() as stack:
        runners = [stack.enter_context(started(entrant, options.threads, options.rounds)) for entrant in entrants]
        bandwidths, rates = measure(runners, options.threads, options.rounds)
    result = {
        "benchmark": "decode_turns",
        "machine": machine.describe(),
        "threads": options.threads,
        "model": dataclasses.asdict(facts),
        "like": options.like,
        "prompt_tokens": PROMPT_TOKENS,
        "tokens_of_a_turn": TURN_TOKENS,
        "bandwidth": bandwidths,
        "contenders": {
            entrant.name: {
                "settings": dict(_settings(entrant.name)),
                "tokens_per_s": rates[entrant.name],
                "bytes_of_a_token": bytes_of_a_token(entrant, options.rounds),
            }
            for entrant in entrants
        },
    }
    if options.output:
        replace_file(options.output, json.dumps(result, indent=1) + "\n")
    print(report(result))
    return 0


def measure(runners: Sequence[Runner], threads: int, rounds: int) -> tuple[list[float], dict[str, list[float]]]:
    """The bandwidth of each round, in bytes per second, and each contender's rates, in tokens per second."""
    rates: dict[str, list[float]] = {runner.name: [] for runner in runners}
    bandwidths = []
    for number in range(rounds):
        await_quiet(f"round {number + 1} of {rounds}")
        logger.info("round %d of %d", number + 1, rounds)
        bandwidths.append(measure_read_bandwidth(BANDWIDTH_BYTES, threads))
        for place in range(len(runners)):
            runner = runners[(place + number) % len(runners)]
            rates[runner.name].append(runner.tokens_per_s())
    return bandwidths, rates


def bytes_of_a_token(entrant: Entrant, rounds: int) -> int:
    """Bytes of weights and cache that a token reads at the mean context."""
    return entrant.read_per_token + entrant.cache_per_position * (PROMPT_TOKENS + TURN_TOKENS * rounds // 2)


def _settings(name: str) -> Mapping[str, Any]:
    return SETTINGS[name.partition("-")[0]]


def _check_memory(entrants: Sequence[Entrant]) -> None:
    needed, available = sum(entrant.weight_bytes for entrant in entrants), machine.memory("MemAvailable")
    if needed > available:
        raise ConfigError(
            f"decoding in turns: the weights of {', '.join(entrant.name for entrant in entrants)} take "
            f"{needed / 1e9:.1f} GB together, {available / 1e9:.1f} GB are free; name fewer contenders"
        )


def report(result: Mapping[str, Any]) -> str:
    """The medians as a table."""
    bandwidths, contenders = result["bandwidth"], result["contenders"]
    name_of_first, first = next((name, found["tokens_per_s"]) for name, found in contenders.items())
    like = result.get("like")  # files of before this key have none
    lines = [
        *([f"{like}, {result['model']['num_layers']} of {MODELS[like].num_layers} layers"] if like else []),
        f"{result['machine']['processor']}, {result['threads']} threads, medians of {len(bandwidths)} rounds",
        f"reads {statistics.median(bandwidths) / 1e9:.1f} GB/s ({min(bandwidths) / 1e9:.1f} to "
        f"{max(bandwidths) / 1e9:.1f})",
        f"{'':14} tokens/s   best  GB a token  of reading  speed of {name_of_first} over it",
    ]
    for name, found in contenders.items():
        rates, num_bytes = found["tokens_per_s"], found["bytes_of_a_token"]
        share = statistics.median(rate * num_bytes / read for rate, read in zip(rates, bandwidths, strict=True))
        ratio = statistics.median(one / other for one, other in zip(first, rates, strict=True))
        lines.append(
            f"{name:14} {statistics.median(rates):8.2f}  {max(rates):5.2f}  {num_bytes / 1e9:10.2f}  {share:10.0%}  "
            f"{ratio:.2f}"
        )
    return "\n".join(lines)


def table(path: Path) -> int:
    """Print the table of a stored result."""
    result = read_json(path, "result file of this benchmark")
    if result.get("benchmark") != "decode_turns":
        raise ConfigError(f"reading {path}: found benchmark {result.get('benchmark')!r}, expected 'decode_turns'")
    print(report(result))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, metavar="DIR", help="our engine; the other models are shaped after it")
    parser.add_argument("--like", choices=MODELS, help="in place of --engine: a published model, with random weights")
    parser.add_argument("--layers", type=int, metavar="N", help="with --like: number of its layers (default: all)")
    parser.add_argument(
        "--precision", default="int4", metavar="P", help="with --like: of our engine (default: %(default)s)"
    )
    parser.add_argument("--gguf", type=Path, metavar="DIR", help="folder that keeps the written GGUF files and engines")
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=["ours", "ik-q4_0", "ik-iq4_xs"],
                        metavar="A,B", help=f"of {','.join(CONTENDERS)} (default: ours,ik-q4_0,ik-iq4_xs)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="default: every core")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument("--table", type=Path, metavar="RESULT", help="only print the table of a stored result")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    def run() -> int:
        if options.table is not None:
            return table(options.table)
        if (options.engine is None) == (options.like is None) or options.gguf is None:
            raise ConfigError(
                "decoding in turns: name an engine with --engine, or a model with --like, and a folder with --gguf"
            )
        return benchmark(options)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
