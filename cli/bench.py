"""Measure a server under load: tokens a second, how long first and further tokens take, errors, fairness.

The server is moeship's (gRPC), or one of OpenAI's completions API with --openai. Streams send one request after another
(closed loop); with --rate requests arrive at random, whether or not earlier ones are answered (open loop). Prompts are
synthetic unless --prompts names a file with one JSON object a line: {"prompt": TEXT, "max_tokens": N}. Lengths are
given as 64, as a range 32-128, or as lognormal:MEDIAN,SIGMA,MOST.

Exit status: 0 done, 1 requests failed or the server did not answer, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.rows import print_rows
from cli.tls_flags import add_tls_arguments, read_client_tls
from export.errors import ConfigError
from export.files.output import refuse_existing, replace_file
from export.rows import Rows

if TYPE_CHECKING:
    from clients.bench.load import Load
    from clients.bench.prompts import Works
    from clients.bench.records import Record, Target

# A name, the report and the records of each load.
Level = tuple[str, dict[str, Any], "list[Record]"]
BUSY_CORES = 0.7  # above this share of a core the generator itself may limit what it measures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--url", default="127.0.0.1:8001", metavar="HOST:PORT", help="gRPC address (default: %(default)s)"
    )
    server.add_argument(
        "--openai", metavar="URL", help="http://HOST:PORT of a server of OpenAI's API, instead of --url"
    )
    server.add_argument(
        "--body", metavar="JSON", help="with --openai: fields that are added to every request, such as "
        '\'{"timings_per_token": true}\', with which llama.cpp\'s server counts tokens',
    )  # fmt: skip
    server.add_argument("--model", help="name of the model; not needed where the server has one only")
    server.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="give up a request after this time (default: wait without limit)",
    )
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
        "--records", type=Path, metavar="FILE", help="write what each request saw, a JSON object a line"
    )
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw the loads, for example as bench.svg")


def run(arguments: argparse.Namespace) -> int:
    """Apply the loads and print the report; returns 1 if a request failed. Raises ConfigError, ClientError, and
    OutputError for an output that exists already or has no place."""
    for output in (arguments.records, arguments.plot):
        if output is not None:
            refuse_existing(output, "the figures")  # before loads that may take hours
    loads = read_loads(arguments)
    works = read_works(arguments)
    levels = asyncio.run(_measure(arguments, loads, works))
    if arguments.records:
        replace_file(arguments.records, "".join(_lines(levels)))
    if arguments.plot:
        from clients.bench.plot import draw

        draw(levels, f"{arguments.openai or arguments.url}: {levels[0][1]['load']['kind']}", arguments.plot)
    if arguments.json:
        print(json.dumps({"loads": [report for _, report, _ in levels]}, indent=2))
    else:
        print(table(levels))
        print_rows("notes", notes(levels))
    return 1 if any(report["requests"]["failed"] for _, report, _ in levels) else 0


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


async def _measure(arguments: argparse.Namespace, loads: list[tuple[str, Load]], works: Works) -> list[Level]:
    """Apply each load after its warm-up. No two loads send the same synthetic prompt."""
    from clients.bench.generator import apply
    from clients.bench.report import summarise

    cores = len(os.sched_getaffinity(0))
    levels, first = [], 0
    async with _opened(arguments) as target:
        for name, load in loads:
            if arguments.warm_up:
                warm_up = dataclasses.replace(
                    load, requests=arguments.warm_up, duration_s=None, rate=None, streams=load.streams or 1
                )
                await apply(target, warm_up, works, first)
                first += arguments.warm_up
            done = await apply(target, load, works, first)
            first += len(done.records)
            levels.append((name, summarise(done, load, works, cores), done.records))
            print(f"load {name}: {len(done.records)} requests in {done.window_s:.1f} s", file=sys.stderr)
    return levels


@asynccontextmanager
async def _opened(arguments: argparse.Namespace) -> AsyncIterator[Target]:
    """The server. Raises ClientError if it does not answer or the model is not clear."""
    tls = read_client_tls(arguments)
    if arguments.openai:
        from clients.bench.openai import opened

        body = read_body(arguments.body)
        async with opened(arguments.openai, arguments.model, arguments.timeout, body, tls) as target:
            yield target
        return
    from cli.generate import the_one_ready
    from clients.bench.triton import TritonTarget
    from clients.generation import AsyncClient

    async with AsyncClient(arguments.url, tls=tls) as client:
        model = arguments.model or the_one_ready(await client.models(), arguments.url)
        yield TritonTarget(client, model, arguments.timeout)


def read_body(text: str | None) -> dict[str, Any]:
    """The fields of --body. Raises ConfigError."""
    try:
        fields = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"reading --body: {error}; expected a JSON object") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"reading --body: found {text}, expected a JSON object")
    return fields


def _lines(levels: list[Level]) -> list[str]:
    return [json.dumps({"load": name, **vars(record)}) + "\n" for name, _, records in levels for record in records]


def table(levels: list[Level]) -> str:
    """One row for each load."""
    is_closed = levels[0][1]["load"]["kind"] == "closed loop"
    heads = (
        "streams" if is_closed else "rate", "tokens/s", "requests/s", "first token, s: p50", "p90", "p99",
        "between tokens, ms: p50", "p99", "longest pause, s", "fairness", "failed",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [heads]
    for name, report, _ in levels:
        first, between = report["first_token_s"], report["between_tokens_s"]
        rows.append(
            (
                name,
                _number(report["output_tokens_per_s"]),
                _number(report["requests_per_s"]),
                *(_number(first[share]) for share in ("p50", "p90", "p99")),
                *(_number(between[share], 1e3) for share in ("p50", "p99")),
                _number(report["longest_pause_s"]),
                _number(report["fairness"]["jain"]),
                f"{report['requests']['failed']} of {report['requests']['sent']}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def notes(levels: list[Level]) -> Rows:
    """How the figures were come by, and what puts them in doubt."""
    rows = [("tokens", f"counted by {levels[0][1]['counting']}")]
    for name, report, records in levels:
        generator, requests = report["generator"], report["requests"]
        busy = f"{generator['cores']:.2f} cores"
        if generator["cores"] > BUSY_CORES:
            busy += "; the generator itself may limit the figures"
        rows.append((f"load {name}", f"{_sizes(records)}; the generator took {busy}"))
        if requests["without_a_token"] > requests["failed"]:
            count = requests["without_a_token"] - requests["failed"]
            rows.append((f"load {name}", f"{count} requests got no token before the end; they are in no percentile"))
        if report["miscounted"]:
            rows.append((f"load {name}", f"{report['miscounted']} answers have another number of tokens by the server"))
        if (late := generator["late_s"]) and (late["p99"] or 0) > 0.05:
            rows.append((f"load {name}", f"requests were sent late: {late['p99']:.3f} s (p99)"))
        if report["first_token_s"]["n"] < 100:
            rows.append((f"load {name}", f"p99 of {report['first_token_s']['n']} requests is near their maximum"))
        rows += [(f"{kind}: {number}", _example(records, kind)) for kind, number in report["errors"].items()]
    return rows


def _sizes(records: list[Record]) -> str:
    """The mean tokens of prompts, where the server said how many there are, and of answers."""
    prompts = [record.num_input_tokens for record in records if record.num_input_tokens is not None]
    answers = [record.num_tokens for record in records if record.arrivals]
    means = (f"{sum(counts) / len(counts):.0f}" if counts else "?" for counts in (prompts, answers))
    return "{} tokens a prompt, {} an answer".format(*means)


def _example(records: list[Record], kind: str) -> str:
    """The message of the first request that failed so."""
    return next(r.message or "" for r in records if r.error and f"{r.error} {r.status or ''}".strip() == kind)


def _number(value: float | None, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.3g}" if abs(value * scale) < 1000 else f"{value * scale:.0f}"
