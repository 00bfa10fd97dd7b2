"""Measure a server under load: tokens a second, how long first and further tokens take, goodput, errors, fairness.

The server is moeship's over gRPC, or one of HTTP: --endpoint names Triton's generate extension, or OpenAI's completions
or chat. Streams send one request after another (closed loop); with --rate requests arrive at random, whether or not
earlier ones are answered (open loop). Prompts are synthetic unless --prompts names a file with one JSON object a line:
{"prompt": TEXT, "max_tokens": N}. Lengths are given as 64, as a range 32-128, or as lognormal:MEDIAN,SIGMA,MOST.

--output keeps every request while the test runs. Ctrl-C, and a server that is gone, end the test; what was measured
until then is reported and marked.

Exit status: 0 done, 1 requests failed or the server did not answer, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.bench_text import notes, table
from cli.progress import PROGRESS_S, every
from cli.rows import print_rows
from cli.tls_flags import add_tls_arguments, read_client_tls
from export.command import INTERRUPTED
from export.errors import ConfigError
from export.files.output import refuse_existing, replace_file

if TYPE_CHECKING:
    from clients.bench.kept import Keeper, Level, LoadTest
    from clients.bench.load import Load
    from clients.bench.objective import Objective
    from clients.bench.prompts import Works
    from clients.bench.records import Record, Run
    from clients.bench.server_metrics import Beside
    from clients.bench.targets.endpoints import Endpoints

DEFAULT_URL = "127.0.0.1:8001"
ENDPOINTS = ("grpc", "generate", "completions", "chat")
PATIENCE_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--url", action="append", metavar="ADDRESS", help="HOST:PORT of gRPC, or http://HOST:PORT; given again, "
        f"requests go to several servers in turn (default: {DEFAULT_URL})",
    )  # fmt: skip
    server.add_argument(
        "--endpoint", choices=ENDPOINTS, help="what is asked there: moeship's gRPC (default), Triton's generate over "
        "HTTP, or OpenAI's completions (default for http://) or chat",
    )  # fmt: skip
    server.add_argument(
        "--body", metavar="JSON", help="for OpenAI's API: fields that are added to every request, such as "
        '\'{"timings_per_token": true}\', with which llama.cpp\'s server counts tokens',
    )  # fmt: skip
    server.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable with the key that a server over HTTP wants"
    )
    server.add_argument(
        "--metrics", metavar="URL", help="address of the server's metrics, which are read beside the load"
    )
    server.add_argument("--model", help="name of the model; not needed where the server has one only")
    server.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="give up a request after this time (default: wait without limit)",
    )
    server.add_argument(
        "--patience", type=float, default=PATIENCE_S, metavar="SECONDS",
        help="end the test where no connection has been possible for so long (default: %(default)g)",
    )  # fmt: skip
    add_tls_arguments(parser)
    load = parser.add_argument_group("load")
    load.add_argument("--streams", metavar="N,N", help="streams of a closed loop, one load after another (default: 1)")
    load.add_argument("--rate", metavar="R,R", help="requests a second of an open loop instead, one load after another")
    load.add_argument("--requests", type=int, metavar="N", help="requests of each load (default: 8 for each stream)")
    load.add_argument("--duration", type=float, metavar="SECONDS", help="end each load after this time instead")
    load.add_argument("--warm-up", type=int, default=1, metavar="N",
                      help="requests before each load that are not counted (default: %(default)s)")  # fmt: skip
    load.add_argument("--early", type=float, default=0.0, metavar="SHARE",
                      help="share of the requests that the client ends early, 0 to 1 (default: 0)")  # fmt: skip
    load.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed sends the same requests")
    work = parser.add_argument_group("prompts and answers")
    work.add_argument("--prompts", type=Path, metavar="FILE", help="JSONL file of prompts")
    work.add_argument(
        "--prompt-tokens",
        default="128",
        metavar="LENGTHS",
        help="tokens of each synthetic prompt (default: %(default)s)",
    )
    work.add_argument("--tokenizer", type=Path, metavar="FILE",
                      help="tokenizer.json, or the folder of an engine, that counts the tokens of synthetic prompts; "
                      "without it the lengths count words")  # fmt: skip
    work.add_argument(
        "--max-tokens", default="64", metavar="LENGTHS", help="new tokens of each answer (default: %(default)s)"
    )
    work.add_argument(
        "--ignore-end", action="store_true", help="go on after end tokens, so all answers have that length"
    )
    sampling = parser.add_argument_group("sampling", "as in moeship generate (default: the server's)")
    sampling.add_argument("--temperature", type=float, metavar="T")
    sampling.add_argument("--top-k", type=int, metavar="K")
    sampling.add_argument("--top-p", type=float, metavar="P")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument(
        "--slo", metavar="BOUNDS", help="objective of a request in milliseconds, for goodput: 500 for the first token, "
        "or some of ttft:500,itl:50,e2e:8000 (first token, mean time between tokens, whole answer)",
    )  # fmt: skip
    output.add_argument(
        "--output", type=Path, metavar="FILE", help="keep what each request saw, a JSON object a line, while it runs"
    )
    output.add_argument("--page", type=Path, metavar="FILE", help="write the figures and charts as one HTML file")
    output.add_argument(
        "--show",
        type=Path,
        metavar="FILE",
        help="measure nothing: show a file of --output, with another --slo or --page",
    )


def run(arguments: argparse.Namespace) -> int:
    """Apply the loads and print the report; returns 1 if a request failed or the server was gone, 130 if it was
    interrupted. Raises ConfigError, ClientError, and OutputError for an output that exists already or has no place."""
    from clients.bench.kept import Keeper, LoadTest, read_test

    if arguments.page is not None:
        refuse_existing(arguments.page, "the page")  # before loads that may take hours
    if arguments.show is not None:
        return _tell(arguments, read_test(arguments.show, read_slo(arguments)))
    loads, works, objective = read_loads(arguments), read_works(arguments), read_slo(arguments)
    endpoints = read_endpoints(arguments)
    said = about(arguments, endpoints, [name for name, _ in loads], objective)
    with Keeper(arguments.output, said) as keeper:
        levels = asyncio.run(_measure(arguments, endpoints, loads, works, objective, keeper, said))
    if not levels:
        raise KeyboardInterrupt
    return _tell(arguments, LoadTest(about=said, levels=levels))


def _tell(arguments: argparse.Namespace, test: LoadTest) -> int:
    """Print the figures of a test and write its page; returns the exit status."""
    levels = test.levels
    if arguments.page is not None:
        from cli.bench_page import bench_page

        replace_file(arguments.page, bench_page(test))
    if arguments.json:
        print(json.dumps({"loads": [{**level.report, "server_metrics": level.metrics} for level in levels]}, indent=2))
    else:
        print(table(levels))
        print_rows("notes", notes(levels))
    return status_of(levels)


def status_of(levels: Sequence[Level]) -> int:
    """The exit status of a test that ended so."""
    from clients.bench.generator import INTERRUPTED as WAS_INTERRUPTED

    early = {level.report["ended_early"] for level in levels} - {None}
    if WAS_INTERRUPTED in early:
        return INTERRUPTED
    return int(bool(early) or any(level.report["requests"]["failed"] for level in levels))


def about(
    arguments: argparse.Namespace, endpoints: Endpoints, loads: Sequence[str], objective: Objective | None
) -> dict[str, Any]:
    """What a test is, as JSON values. The key of a server is in no argument."""
    from cli.main import version

    return {
        "moeship": version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "urls": list(endpoints.urls),
        "endpoint": endpoints.kind,
        "model": endpoints.model,
        "loads": list(loads),
        "objective": str(objective) if objective else None,
        "seed": arguments.seed,
        "cores": len(os.sched_getaffinity(0)),
    }


def read_slo(arguments: argparse.Namespace) -> Objective | None:
    """The objective of --slo. Raises ConfigError."""
    from clients.bench.objective import read_objective

    return read_objective(arguments.slo, "--slo") if arguments.slo is not None else None


def read_endpoints(arguments: argparse.Namespace) -> Endpoints:
    """The servers to ask. Raises ConfigError, TlsError."""
    from clients.bench.targets.endpoints import GRPC, Endpoints, kind_of

    urls = tuple(arguments.url or [DEFAULT_URL])
    kind = arguments.endpoint or kind_of(urls)
    over_http = {url: url.startswith(("http://", "https://")) for url in urls}
    if wrong := [url for url, is_http in over_http.items() if is_http == (kind == GRPC)]:
        expected = "HOST:PORT" if kind == GRPC else "http://HOST:PORT"
        raise ConfigError(f"measuring a server: --url is {wrong[0]}, expected {expected} for the endpoint {kind}")
    if not 0 < arguments.patience < float("inf"):
        raise ConfigError(f"measuring a server: --patience is {arguments.patience}, expected seconds above 0")
    key = None
    if arguments.api_key_env is not None and not (key := os.environ.get(arguments.api_key_env)):
        raise ConfigError(f"measuring a server: the variable {arguments.api_key_env} of --api-key-env is not set")
    return Endpoints(
        urls=urls,
        kind=kind,
        model=arguments.model,
        timeout_s=arguments.timeout,
        extra=read_body(arguments.body),
        tls=read_client_tls(arguments),
        api_key=key,
    )


def read_loads(arguments: argparse.Namespace) -> list[tuple[str, Load]]:
    """A name and a load for each number of streams or rate. Raises ConfigError."""
    from clients.bench.load import Load

    if arguments.streams and arguments.rate:
        raise ConfigError("planning a load: found --streams and --rate; give one of them")
    if arguments.requests is not None and arguments.duration is not None:
        raise ConfigError("planning a load: found --requests and --duration; give one of them")
    if arguments.requests is not None and arguments.requests < 1:
        raise ConfigError(f"planning a load: --requests is {arguments.requests}, expected 1 or more")
    if arguments.warm_up < 0:
        raise ConfigError(f"planning a load: --warm-up is {arguments.warm_up}, expected 0 or more")
    flag, text, kind = ("--rate", arguments.rate, float) if arguments.rate else ("--streams", arguments.streams, int)
    try:
        values = [kind(word) for word in (text or "1").split(",")]
    except ValueError as error:
        raise ConfigError(f"planning a load: {flag} is {text!r}, expected numbers with commas between them") from error
    loads = []
    for value in values:
        per = None if arguments.duration else arguments.requests or 8 * (1 if arguments.rate else max(1, int(value)))
        load = Load(
            streams=None if arguments.rate else int(value),
            rate=float(value) if arguments.rate else None,
            requests=per,
            duration_s=arguments.duration,
            seed=arguments.seed,
        )
        loads.append((f"{value:g}/s" if arguments.rate else str(value), load))
    return loads


def read_works(arguments: argparse.Namespace) -> Works:
    """The requests to send. Raises ConfigError, MissingPackageError."""
    from clients.bench.load import Sampling, read_lengths
    from clients.bench.prompts import Works, read_prompts, token_counter

    return Works(
        prompts=read_prompts(arguments.prompts) if arguments.prompts else (),
        prompt_tokens=read_lengths(arguments.prompt_tokens, "--prompt-tokens"),
        max_tokens=read_lengths(arguments.max_tokens, "--max-tokens"),
        counter=token_counter(arguments.tokenizer) if arguments.tokenizer else None,
        early_share=arguments.early,
        seed=arguments.seed,
        sampling=Sampling(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            ignore_end=arguments.ignore_end,
        ),
    )


async def _measure(
    arguments: argparse.Namespace,
    endpoints: Endpoints,
    loads: Sequence[tuple[str, Load]],
    works: Works,
    objective: Objective | None,
    keeper: Keeper,
    said: dict[str, Any],
) -> list[Level]:
    """Apply each load after its warm-up, until one ends early. No two loads send the same synthetic prompt. The name of
    the model is put into `said`."""
    from clients.bench.generator import apply
    from clients.bench.kept import Level
    from clients.bench.report import summarise
    from clients.bench.server_metrics import Beside
    from clients.bench.targets.endpoints import opened_endpoints

    cores = len(os.sched_getaffinity(0))
    beside = Beside(arguments.metrics, endpoints.tls) if arguments.metrics else None
    if beside is not None:
        beside.check()
    levels: list[Level] = []
    first = 0
    stop = asyncio.Event()
    with _stopping(stop):
        async with opened_endpoints(endpoints) as (target, said["model"]):
            for name, load in loads:
                if arguments.warm_up:
                    warm_up = dataclasses.replace(
                        load, requests=arguments.warm_up, duration_s=None, rate=None, schedule=None,
                        streams=load.streams or 1,
                    )  # fmt: skip
                    await apply(target, warm_up, works, first, stop=stop, patience_s=arguments.patience)
                    first += arguments.warm_up
                if stop.is_set():
                    break
                keeper.begin(name, load, works.describe())
                keep = _Progress(name, load, keeper.keep)
                done, metrics = await _beside(
                    beside,
                    apply(target, load, works, first, stop=stop, patience_s=arguments.patience, keep=keep),
                )
                first += len(done.records)
                report = summarise(done, load, works, cores, objective)
                levels.append(Level(name=name, report=report, records=done.records, metrics=metrics))
                keeper.end(done, levels[-1], cores)
                early = f"; ended early: {done.ended}" if done.ended else ""
                print(f"load {name}: {len(done.records)} requests in {done.window_s:.1f} s{early}", file=sys.stderr)
                if done.ended:
                    break
    return levels


async def _beside(beside: Beside | None, applied: Coroutine[Any, Any, Run]) -> tuple[Run, dict[str, Any] | None]:
    """Apply a load while the metrics are read."""
    if beside is None:
        return await applied, None
    beside.start()
    try:
        done = await applied
    finally:
        metrics = await asyncio.to_thread(beside.stop)
    return done, metrics


@contextlib.contextmanager
def _stopping(stop: asyncio.Event) -> Iterator[None]:
    """Have the first Ctrl-C or SIGTERM set an event. A second one ends the program at once."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()

    def asked() -> None:
        print("stopping: the requests in flight are ended; what was measured is reported", file=sys.stderr)
        stop.set()
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, asked)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class _Progress:
    """Passes ended requests on, and tells from time to time how many there are."""

    def __init__(self, name: str, load: Load, keep: Callable[[Record], None]) -> None:
        self._name, self._load, self._keep = name, load, keep
        self._ended = self._failed = 0
        self._tell = every(PROGRESS_S, lambda text: print(text, file=sys.stderr))

    def __call__(self, record: Record) -> None:
        self._keep(record)
        self._ended += 1
        self._failed += record.error is not None
        of = f" of {self._load.requests}" if self._load.requests else ""
        self._tell(f"load {self._name}: {self._ended}{of} requests ended, {self._failed} failed")


def read_body(text: str | None) -> dict[str, Any]:
    """The fields of --body. Raises ConfigError."""
    try:
        fields = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"reading --body: {error}; expected a JSON object") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"reading --body: found {text}, expected a JSON object")
    return fields
