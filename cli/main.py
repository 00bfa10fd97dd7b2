"""The `moeship` command line: finds the command's module, runs it, turns errors into one line and an exit status.

Exit status: 0 done, 1 a check failed, 2 wrong input, 70 a bug in moeship, 130 interrupted, 141 when nobody
reads its output any more (`moeship inspect X | head -2`). Results go to stdout, everything else to stderr.
A command is one module with `add_arguments(parser)` and `run(arguments) -> int`; it is imported only when
it is the one asked for.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence

from export.command import run_command
from export.errors import named, near_match, printable

# Commands in the order of the pipeline: name -> (module, description).
COMMANDS: dict[str, tuple[str, str]] = {
    "merge": ("cli.merge", "merge dense experts into a mixture-of-experts checkpoint"),
    "inspect": ("cli.inspect", "describe a checkpoint: family, sizes, routing"),
    "plan": ("cli.plan", "say what an engine will contain and need, before it is built"),
    "build": ("cli.build", "build an engine directory from a checkpoint"),
    "verify": ("cli.verify", "compare an engine with the reference"),
    "eval": ("cli.eval", "evaluate an engine on tasks of lm-evaluation-harness"),
    "package": ("cli.package", "make a Triton model repository from an engine"),
    "serve": ("cli.serve", "run Triton Inference Server on a model repository"),
    "gateway": ("cli.gateway", "serve OpenAI's HTTP API over a running server"),
    "generate": ("cli.generate", "stream a completion from a served model"),
    "batch": ("cli.batch", "answer a file of prompts: resumable, each line once, in order"),
    "bench": ("cli.bench", "measure a server under load: tokens a second, first tokens, pauses"),
    "top": ("cli.top", "watch a server live: streams, tokens a second, waits, cache, experts"),
    "doctor": ("cli.doctor", "print what a bug report needs, and what is wrong here"),
    "demo": ("cli.demo", "merge, build, verify, package and serve four small experts"),
}


class _Printable(logging.Formatter):
    """Escapes control characters in log messages, since they contain names from files that could control a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def overview() -> str:
    rows = "\n".join(f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: moeship COMMAND [options]\n\nShip mixture-of-experts language models to Triton Inference Server.\n\n"
        f"{rows}\n\n'moeship COMMAND --help' says more. -v logs more, -q less; both go before the command.\n"
        "'moeship --version' says which moeship this is.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    return run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    level = logging.INFO
    while words and words[0] in ("-v", "-q", "--verbose", "--quiet"):
        level = logging.DEBUG if words.pop(0) in ("-v", "--verbose") else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    for noisy in (
        "httpx",
        "httpx2",
        "httpcore",
        "httpcore2",
        "urllib3",
        "huggingface_hub",
        "transformers",
        "torch",
        "matplotlib",
    ):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if level > logging.DEBUG:  # gRPC writes a line of its own before our error, such as of a handshake that failed
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if words[:1] in (["--version"], ["version"]):
        print(f"moeship {version()}")
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0 if words else 2
    name, *rest = words
    if name not in COMMANDS:
        near = near_match(name, COMMANDS)
        hint = f"; did you mean {near}?" if near else "."
        print(f"moeship: unknown command {named(name, 60)}{hint} There are: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    return _run_one(name, rest)


def _run_one(name: str, words: Sequence[str]) -> int:
    """Import a command's module, read its flags and run it."""
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(
        prog=f"moeship {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(words)))


def version() -> str:
    """The version of the moeship installation that runs."""
    try:
        return importlib.metadata.version("moeship")
    except importlib.metadata.PackageNotFoundError:
        return "of a source tree that is not installed"


if __name__ == "__main__":
    sys.exit(main())
