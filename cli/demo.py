"""Run every step in one command: four small experts become a served, streaming mixture.

Merges the experts of examples/tiny-phixtral, inspects the result, builds an int4 engine, verifies it against the
reference, packages it, starts Triton, streams a completion over gRPC, prints what it measured, and stops the server.
With --openai-port it then serves the mixture, with a page to chat with it, until Ctrl-C. Each step shows the command
that does the same by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.errors import ConfigError, MoeshipError
from export.quantize.presets import precisions_on

if TYPE_CHECKING:
    from rich.console import Console

    from trt_build.ort.engine import Engine

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-phixtral"
CHAT_TEMPLATE = EXAMPLE / "chat.jinja"
MODEL = "phixtral"
PROMPT = "class Reader:\n    def __init__(self, path):\n        self.path = path\n"
SAMPLING: dict[str, Any] = {"max_tokens": 160, "temperature": 0.7, "top_p": 0.95}
SEED = 5


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """What the client measured: counts, seconds to the first piece, tokens per second after it."""

    text: str
    num_output_tokens: int
    time_to_first_token_s: float
    tokens_per_s: float
    finish_reason: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", default=PROMPT, help="text to continue (default: %(default)r)")
    parser.add_argument("--precision", default="int4", help=f"{', '.join(precisions_on('cpu'))} (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="keep the files in this folder (default: a temporary folder)"
    )
    parser.add_argument(
        "--openai-port", type=int, metavar="PORT",
        help="then serve the model until Ctrl-C, with OpenAI's HTTP API and a page to chat with it on this port",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the summary as JSON; the rest goes to stderr")


def run(arguments: argparse.Namespace) -> int:
    """Run every step of the demo; returns the first exit status that is not 0."""
    if not (EXAMPLE / "merge.yml").is_file():
        raise ConfigError(
            f"starting the demo: {EXAMPLE} does not exist; run it from a clone of the project (pip install -e .)"
        )
    from trt_build.ort.planning.prepare import EngineOptions, check_options

    # Raises for an unknown precision before any file is written.
    check_options(EngineOptions(checkpoint="checkpoint", precision=arguments.precision))
    _check_gateway(arguments.openai_port)
    with contextlib.ExitStack() as stack:
        folder = arguments.output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moeship-demo-")))
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(contextlib.chdir(folder))  # so that the paths that are shown are short
        return _road(arguments)


def _check_gateway(port: int | None) -> None:
    """Raise before the first step where the gateway, the last one, could not start: ServerError for its port, and
    MissingPackageError."""
    if port is None:
        return
    import clients.gateway.server  # noqa: F401 - it raises where the extra is not installed
    from triton_repo.serving.ports import check_port, resolve_host

    check_port("openai", resolve_host("127.0.0.1"), port)


def _road(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # so that the demo exits like other commands; rich would exit with status 1

    console = PipedConsole(stderr=arguments.json, highlight=False, soft_wrap=True)
    started = time.monotonic()
    precision = arguments.precision
    steps = [
        ("merge four experts", ["merge", str(EXAMPLE / "merge.yml"), "checkpoint"]),
        ("look at the mixture", ["inspect", "checkpoint"]),
        ("build an engine", ["build", "checkpoint", "--precision", precision, "--output", "engine"]),
        ("verify it against the reference", ["verify", "engine", "--reference", "checkpoint", "--tokens", "8192"]),
        ("package it for Triton", ["package", "engine", "--name", MODEL, "--output", "repository"]),
    ]
    for number, (title, words) in enumerate(steps, start=1):
        _heading(console, number, title, words)
        status = _quietly_on(console, words)
        if status:
            return status
    _heading(console, len(steps) + 1, "serve it and stream", ["serve", "repository"])
    streamed = _serve_and_stream(console, Path("repository"), arguments.prompt)
    _summary(console, arguments.json, Path("engine"), streamed, time.monotonic() - started)
    if arguments.openai_port is None:
        return 0
    words = ["serve", "repository", "--openai-port", str(arguments.openai_port), "--chat-template", str(CHAT_TEMPLATE)]
    _heading(console, len(steps) + 2, "chat with it in a browser", words)
    console.print("   Open the page below; Ctrl-C ends the server.\n", style="dim")
    return _quietly_on(console, words)


def _quietly_on(console: Console, words: list[str]) -> int:
    """Run one command as the command line would. Its result goes to the console's stream."""
    from cli.main import main

    with contextlib.redirect_stdout(console.file):
        return main(words)


