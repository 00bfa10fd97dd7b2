"""Keeps a program running beside a server, such as the gateway: starts it, starts it again, ends it with the server.

    companion = Companion("the gateway", command, policy)
    url = companion.start()     # what the program said when it was ready
    companion.drain()           # it takes no more requests and ends when those in progress have ended
    companion.stop()

The program prints one line of JSON when it is ready. It stays up while the server is started again: its clients get
errors that say so meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from export.errors import named
from triton_repo.errors import ServerError
from triton_repo.supervision.supervisor import RestartPolicy
from trt_build.machine.child import ending_with_parent

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 60.0
END_TIMEOUT_S = 5.0  # after its drain a program may take so long to end


class Companion:
    """One program. `name` is for messages. Its standard error is this process's, its standard output is read."""

    def __init__(
        self, name: str, command: Sequence[str], policy: RestartPolicy, environment: Mapping[str, str] | None = None
    ) -> None:
        self._name, self._command, self._policy = name, command, policy
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[str] | None = None
        self._ready = threading.Event()
        self._said: dict[str, Any] | None = None
        self._ending = threading.Event()
        # The kernel ends a program with the thread that started it, so that one thread starts all of them.
        self._thread = threading.Thread(target=self._run, name="moeship-companion", daemon=True)

    @property
    def pid(self) -> int | None:
        """The program's process; None while there is none."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def start(self) -> dict[str, Any]:
        """Start the program and wait until it is ready. Returns what it said. Raises ServerError."""
        self._thread.start()
        self._ready.wait(READY_TIMEOUT_S)
        if self._said is None:
            self.stop()
            raise ServerError(f"starting {self._name}: it ended, or was not ready within {READY_TIMEOUT_S:g} s")
        return self._said

    def drain(self) -> None:
        """Ask the program to end when its requests have ended. It is not started again."""
        self._ending.set()
        self._signal(signal.SIGTERM)

    def stop(self) -> None:
        """End the program: by its own drain if that takes no longer than END_TIMEOUT_S, else by a kill."""
        self.drain()
        self._thread.join(END_TIMEOUT_S)
        self._signal(signal.SIGKILL)
        self._thread.join(END_TIMEOUT_S)

    def _signal(self, number: signal.Signals) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _run(self) -> None:
        restarts = 0
        while not self._ending.is_set():
            began = time.monotonic()
            status = self._run_once()
            if self._ending.is_set() or self._said is None:  # it never began: `start` says so
                break
            restarts = 1 if time.monotonic() - began >= self._policy.healthy_s else restarts + 1
            if restarts > self._policy.max_restarts:
                logger.error("%s ended with status %s too often, and is not started again", self._name, status)
                break
            pause_s = self._policy.pause_s(restarts)
            logger.warning("%s ended with status %s; it is started again in %g s", self._name, status, pause_s)
            self._ending.wait(pause_s)
        self._ready.set()

    def _run_once(self) -> int:
        """Run the program to its end; returns its status."""
        with subprocess.Popen(
            ending_with_parent(self._command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
            errors="replace", process_group=0, env=self._environment,
        ) as process:  # fmt: skip
            self._process = process
            if self._ending.is_set():
                process.terminate()
            assert process.stdout is not None
            self._hear(process.stdout.readline())
            for line in process.stdout:
                logger.info("%s: %s", self._name, named(line.rstrip(), 400))
            return process.wait()

    def _hear(self, line: str) -> None:
        """Take the line that the program says when it is ready."""
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            if isinstance(said, dict):
                if self._said is not None:
                    logger.info("%s answers again", self._name)
                self._said = said
                self._ready.set()
