"""Servers under the same load, side by side in short turns: ours, our engine without a server, llama.cpp's and vLLM.

    python benchmarks/serving.py --engine ENGINE --gguf CACHE --llama-server PROGRAM --output RESULT.json
    python benchmarks/serving.py --small --output RESULT.json
    python benchmarks/serving.py --engine ENGINE --contenders ours,in-process --before EARLIER.json --output RESULT.json
    python benchmarks/serving.py --table RESULT.json

Every server stays loaded and is stopped (SIGSTOP) while another is measured, because the memory bandwidth of a shared
machine can change by half within seconds. In a round each contender gets each load once, one contender after the other,
and ratios are of one round. Prompts are random words of an exact number of tokens; answers have an exact number, too,
drawn with temperature 1 from the 50 likeliest. All contenders get the same prompts. Scenarios:

- load: 1, 4, 8 and 16 streams, each of which sends its next request when its last answer has ended;
- first: short prompts one at a time, for what the server adds to an engine's first token;
- long: a prompt of 1,024 tokens arrives while 4 streams run.

llama.cpp runs the Mixtral of cpu_decode.py, which has as many weights, with our tokenizer's vocabulary. Its server is
compiled with benchmarks/servers/compile_llama_server.sh. vLLM runs where --vllm names its program and --vllm-model a
checkpoint. `--small` builds the engine of examples/tiny-phixtral and measures that, in a minute. Memory must hold all
contenders.

Needs the extras `bench`, `load` and `server`. Exit status 0 done, 1 a contender failed, 2 wrong input.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from decode import machine
from decode.rounds import await_quiet
from decode.shape import mixtral_of_equal_weights
from export.architecture import Architecture
from export.checkpoint.folder import read_json
from export.command import run_command
from export.errors import ConfigError, MoeshipError
from export.files.output import replace_file
from servers.contenders import Contender, in_process, llama, ours, vllm
from servers.plot import draw
from servers.results import Round, assemble, check_kind, load_name, table
from synthetic_checkpoint import PHIXTRAL
from triton_repo.contracts.model_parameters import ModelParameters
from trt_build.machine.bandwidth import measure_read_bandwidth
from trt_build.ort.engine import open_engine

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-phixtral" / "merge.yml"
NAMES = ("ours", "in-process", "llama-q4_0", "llama-q4_k_m", "vllm")
SCENARIOS = ("load", "first", "long")
BANDWIDTH_BYTES = 1 << 28
LONG_STREAMS = 4
WARM_UP = {"scenario": "load", "streams": 1, "requests": 1}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of prompts and answers, and requests. The defaults are for the full-size model."""

    streams: tuple[int, ...] = (1, 4, 8, 16)
    requests_per_stream: int = 1
    prompt_tokens: int = 64
    max_tokens: int = 32
    short_prompt_tokens: int = 4
    short_requests: int = 8
    long_prompt_tokens: int = 1024
    long_max_tokens: int = 96

    @property
    def context(self) -> int:
        """Positions that the caches of all sequences need together."""
        most = max(self.streams)
        return max(
            most * (self.prompt_tokens + self.max_tokens),
            self.long_prompt_tokens + 64 + LONG_STREAMS * (self.prompt_tokens + self.long_max_tokens),
        )


SMALL = Lengths(requests_per_stream=4, long_prompt_tokens=384, short_requests=20)