def _heading(console: Console, number: int, title: str, words: list[str]) -> None:
    console.print(f"\n{number}. {title}", style="bold cyan", markup=False)
    _show_command(console, [word.replace(f"{EXAMPLE.parent.parent}/", "") for word in words])


def _show_command(console: Console, words: list[str]) -> None:
    """Print the command that does the same by hand, on one line: a word with line breaks is quoted as $'...'."""
    console.print(f"   $ moeship {' '.join(map(_quoted, words))}", style="dim", markup=False)


def _quoted(word: str) -> str:
    if "\n" not in word:
        return shlex.quote(word)
    for plain, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n")):
        word = word.replace(plain, escaped)
    return f"$'{word}'"


def _serve_and_stream(console: Console, repository: Path, prompt: str) -> Streamed:
    from triton_repo.serving.server import ServerOptions, running_server

    with running_server(ServerOptions(repository=repository)) as server:
        flags = [word for name, value in SAMPLING.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        _show_command(console, ["generate", "--url", server.grpc_url, *flags, "--seed", str(SEED), prompt])
        console.print()
        console.print(prompt, end="", style="bold", markup=False)
        streamed = _stream(server.grpc_url, prompt, lambda text: console.print(text, end="", markup=False))
    console.print("\n\nserver stopped", style="dim")
    return streamed


def _stream(url: str, prompt: str, show: Callable[[str], None]) -> Streamed:
    """Stream a completion and show its pieces as they arrive; returns the counts and times."""
    from clients.generation import Client
    from clients.messages import GenerationRequest

    request = GenerationRequest(model=MODEL, prompt=prompt, random_seed=SEED, **SAMPLING)
    started, first, count, text, reason = time.monotonic(), 0.0, 0, "", ""
    with Client(url) as client:
        for piece in client.stream(request):
            first = first or time.monotonic() - started
            count, text = piece.num_output_tokens or count, text + piece.text
            reason = piece.finish_reason or reason
            show(piece.text)
    elapsed = time.monotonic() - started - first
    return Streamed(
        text=text,
        num_output_tokens=count,
        time_to_first_token_s=first,
        tokens_per_s=(count - 1) / elapsed if count > 1 else 0.0,
        finish_reason=reason,
    )


def _summary(console: Console, as_json: bool, folder: Path, streamed: Streamed, seconds: float) -> None:
    from trt_build.ort.engine import open_engine

    engine = open_engine(folder, check_digests=False)
    if as_json:
        sys.stdout.write(json.dumps(_figures(engine, streamed, seconds), indent=2) + "\n")
        return
    from rich.table import Table
    from rich.text import Text

    verification = _verification(engine)
    precision = engine.manifest.precision
    rows = [
        ("engine", f"{precision.name}, {engine.num_bytes / 1e6:.2f} MB"),
        ("bits per weight", f"{precision.average_bits_per_weight:.2f}"),
        ("mean KL from the reference", f"{verification['mean_kl']:.3f} nats"),
        ("perplexity over the reference", f"{verification['perplexity_increase']:+.2%}"),
        ("top-1 agreement", f"{verification['top1_agreement']:.1%}"),
        ("same experts chosen", f"{verification['routing_agreement']:.1%}"),
        ("time to first token", f"{streamed.time_to_first_token_s * 1e3:.0f} ms"),
        ("decode", f"{streamed.tokens_per_s:.0f} tokens/s over gRPC"),
        ("the whole road", f"{seconds:.0f} s"),
    ]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(Text(name), Text(value, style="bold green"))
    console.print()
    console.print(table)


def _verification(engine: Engine) -> dict[str, float]:
    if engine.manifest.verification is None:
        raise MoeshipError(f"summing up {engine.folder}: its manifest holds no verification; run moeship verify")
    return dict(engine.manifest.verification)


def _figures(engine: Engine, streamed: Streamed, seconds: float) -> dict[str, object]:
    return {
        "precision": engine.manifest.precision.name,
        "engine_bytes": engine.num_bytes,
        "bits_per_weight": engine.manifest.precision.average_bits_per_weight,
        "verification": engine.manifest.verification,
        "stream": asdict(streamed),
        "seconds": round(seconds, 1),
    }
