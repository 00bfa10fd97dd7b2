"""Orders to a process that keeps what it has loaded, and answers to its parent: a line of JSON each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from export.errors import ConfigError, MoeshipError

_BENCHMARKS = Path(__file__).resolve().parent.parent
Answer = Callable[[Mapping[str, Any]], None]


class Worker:
    """A process as its parent uses it. `opened` is the first answer, which comes when the process has loaded."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name, self._process = name, process
        self.opened = self._answer()

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to an order. Raises ConfigError if the process refuses."""
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the process of {self.name} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise ConfigError(answer["refused"])
        return answer


@contextmanager
def worker_process(module: str, arguments: list[str], threads: int) -> Iterator[subprocess.Popen[str]]:
    """Start `python -m MODULE ARGUMENTS` of this folder. It ends with the last order, at the end of the context."""
    # Without the second variable ggml starts a debugger when it aborts.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "GGML_NO_BACKTRACE": "1"}
    command, pipe = [sys.executable, "-m", module, *arguments], subprocess.PIPE
    with subprocess.Popen(command, cwd=_BENCHMARKS, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()


@contextmanager
def answers() -> Iterator[Answer]:
    """In the process: the function that answers the parent.

    Libraries also write to the standard output, some when the process ends: their output is sent to stderr.
    """
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        yield lambda what: print(json.dumps(what), file=out, flush=True)


@contextmanager
def refusals(answer: Answer) -> Iterator[None]:
    """In the process: answer with the reason if something raises MoeshipError, and end."""
    try:
        yield
    except MoeshipError as error:
        answer({"refused": str(error)})


def orders() -> Iterator[dict[str, Any]]:
    """In the process: the orders, until the parent sends no more."""
    return map(json.loads, sys.stdin)
