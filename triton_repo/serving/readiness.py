"""Waits until a started server answers, and says why if it never will."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from triton_repo.contracts.model_state import ModelState
from triton_repo.processes.program import POLL_INTERVAL_S, Process, descendants_of, protect_memory, read_process
from triton_repo.serving.health import HealthEndpoint, is_listening, model_states

# If a Python process ends while its model loads, Triton 2.51 notices within 2 s and reports the model as failed. But if
# the process ended before it made its shared memory, Triton waits for it without end.
LOST_LOAD_S = 5.0
# A process is stopped (state T) only by a signal that somebody sent. After this time nobody will continue it.
STOPPED_LOAD_S = 5.0
SERVER_PROGRAM = "tritonserver"
STUB_PROGRAM = "triton_python_backend_stub"


class NotReady(Exception):  # noqa: N818 - the caller turns it into a ServerError
    """Why a server will not be ready."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """The server that is waited for."""

    process: subprocess.Popen[bytes]
    program: str  # its name, for messages
    listening: Sequence[tuple[str, int]]  # addresses and ports of every interface
    endpoint: HealthEndpoint
    steps: Set[str]  # models that are only steps of an ensemble
    timeout_s: float
    mark: str  # with which the names of its shared memory begin


def wait_until_ready(waiting: Waiting) -> tuple[ModelState, ...]:
    """Wait until the server listens, which it does after every model was loaded or refused. Returns the models' states.
    Raises NotReady if the server ends or takes too long, and ServerError if it does not answer as Triton does."""
    deadline = time.monotonic() + waiting.timeout_s
    loads = _Loads()
    while not all(is_listening(address, port) for address, port in waiting.listening):
        protect_memory(waiting.mark)
        if waiting.process.poll() is not None:
            raise NotReady(f"{waiting.program} ended with status {waiting.process.returncode} before it was ready")
        if lost := loads.lost(waiting.process.pid):
            raise NotReady(
                f"the Python process of {lost} ended while it was loading, and {waiting.program} waits for it without "
                "end"
            )
        if stopped := loads.stopped():
            raise NotReady(f"{stopped} is stopped (state T) while models load, and has been for {STOPPED_LOAD_S:g} s")
        if time.monotonic() > deadline:
            raise NotReady(
                f"{waiting.program} was still loading models after {waiting.timeout_s:g} s; allow more time, or look "
                "at its log"
            )
        time.sleep(POLL_INTERVAL_S)
    protect_memory(waiting.mark)
    return model_states(waiting.endpoint)


def model_of(words: list[str]) -> str | None:
    """The model that a Python process of Triton runs, from its command line STUB .../MODEL/VERSION/model.py ...; None
    for the command line of another program."""
    if len(words) < 2 or Path(words[0]).name != STUB_PROGRAM:
        return None
    path = Path(words[1])
    return path.parent.parent.name or None


@dataclass
class _Loads:
    """Watches the Python processes of a server that loads its models. Keys are pids, times are of CLOCK_MONOTONIC."""

    models: dict[int, str] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)  # since when a process has been seen in state Z
    stopped_since: dict[int, float] = field(default_factory=dict)
    looked: float = -1.0  # time of the last look

    def lost(self, root: int) -> str | None:
        """The model whose process ended longer ago than Triton needs to notice. Looks at most twice a second."""
        now = time.monotonic()
        if now - self.looked < LOST_LOAD_S / 10:
            return None
        self.looked = now
        found = descendants_of(root)
        stopped = [pid for pid in (root, *(process.pid for process in found)) if _is_stopped(pid)]
        self.stopped_since = {pid: self.stopped_since.get(pid, now) for pid in stopped}
        servers = {p.pid for p in found if _is_server(p)} | {root}
        children = [process for process in found if process.parent in servers]
        for child in children:
            if name := model_of(child.words()):
                self.models[child.pid] = name
        gone = {child.pid for child in children if child.has_ended}
        self.ended = {pid: self.ended.get(pid, now) for pid in gone}
        for pid, since in self.ended.items():
            if now - since >= LOST_LOAD_S:
                return f"the model {self.models[pid]}" if pid in self.models else "a model"
        return None

    def stopped(self) -> str | None:
        """The process that was stopped for too long at the last look of `lost`."""
        for pid, since in self.stopped_since.items():
            if self.looked - since >= STOPPED_LOAD_S:
                return f"the Python process of the model {self.models[pid]}" if pid in self.models else f"process {pid}"
        return None


def _is_stopped(pid: int) -> bool:
    found = read_process(pid)
    return found is not None and found.state == "T"


def _is_server(process: Process) -> bool:
    words = process.words()
    return bool(words) and Path(words[0]).name == SERVER_PROGRAM
