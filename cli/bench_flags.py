"""The flags of `moeship bench`, and what they mean as loads, requests and endpoints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.key_flags import add_key_arguments, read_api_key
from cli.tls_flags import add_tls_arguments, read_client_tls
from export.errors import ConfigError

if TYPE_CHECKING:
    from clients.bench.load import Load, Sampling
    from clients.bench.objective import Objective
    from clients.bench.prompts import Works
    from clients.bench.targets.endpoints import Endpoints
    from clients.bench.trace import TraceWorks

DEFAULT_URL = "127.0.0.1:8001"
ENDPOINTS = ("grpc", "generate", "completions", "chat")
PATIENCE_S = 5.0
# Between the seeds of two loads of a test. With one seed all rates would have the same arrivals in another scale, and
# chance would move the points of a curve together.
_APART = 1_000_003


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
    add_key_arguments(server)
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
    load.add_argument(
        "--trace", type=Path, metavar="FILE", help="send the requests of a trace when they are due instead: a JSON "
        'object a line, {"timestamp": MS, "input_length": N, "output_length": N}, or a "prompt" in place of its length',
    )  # fmt: skip
    load.add_argument(
        "--speed", type=float, default=1.0, metavar="X", help="with --trace: so many times as fast (default: 1)"
    )
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
    output.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"),
        help="measure nothing: compare two files of --output, with intervals; --page draws both",
    )  # fmt: skip


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
    if arguments.timeout is not None and not 0 < arguments.timeout < float("inf"):
        raise ConfigError(f"measuring a server: --timeout is {arguments.timeout}, expected seconds above 0")
    return Endpoints(
        urls=urls,
        kind=kind,
        model=arguments.model,
        timeout_s=arguments.timeout,
        extra=read_body(arguments.body),
        tls=read_client_tls(arguments),
        api_key=read_api_key(arguments, urls),
    )


def read_loads(arguments: argparse.Namespace) -> list[tuple[str, Load]]:
    """A name and a load for each number of streams or rate. Raises ConfigError."""
    from clients.bench.load import Load

    if arguments.streams and arguments.rate:
        raise ConfigError("planning a load: found --streams and --rate; give one of them")
    _check_sizes(arguments)
    flag, text, kind = ("--rate", arguments.rate, float) if arguments.rate else ("--streams", arguments.streams, int)
    try:
        values = [kind(word) for word in (text or "1").split(",")]
    except ValueError as error:
        raise ConfigError(f"planning a load: {flag} is {text!r}, expected numbers with commas between them") from error
    loads = []
    for turn, value in enumerate(values):
        per = None if arguments.duration else arguments.requests or 8 * (1 if arguments.rate else max(1, int(value)))
        load = Load(
            streams=None if arguments.rate else int(value),
            rate=float(value) if arguments.rate else None,
            requests=per,
            duration_s=arguments.duration,
            seed=arguments.seed + turn * _APART,
        )
        loads.append((f"{value:g}/s" if arguments.rate else str(value), load))
    return loads


def _check_sizes(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for sizes of a load that cannot be."""
    if arguments.requests is not None and arguments.duration is not None:
        raise ConfigError("planning a load: found --requests and --duration; give one of them")
    if arguments.requests is not None and arguments.requests < 1:
        raise ConfigError(f"planning a load: --requests is {arguments.requests}, expected 1 or more")
    if arguments.warm_up < 0:
        raise ConfigError(f"planning a load: --warm-up is {arguments.warm_up}, expected 0 or more")


def read_traced(arguments: argparse.Namespace) -> tuple[list[tuple[str, Load]], TraceWorks]:
    """The load and the requests of a trace. Raises ConfigError, MissingPackageError."""
    from clients.bench.load import Load, read_lengths
    from clients.bench.prompts import token_counter
    from clients.bench.trace import TraceWorks, read_trace

    beside = ("streams", "rate", "prompts", "early")
    if given := [f"--{name}" for name in beside if getattr(arguments, name)]:
        raise ConfigError(f"planning a load: found --trace and {', '.join(given)}; a trace has its own requests")
    if not 0 < arguments.speed < float("inf"):
        raise ConfigError(f"planning a load: --speed is {arguments.speed}, expected a number above 0")
    _check_sizes(arguments)
    trace = read_trace(arguments.trace)[: arguments.requests]
    load = Load(
        schedule=tuple(one.at_s / arguments.speed for one in trace),
        requests=None if arguments.duration else len(trace),
        duration_s=arguments.duration,
        seed=arguments.seed,
    )
    works = TraceWorks(
        trace=trace,
        max_tokens=read_lengths(arguments.max_tokens, "--max-tokens"),
        counter=token_counter(arguments.tokenizer) if arguments.tokenizer else None,
        sampling=_sampling(arguments),
        seed=arguments.seed,
    )
    return [("trace" if arguments.speed == 1 else f"trace x{arguments.speed:g}", load)], works


def read_works(arguments: argparse.Namespace) -> Works:
    """The requests to send. Raises ConfigError, MissingPackageError."""
    from clients.bench.load import read_lengths
    from clients.bench.prompts import Works, read_prompts, token_counter

    return Works(
        prompts=read_prompts(arguments.prompts) if arguments.prompts else (),
        prompt_tokens=read_lengths(arguments.prompt_tokens, "--prompt-tokens"),
        max_tokens=read_lengths(arguments.max_tokens, "--max-tokens"),
        counter=token_counter(arguments.tokenizer) if arguments.tokenizer else None,
        early_share=arguments.early,
        seed=arguments.seed,
        sampling=_sampling(arguments),
    )


def _sampling(arguments: argparse.Namespace) -> Sampling:
    from clients.bench.load import Sampling

    return Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        ignore_end=arguments.ignore_end,
    )


def read_body(text: str | None) -> dict[str, Any]:
    """The fields of --body. Raises ConfigError."""
    try:
        fields = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"reading --body: {error}; expected a JSON object") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"reading --body: found {text}, expected a JSON object")
    return fields