def benchmark(options: argparse.Namespace) -> int:
    """Measure, write the result and the picture, print the table; returns 1 if a contender could not run."""
    if unknown := [*set(options.contenders) - set(NAMES), *set(options.scenarios) - set(SCENARIOS)]:
        raise ConfigError(f"comparing servers: {', '.join(sorted(unknown))} is unknown. There are: {', '.join(NAMES)}")
    if options.rounds < 1:
        raise ConfigError(f"comparing servers: found {options.rounds} rounds, expected at least one")
    before = read_json(options.before, "an earlier result of this benchmark") if options.before else None
    lengths = _lengths(options)
    with ExitStack() as stack:
        engine = options.engine
        if options.small:
            engine = _small_engine(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moeship-serving-"))))
        if engine is None:
            raise ConfigError(
                "comparing servers: no engine; name one with --engine, or measure the example with --small"
            )
        facts = open_engine(engine, check_digests=False).manifest.architecture
        starts = _starts(options, engine, facts, lengths)
        contenders, not_run = _started(stack, options.contenders, starts)
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine.describe(),
            "threads": options.threads,
            "model": {"name": _name(facts, options.small), **dataclasses.asdict(facts)},
            "load": dataclasses.asdict(lengths),
            "contenders": {contender.name: dict(contender.notes) for contender in contenders},
            "not_run": not_run,
        }
        for contender in contenders:  # one request each that does not count: it reads the weights from the disk
            contender.measure({**_order(lengths, engine, options.rounds), **WARM_UP})
        rounds: list[Round] = []
        bandwidths: list[float] = []
        for number in range(options.rounds):
            await_quiet(f"round {number + 1} of {options.rounds}")
            bandwidths.append(measure_read_bandwidth(BANDWIDTH_BYTES, options.threads))
            rounds.append(_round(contenders, lengths, options.scenarios, engine, number))
            result = assemble({**about, "bandwidth": bandwidths}, rounds, before)
            if options.output:
                replace_file(options.output, json.dumps(result, indent=1) + "\n")
    if options.output:
        draw(result, options.output.with_suffix(".svg"))
    print(table(result))
    return 1 if not_run else 0


def _lengths(options: argparse.Namespace) -> Lengths:
    base = SMALL if options.small else Lengths()
    given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(Lengths)}
    return dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})


def _name(facts: Architecture, is_small: bool) -> str:
    if is_small:
        return "examples/tiny-phixtral"
    same = dataclasses.replace(facts, num_layers=PHIXTRAL.num_layers) == PHIXTRAL
    return f"{'phixtral-4x2_8' if same else facts.family}, {facts.num_layers} layers"


def _small_engine(folder: Path) -> Path:
    """The int4 engine of the example's merge."""
    from cli.main import main as moeship

    steps = (
        ["-q", "merge", str(EXAMPLE), str(folder / "checkpoint")],
        ["-q", "build", str(folder / "checkpoint"), "--precision", "int4", "--output", str(folder / "engine")],
    )
    for words in steps:
        with contextlib.redirect_stdout(sys.stderr):
            status = moeship(words)
        if status:
            raise ConfigError(f"making the small engine: `moeship {' '.join(words)}` ended with status {status}")
    return folder / "engine"


def _starts(
    options: argparse.Namespace, engine: Path, facts: Architecture, lengths: Lengths
) -> dict[str, Callable[[], AbstractContextManager[Contender]]]:
    """How each contender is started. A start raises MoeshipError if it is not possible."""
    slots = max(*lengths.streams, LONG_STREAMS + 1)
    # Like the other servers, ours computes every prompt, and one token of an answer in a step.
    parameters = ModelParameters(threads=options.threads, slots=slots, prefix_cache=False, drafts=False)

    def llama_of(precision: str) -> AbstractContextManager[Contender]:
        if options.llama_server is None or options.gguf is None:
            raise ConfigError(
                "starting llama.cpp's server: give its program with --llama-server (compile it with "
                "benchmarks/servers/compile_llama_server.sh) and a folder for its models with --gguf"
            )
        from servers.vocabulary import gguf_with_vocabulary

        peer = mixtral_of_equal_weights(facts)
        model = gguf_with_vocabulary(options.gguf, peer, precision, engine / "tokenizer.json")
        return llama(f"llama-{precision}", options.llama_server, model, options.threads, slots, lengths.context)

    def vllm_of() -> AbstractContextManager[Contender]:
        if options.vllm is None or options.vllm_model is None:
            raise ConfigError("starting vLLM: give its program with --vllm and a checkpoint with --vllm-model")
        return vllm(options.vllm, options.vllm_model, options.threads, slots, facts.max_positions)

    return {
        "ours": lambda: ours(engine, parameters),
        "in-process": lambda: in_process(engine, parameters),
        "llama-q4_0": lambda: llama_of("q4_0"),
        "llama-q4_k_m": lambda: llama_of("q4_k_m"),
        "vllm": vllm_of,
    }


