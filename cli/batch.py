"""Answer a file of prompts, a line of JSON each, by one or several servers, into a file with an answer a line.

The input is OpenAI's batch file format (custom_id, method, url, body), or plain: a JSON text a line, or an object with
prompt or messages and further fields of the request. The output has the lines' answers in the lines' order, each once,
and appears when it is complete. After an interruption of any kind the same command goes on where the last one stopped.

Exit status: 0 every line was answered, 1 lines failed (the output says which) or the batch stopped before its end,
2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.key_flags import add_key_arguments, read_api_key
from cli.progress import PROGRESS_S, every
from cli.rows import print_rows
from cli.tls_flags import add_tls_arguments, read_client_tls
from export.errors import ConfigError, listing

if TYPE_CHECKING:
    from clients.batch.job import Job, Scan
    from clients.batch.local import Sending
    from clients.batch.store import Outcome

logger = logging.getLogger(__name__)

DEFAULT_URL = "127.0.0.1:8001"
_REDRAW_S = 0.2


def _file(text: str) -> Path:
    """The path of a file that stays, since an interrupted batch goes on from it."""
    if text == "-":
        raise argparse.ArgumentTypeError("found -, expected a file, since an interrupted batch goes on from files; "
                                         "name one (./- for one of this name)")  # fmt: skip
    return Path(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=_file, metavar="PROMPTS", help="JSONL file of requests")
    parser.add_argument("output", type=_file, metavar="OUT", help="JSONL file of answers to make")
    server = parser.add_argument_group("servers")
    server.add_argument(
        "--url", action="extend", nargs="+", metavar="URL",
        help="HOST:PORT of a Triton's gRPC, or http://HOST:PORT of a server with OpenAI's API; several share the lines "
        f"(default: {DEFAULT_URL})",
    )  # fmt: skip
    add_key_arguments(server)
    server.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="seconds that one answer may take (default %(default)g)"
    )
    add_tls_arguments(parser)
    requests = parser.add_argument_group("requests")
    requests.add_argument(
        "--format", choices=["openai", "prompts"], help="form of the lines (default: that of the first one)"
    )
    requests.add_argument("--model", metavar="NAME", help="send every line to this model, whatever it names")
    requests.add_argument("--max-tokens", type=int, metavar="N", help="most new tokens, where a line does not say")
    requests.add_argument("--temperature", type=float, metavar="T", help="temperature, where a line does not say")
    requests.add_argument(
        "--body", metavar="JSON", help="further fields of a request, where a line has none: '{\"top_p\": 0.9}'"
    )
    sending = parser.add_argument_group("sending")
    sending.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="requests at a time to each server (default: 16)"
    )
    sending.add_argument(
        "--retries", type=int, default=8, metavar="N",
        help="how often a request is sent again after a failure that may pass (default: 8)",
    )  # fmt: skip
    sending.add_argument(
        "--patience", type=float, default=300, metavar="S",
        help="stop when no server could be reached for so long (default: 300)",
    )  # fmt: skip
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--engine", choices=["local", "ray"], default="local",
        help="send from this process, or from tasks of a Ray cluster (default: local)",
    )  # fmt: skip
    engine.add_argument(
        "--ray-address", metavar="ADDRESS", help="HOST:PORT of a Ray cluster, or auto (default: one on this machine)"
    )
    engine.add_argument("--ray-workers", type=int, default=2, metavar="N", help="tasks at a time (default: 2)")
    engine.add_argument("--shard-lines", type=int, default=500, metavar="N", help="lines of a task (default: 500)")
    parser.add_argument(
        "--retry-failed", action="store_true",
        help="send the failed lines of an earlier run again; a complete OUT is replaced when they are done",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what was done as one line of JSON")


def run(arguments: argparse.Namespace) -> int:
    """Answer a batch; returns 1 if lines failed. Raises ConfigError, ClientError, OutputError, MissingPackageError."""
    from clients.batch.job import Job, scan
    from clients.batch.local import agree_on_models
    from clients.batch.store import finished, refuse_foreign
    from export.files.resume import discard_interrupted

    started = time.monotonic()
    sending = read_sending(arguments)
    defaults = read_body(arguments)
    refuse_foreign(arguments.output)
    with _bar("reading", arguments.input.stat().st_size if arguments.input.is_file() else 0) as tell:
        found = scan(arguments.input, form=arguments.format, shard_lines=arguments.shard_lines,
                     scratch=arguments.output.resolve().parent, tell=lambda done: tell(done, ""))  # fmt: skip
    needs_model = found.lacks_model and arguments.model is None and "model" not in defaults
    named, agreement = _models(arguments, found, defaults), None
    if needs_model:  # the model is a part of the job
        agreement = agree_on_models(sending, named, needs_model=True)
        defaults = {**defaults, "model": agreement.default}
    job = Job(path=arguments.input.resolve(), sha256=found.sha256, num_bytes=found.num_bytes, num_lines=found.num_lines,
              form=found.form, model=arguments.model, defaults=defaults)  # fmt: skip
    outcome, kept = finished(job, arguments.output), found.num_lines
    if outcome is None or (arguments.retry_failed and outcome.num_failed):
        agreement = agreement or agree_on_models(sending, named, needs_model=False)
        sending = replace(sending, access=replace(sending.access, models=agreement.models))
        outcome, kept = _answer(arguments, job, found, sending, replaces=outcome is not None)
    else:
        logger.info("%s is complete already", arguments.output)
        if not outcome.num_failed:  # else answers of an interrupted run with --retry-failed may be there
            discard_interrupted(arguments.output)
    return _say(arguments, outcome, kept=kept, seconds=time.monotonic() - started)


def _models(arguments: argparse.Namespace, found: Scan, defaults: dict[str, Any]) -> frozenset[str]:
    """The models that requests name."""
    if arguments.model is not None:
        return frozenset({arguments.model})
    default = {defaults["model"]} if found.lacks_model and "model" in defaults else set()
    return found.models | default


def _answer(
    arguments: argparse.Namespace, job: Job, found: Scan, sending: Sending, *, replaces: bool
) -> tuple[Outcome, int]:
    """Answer the lines that are left and make the output. Returns what it holds, and how many answers were kept.
    `replaces`: there is an output of this job, whose good answers are kept."""
    from clients.batch.local import require_same_input, run_local
    from clients.batch.ray_engine import Cluster, run_on_ray
    from clients.batch.store import open_store

    with open_store(job, arguments.output, retries_failed=arguments.retry_failed) as store:
        if replaces:
            store.take_up()
        index = store.index()
        kept, counts = index.num_done, {True: index.num_good, False: index.num_done - index.num_good}
        index.close()
        if kept:
            logger.info("an earlier run left %d of %d answers", kept, job.num_lines)
        with _bar("answers", job.num_lines) as show:

            def tell(is_good: bool) -> None:
                counts[is_good] += 1
                show(sum(counts.values()), f"{counts[False]} failed" if counts[False] else "")

            show(kept, "")
            try:
                if arguments.engine == "ray":
                    cluster = Cluster(address=arguments.ray_address, workers=arguments.ray_workers)
                    run_on_ray(store, found.shards, sending, cluster, tell)
                else:
                    run_local(store, sending, tell)
            except KeyboardInterrupt:
                logger.warning("the answers so far are kept: run the same command again to go on")
                raise
        require_same_input(job)
        with _bar("writing", job.num_lines) as show:
            outcome = store.publish(lambda lines: show(lines, ""), replaces=replaces)
    return outcome, kept


def read_sending(arguments: argparse.Namespace) -> Sending:
    """Where and how to send. Raises ConfigError, AddressInvalid, and TlsError for certificates that cannot be used."""
    from clients.batch.endpoints import Access, check_url
    from clients.batch.local import Sending
    from clients.batch.runner import Rules

    doing = "reading the flags of a batch"
    for name, value, least in (
        ("--concurrency", arguments.concurrency, 1), ("--retries", arguments.retries, 0),
        ("--ray-workers", arguments.ray_workers, 1), ("--shard-lines", arguments.shard_lines, 1),
    ):  # fmt: skip
        if value < least:
            raise ConfigError(f"{doing}: {name} is {value}, expected {least} or more")
    for name, seconds in (("--timeout", arguments.timeout), ("--patience", arguments.patience)):
        if not 0 < seconds < math.inf:
            raise ConfigError(f"{doing}: {name} is {seconds}, expected a finite number of seconds above 0")
    if arguments.model == "":
        raise ConfigError(f"{doing}: --model is empty, expected a name; leave it out for that of each line")
    if arguments.ray_address and arguments.engine != "ray":
        raise ConfigError(f"{doing}: found --ray-address without --engine ray; give both or none")
    urls = tuple(arguments.url or [DEFAULT_URL])
    for url in urls:
        check_url(url)
    key = read_api_key(arguments, urls)
    access = Access(timeout_s=arguments.timeout, key=key, tls=read_client_tls(arguments))
    rules = Rules(concurrency=arguments.concurrency, retries=arguments.retries, patience_s=arguments.patience)
    return Sending(urls=urls, access=access, rules=rules)


def read_body(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of a request's body for lines that have none. Raises ConfigError."""
    from clients.batch.lines import read_defaults

    fields = read_defaults(arguments.body, "reading --body")
    for name in ("max_tokens", "temperature"):
        value = getattr(arguments, name)
        if value is None:
            continue
        if name in fields:
            raise ConfigError(f"reading --body: found {name}, and the flag of that name; give one of them")
        fields[name] = value
    temperature, max_tokens = arguments.temperature, arguments.max_tokens
    if temperature is not None and not math.isfinite(temperature):
        raise ConfigError(f"reading the flags of a batch: --temperature is {temperature}, expected a finite number")
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"reading the flags of a batch: --max-tokens is {max_tokens}, expected 1 or more")
    return fields


