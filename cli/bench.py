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
from typing import TYPE_CHECKING, Any

from cli.bench_flags import add_arguments, read_endpoints, read_loads, read_slo, read_traced, read_works
from cli.bench_text import CHANCE, comparison, notes, table, unpaired_text
from cli.progress import PROGRESS_S, every
from cli.rows import print_rows
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
    from clients.bench.trace import TraceWorks

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Apply the loads and print the report; returns 1 if a request failed or the server was gone, 130 if it was
    interrupted. Raises ConfigError, ClientError, and OutputError for an output that exists already or has no place."""
    from clients.bench.kept import Keeper, LoadTest, read_test

    if arguments.page is not None:
        refuse_existing(arguments.page, "the page")  # before loads that may take hours
        if arguments.output is not None and arguments.output.resolve() == arguments.page.resolve():
            raise ConfigError(f"measuring a server: --output and --page are both {arguments.page}; name two files")
    if arguments.compare is not None:
        return _compare(arguments)
    if arguments.show is not None:
        return _tell(arguments, read_test(arguments.show, read_slo(arguments)))
    objective = read_slo(arguments)
    loads, works = read_traced(arguments) if arguments.trace else (read_loads(arguments), read_works(arguments))
    endpoints = read_endpoints(arguments)
    said = about(arguments, endpoints, [name for name, _ in loads], objective)
    with Keeper(arguments.output, said) as keeper:
        levels = asyncio.run(_measure(arguments, endpoints, loads, works, objective, keeper, said))
    if not levels:
        raise KeyboardInterrupt
    status = _tell(arguments, LoadTest(about=said, levels=levels))
    if keeper.fault is not None:
        raise keeper.fault
    return status


def _tell(arguments: argparse.Namespace, test: LoadTest) -> int:
    """Print the figures of a test and write its page; returns the exit status. Raises OutputError."""
    levels = test.levels
    if arguments.json:
        print(json.dumps({"loads": [{**level.report, "server_metrics": level.metrics} for level in levels]}, indent=2))
    else:
        print(table(levels))
        print_rows("notes", notes(levels))
    if arguments.page is not None:  # last, as the disk may be full
        from cli.bench_page import bench_page

        replace_file(arguments.page, bench_page(test))
    return status_of(levels)


def _compare(arguments: argparse.Namespace) -> int:
    """Print how two kept tests differ, and write the page. Raises ConfigError, OutputError."""
    from clients.bench.compare import compare, unpaired
    from clients.bench.kept import read_test

    beside = {"--show": arguments.show, "--output": arguments.output, "--slo": arguments.slo}
    if given := [flag for flag, value in beside.items() if value is not None]:
        raise ConfigError(f"comparing load tests: {', '.join(given)} has no meaning beside --compare")
    a, b = (read_test(path) for path in arguments.compare)
    found = compare(a, b, arguments.seed)
    files = (str(arguments.compare[0]), str(arguments.compare[1]))
    if arguments.json:
        only = dict(zip(("only_a", "only_b"), unpaired(a, b), strict=True))
        print(json.dumps({"compared": [one.as_json() for one in found], **only}, indent=2))
    else:
        left_out = unpaired_text(a, b)
        print_rows("compared", [("A", files[0]), ("B", files[1]), *([("left out", left_out)] if left_out else [])])
        print(comparison(found))
        print(f"The intervals are of 95 %. {CHANCE}")
    if arguments.page is not None:
        from cli.bench_compare_page import compare_page

        replace_file(arguments.page, compare_page((a, b), files, found))
    return 0


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


async def _measure(
    arguments: argparse.Namespace,
    endpoints: Endpoints,
    loads: Sequence[tuple[str, Load]],
    works: Works | TraceWorks,
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
                is_trace = load.schedule is not None
                if arguments.warm_up:
                    warm_up = dataclasses.replace(
                        load, requests=arguments.warm_up, duration_s=None, rate=None, schedule=None,
                        streams=load.streams or 1,
                    )  # fmt: skip
                    others = len(load.schedule or ()) if is_trace else first  # the numbers of a trace are its own
                    await apply(target, warm_up, works, others, stop=stop, patience_s=arguments.patience)
                    first += 0 if is_trace else arguments.warm_up
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
