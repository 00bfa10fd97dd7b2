"""Stream a completion from a served model. Tokens appear on stdout as they are made.

The prompt "-" is read from stdin. Ctrl-C cancels the request on the server and keeps the text printed so far.
Exit status: 0 done, 1 the request failed, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from export.command import INTERRUPTED, READER_GONE, leave_stdout

if TYPE_CHECKING:
    from clients.generation import Client
    from clients.messages import GenerationRequest, ModelState, Piece

POLL_INTERVAL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help='the text to continue; "-" reads it from stdin')
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="127.0.0.1:8001", metavar="HOST:PORT", help="gRPC address (%(default)s)")
    server.add_argument("--model", help="name of the model; not needed where the server has one ready model only")
    server.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after so long (wait for ever)")
    sampling = parser.add_argument_group("sampling", "what is left out takes the server's default")
    sampling.add_argument("--max-tokens", type=int, default=128, metavar="N", help="new tokens at most (%(default)s)")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    sampling.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens; 0 is all")
    sampling.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that sum to P, 0 < P <= 1")
    sampling.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be repeated")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object at the end instead of the text")
    output.add_argument("--stats", action="store_true", help="a line of counts and speed on stderr at the end")


def run(arguments: argparse.Namespace) -> int:
    """Stream one answer; returns the exit status. Raises ClientError, and OSError where stdout takes no more."""
    from clients.generation import Client

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character of the answer shows a question mark.
        sys.stdout.reconfigure(errors="replace")
    prompt = read_stdin() if arguments.prompt == "-" else arguments.prompt
    with Client(arguments.url) as client:
        interrupted = threading.Event()

        def interrupt() -> None:
            interrupted.set()
            client.close()  # cancels the request on the server

        return beside(lambda: ask(client, arguments, prompt, interrupted), interrupt)


def beside(work: Callable[[], int], interrupt: Callable[[], None]) -> int:
    """The result of `work`, done in a thread of its own; Ctrl-C calls `interrupt` in this one.

    No KeyboardInterrupt is raised meanwhile: one that lands inside gRPC can leave a lock of it held, and the program
    waiting for ever. The wait is cut in pieces, since a signal that comes just before it does not end it.
    """
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda _number, _frame: pressed.set())
    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            future = pool.submit(work)
            while not future.done():
                wait([future], timeout=POLL_INTERVAL_S)
                if pressed.is_set():
                    pressed.clear()
                    interrupt()
            return future.result()
    finally:
        signal.signal(signal.SIGINT, before)


def ask(client: Client, arguments: argparse.Namespace, prompt: str, interrupted: threading.Event) -> int:
    """Choose the model, stream the answer; returns the exit status. Raises ClientError and OSError."""
    from clients.errors import ClientError

    try:
        model = arguments.model or the_one_ready(client.models(), arguments.url)
        request = read_request(arguments, model, prompt)
        return answer(client, request, interrupted, as_json=arguments.json, stats=arguments.stats)
    except ClientError:
        if interrupted.is_set():
            return INTERRUPTED
        raise
    except BrokenPipeError:
        leave_stdout()
        return READER_GONE
    except OSError:
        leave_stdout()
        raise


def read_stdin() -> str:
    """The text on stdin, byte for byte. Raises RequestRejected where there is none that is UTF-8."""
    from clients.errors import RequestRejected

    if sys.stdin is None:
        raise RequestRejected("reading the prompt from stdin: it is closed; pipe a text into it")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestRejected(f"reading the prompt from stdin: {error}; expected UTF-8, convert it first") from error


def read_request(arguments: argparse.Namespace, model: str, prompt: str) -> GenerationRequest:
    from clients.messages import GenerationRequest

    return GenerationRequest(
        model=model,
        prompt=prompt,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        random_seed=arguments.seed,
        stop_words=tuple(arguments.stop) if arguments.stop else None,
        timeout_s=arguments.timeout,
    )


def the_one_ready(models: Sequence[ModelState], url: str) -> str:
    """The name of the server's only ready model, steps of an ensemble not counted. Raises ModelNotFound if there are
    none or several."""
    from clients.errors import ModelNotFound
    from triton_repo.token_contract import STEP_MODELS

    ready = sorted({model.name for model in models if model.ready and model.name not in STEP_MODELS})
    if len(ready) == 1:
        return ready[0]
    if ready:
        raise ModelNotFound(
            f"choosing a model of {url}: found {len(ready)} ready; give --model, one of: {', '.join(ready)}"
        )
    listed = "; ".join(map(str, models)) or "its repository is empty"
    raise ModelNotFound(f"choosing a model of {url}: none is ready: {listed}")


@dataclass
class Timeline:
    """The pieces of one answer and when they came. `clock` gives seconds."""

    clock: Callable[[], float] = time.perf_counter
    pieces: list[Piece] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._start = self.clock()

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.seconds.append(self.clock() - self._start)

    @property
    def num_tokens(self) -> int | None:
        """Tokens received; None from a server that does not name them."""
        return sum(len(piece.token_ids) for piece in self.pieces) or None

    @property
    def time_to_first_token_ms(self) -> float | None:
        return 1000 * self.seconds[0] if self.seconds else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first piece by the seconds after it, so that reading the prompt does not count."""
        if self.num_tokens is None or len(self.pieces) < 2 or self.seconds[-1] <= self.seconds[0]:
            return None
        return (self.num_tokens - len(self.pieces[0].token_ids)) / (self.seconds[-1] - self.seconds[0])


def answer(
    client: Client, request: GenerationRequest, interrupted: threading.Event, *, as_json: bool, stats: bool
) -> int:
    """Stream one answer to stdout; returns the exit status. Raises ClientError; OSError if stdout takes no more."""
    from clients.errors import ClientError

    timeline = Timeline()
    try:
        with closing(client.stream(request)) as pieces:
            for piece in pieces:
                timeline.add(piece)
                if not as_json:
                    print(piece.text, end="", flush=True)
    except ClientError:
        if not interrupted.is_set():
            raise
    finally:
        if timeline.pieces and not as_json:
            print(flush=True)
    if as_json:
        print(json.dumps(summary(request, timeline, interrupted=interrupted.is_set()), ensure_ascii=False), flush=True)
    if stats:
        print(statistics(timeline), file=sys.stderr)
    return INTERRUPTED if interrupted.is_set() else 0


def summary(request: GenerationRequest, timeline: Timeline, *, interrupted: bool) -> dict[str, object]:
    """What --json prints; a count or speed that is not known is null."""
    from clients.messages import collect

    generation = collect(timeline.pieces)
    return {
        "model": request.model,
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": "cancelled" if interrupted else generation.finish_reason,
        "num_input_tokens": generation.num_input_tokens,
        "num_output_tokens": generation.num_output_tokens,
        "time_to_first_token_ms": timeline.time_to_first_token_ms,
        "tokens_per_s": timeline.tokens_per_s,
    }


def statistics(timeline: Timeline) -> str:
    """The line of --stats."""
    parts = [f"{len(timeline.pieces)} pieces" if timeline.num_tokens is None else f"{timeline.num_tokens} tokens"]
    if timeline.time_to_first_token_ms is not None:
        parts.append(f"first after {timeline.time_to_first_token_ms:.0f} ms")
    if timeline.tokens_per_s is not None:
        parts.append(f"then {timeline.tokens_per_s:.1f} tokens/s")
    return ", ".join(parts)