def _say(arguments: argparse.Namespace, outcome: Outcome, *, kept: int, seconds: float) -> int:
    if outcome.num_failed:
        logger.warning(
            "%d of %d lines failed:%s",
            outcome.num_failed, outcome.num_lines, listing(outcome.failed, of=outcome.num_failed),
        )  # fmt: skip
    facts = {
        "output": str(arguments.output), "lines": outcome.num_lines,
        "answered": outcome.num_lines - outcome.num_failed, "failed": outcome.num_failed,
        "kept": kept, "seconds": round(seconds, 3),
    }  # fmt: skip
    if arguments.json:
        print(json.dumps(facts))
    else:
        print_rows("batch", [(name, str(value)) for name, value in facts.items()])
    return 1 if outcome.num_failed else 0


@contextmanager
def _bar(name: str, total: int) -> Iterator[Any]:
    """Yield a function of what is done and a note, which shows both on stderr: as a bar on a terminal, else as a line
    every few seconds."""
    if not sys.stderr.isatty() or not logger.isEnabledFor(logging.INFO):
        say = every(PROGRESS_S, logger.info)

        def line(done: int, note: str) -> None:
            say(f"{name}: {done} of {total}{', ' if note else ''}{note}")

        yield line
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total, note="")
        drawn, last = 0.0, (0, "")

        def draw(done: int, note: str) -> None:
            nonlocal drawn, last
            last = (done, note)
            if time.monotonic() - drawn >= _REDRAW_S:
                drawn = time.monotonic()
                progress.update(task, completed=done, note=note)

        yield draw
        progress.update(task, completed=last[0], note=last[1])