def _started(
    stack: ExitStack, names: Sequence[str], starts: dict[str, Callable[[], AbstractContextManager[Contender]]]
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that run, and for each other the reason. Raises the first reason if none runs."""
    contenders, not_run = [], {}
    problem: MoeshipError | None = None
    for name in names:
        try:
            contenders.append(stack.enter_context(starts[name]()))
            logger.info("%s is loaded", name)
        except MoeshipError as error:
            problem = problem or error
            not_run[name] = str(error)
            logger.info("%s is left out: %s", name, error)
    if problem is not None and not contenders:
        raise problem
    return contenders, not_run


def _order(lengths: Lengths, engine: Path, seed: int) -> dict[str, Any]:
    """What all orders of a round have in common."""
    return {**dataclasses.asdict(lengths), "tokenizer": str((engine / "tokenizer.json").resolve()), "seed": seed}


def _round(
    contenders: Sequence[Contender], lengths: Lengths, scenarios: Sequence[str], engine: Path, number: int
) -> Round:
    """Each scenario of each contender once. The order of contenders changes from round to round."""
    turns: dict[str, dict[str, Any]] = {contender.name: {} for contender in contenders}
    order = _order(lengths, engine, number)
    tasks: list[tuple[str, dict[str, Any]]] = []
    if "first" in scenarios:
        tasks.append(("first", {"scenario": "first", "requests": lengths.short_requests}))
    if "load" in scenarios:
        tasks += [
            (
                load_name(streams),
                {"scenario": "load", "streams": streams, "requests": streams * lengths.requests_per_stream},
            )
            for streams in lengths.streams
        ]
    if "long" in scenarios:
        tasks.append(("long", {"scenario": "long", "streams": LONG_STREAMS}))
    for name, task in tasks:
        for place in range(len(contenders)):
            contender = contenders[(place + number) % len(contenders)]
            answer = contender.measure({**order, **task})
            turns[contender.name][name] = answer
            rate = answer.get("output_tokens_per_s")
            logger.info(
                "round %d, %s, %s%s", number + 1, name, contender.name, f": {rate:.1f} tokens/s" if rate else ""
            )
    return turns


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, metavar="DIR", help="our engine; the other models are shaped after it")
    parser.add_argument("--small", action="store_true", help="build and measure the example's small engine instead")
    parser.add_argument("--gguf", type=Path, metavar="DIR", help="folder that keeps the written GGUF files")
    parser.add_argument("--llama-server", type=Path, metavar="PROGRAM", help="llama.cpp's server")
    parser.add_argument("--vllm", type=Path, metavar="PROGRAM", help="the `vllm` of an environment with vLLM for CPUs")
    parser.add_argument("--vllm-model", type=Path, metavar="DIR", help="the checkpoint that vLLM serves")
    parser.add_argument("--contenders", type=_names, default=NAMES[:4], metavar="A,B", help=f"of {','.join(NAMES)}")
    parser.add_argument("--scenarios", type=_names, default=SCENARIOS, metavar="A,B", help=f"of {','.join(SCENARIOS)}")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="of each server")
    parser.add_argument("--streams", type=_numbers, metavar="N,N", help="default: 1,4,8,16")
    for name, what in (
        ("requests-per-stream", "requests of each stream in a turn"),
        ("prompt-tokens", "tokens of a prompt"),
        ("max-tokens", "tokens of an answer"),
        ("long-prompt-tokens", "tokens of the long prompt"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=what)
    parser.add_argument("--before", type=Path, metavar="RESULT", help="an earlier result to compare ours with")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result, and a picture beside it")
    parser.add_argument("--table", type=Path, metavar="RESULT", help="only print and draw a kept result again")
    return parser


def redraw(path: Path) -> int:
    """Draw the picture of a stored result again and print its table."""
    result = read_json(path, "a result of this benchmark")
    check_kind(result)
    draw(result, path.with_suffix(".svg"))
    print(table(result))
    return 0


def main() -> int:
    options = _parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for shown in (logger, logging.getLogger("decode")):
        shown.setLevel(logging.INFO)
    return run_command(lambda: redraw(options.table) if options.table else benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
