"""Watches a server that answers, and reports which of its processes is dead or hangs.

    watch = Watch(server, Limits())
    fault = watch.wait()      # "the Python process of the model phixtral (pid 4711) has ended"

Five things are checked: whether each process that was there when the server was ready still runs and is not stopped;
whether the models' heartbeats are recent (processes/heartbeat.py); whether an engine that has requests ends its steps;
whether tritonserver says that it is live; and whether nobody wrote into the weights. A model that computes passes them
all: its process runs, the heartbeat's thread gets the interpreter's lock while the engine computes, and tritonserver
answers at the same time.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from triton_repo.processes.heartbeat import read_beats
from triton_repo.processes.program import (
    MARK_VARIABLE,
    Process,
    descendants_of,
    has_variable,
    protect_memory,
    read_process,
)
from triton_repo.serving.health import HealthEndpoint, is_live
from triton_repo.serving.readiness import SERVER_PROGRAM, model_of
from triton_repo.serving.server import Server
from trt_build.errors import EngineError
from trt_build.ort.mapped_file import MappedFile

logger = logging.getLogger(__name__)

_NEVER = -1  # a start time that no process has
_ENDING_S = 0.5  # a killed program may take this long until its status can be read
_WARNED_DAYS = (30, 7, 1, 0)
_LAUNCHER_WORDS = ("mpirun", "mpiexec", "prterun", "orterun")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits in seconds. On a machine that is overloaded or swaps, a heartbeat or an answer may be late by some
    seconds, so these limits are as long as 60 beats.
    """

    interval: float = 0.5  # between two looks; a dead process is noticed at the next look, and named _ENDING_S later
    stopped: float = 3.0  # short, since a process is stopped only by a signal that somebody sent
    beat: float = 30.0
    step: float = 300.0  # a step of 128 tokens of a prompt takes a minute where a large engine has few cores
    liveness: float = 30.0


class Watch:
    """Watches one server. `weights` are the files that its models have in memory as they lie on the disk."""

    def __init__(self, server: Server, limits: Limits, weights: Sequence[MappedFile] = ()) -> None:
        self._server, self._limits, self._weights = server, limits, weights
        self._members = _members(server)
        self._stopped_since: dict[int, float] = {}
        self._looked = time.monotonic()
        self._late_looks = 0
        self._prober = _Prober(server.endpoint, limits)
        self._certificate = _CertificateEnd(server.endpoint.tls_ends) if server.endpoint.tls_ends else None

    def wait(self) -> str:
        """Look until a process is dead or hangs. Returns which, and of which model."""
        try:
            while not (fault := self.look()):
                time.sleep(self._limits.interval)
            return fault
        finally:
            self._prober.stop()

    def look(self) -> str | None:
        """The process that is dead or hangs; None if there is none."""
        now = time.monotonic()
        # If this process got no processor time, neither did the others: their times begin again.
        if now - self._looked > 4 * self._limits.interval + 2:
            self._stopped_since, self._late_looks = {}, 0
            self._prober.forgive()
        self._looked = now
        protect_memory(self._server.mark)
        if self._certificate is not None:
            self._certificate.warn(datetime.now(UTC))
        return (
            self._ended_program()
            or self._dead_or_stopped(now)
            or self._late_beat()
            or self._changed_weights()
            or self._stuck_engine()
            or self._no_answer()
        )

    def _ended_program(self, patience_s: float = 0.0) -> str | None:
        """The program that was started, if it ends within `patience_s`."""
        try:
            status = self._server.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            return None
        return f"{self._server.program} ended with status {status}{_signal_name(status)}"

    def _dead_or_stopped(self, now: float) -> str | None:
        for pid, member in self._members.items():
            found = read_process(pid)
            if found is None or found.has_ended or found.start_time != member.start_time:
                # A program that is killed takes its children along, and they may be gone before its own status can
                # be read. The program is then what ended.
                return self._ended_program(_ENDING_S) or f"{member.role} (pid {pid}) has ended"
            if found.state != "T":
                self._stopped_since.pop(pid, None)
            elif now - self._stopped_since.setdefault(pid, now) >= self._limits.stopped:
                return f"{member.role} (pid {pid}) is stopped (state T), and has been for {self._limits.stopped:g} s"
        return None

    def _late_beat(self) -> str | None:
        """A model whose process lives but does not beat; it must be late at three looks in a row."""
        late = [
            beat
            for beat in read_beats(self._server.heartbeats)
            if beat.pid in self._members and beat.age_s > self._limits.beat
        ]
        self._late_looks = self._late_looks + 1 if late else 0
        if self._late_looks < 3:
            return None
        return f"the model {late[0].model} (pid {late[0].pid}) hangs: no heartbeat for {late[0].age_s:.0f} s"

    def _changed_weights(self) -> str | None:
        for file in self._weights:
            try:
                file.require_unchanged()
            except EngineError as error:
                return str(error)
        return None

    def _stuck_engine(self) -> str | None:
        """A model that beats and whose engine has requests, but ends no step."""
        for beat in read_beats(self._server.heartbeats):
            if beat.pid in self._members and beat.stuck_s > self._limits.step:
                return (
                    f"the engine of the model {beat.model} (pid {beat.pid}) hangs: it has requests, and has ended no "
                    f"step for {beat.stuck_s:.0f} s"
                )
        return None

    def _no_answer(self) -> str | None:
        silent_s = self._prober.silent_s()
        if silent_s <= self._limits.liveness:
            return None
        return f"{SERVER_PROGRAM} hangs: it has not answered its liveness for {silent_s:.0f} s"


@dataclass(frozen=True)
class _Member:
    role: str  # what it is to the server, for messages
    start_time: int


def _members(server: Server) -> dict[int, _Member]:
    """Pid to process, of the processes that a server needs: tritonservers, the models' Python processes, launchers."""
    found = {process.pid: process for process in descendants_of(server.process.pid)}
    mark = f"{MARK_VARIABLE}={server.mark}".encode()
    roles = {
        pid: role
        for pid, process in found.items()
        if not process.has_ended and has_variable(pid, mark) and (role := _role(process))
    }
    members = {pid: _Member(role, found[pid].start_time) for pid, role in roles.items()}
    # Instances that beat and then ended before this look. Their models are loaded, so Triton did not end them.
    loaded = {model.name for model in server.models if model.ready}
    beats = [beat for beat in read_beats(server.heartbeats) if beat.model in loaded and beat.pid not in members]
    ended = {beat.pid: _Member(f"the Python process of the model {beat.model}", _NEVER) for beat in beats}
    return members | ended | _program(server)


def _program(server: Server) -> dict[int, _Member]:
    """The program that was started, which may hang too."""
    process = read_process(server.process.pid)
    return {} if process is None else {process.pid: _Member(server.program, process.start_time)}


def _role(process: Process) -> str | None:
    """What a process is to the server; None for a process that the server does not need, such as a library's helper."""
    words = process.words()
    if model := model_of(words):
        return f"the Python process of the model {model}"
    name = Path(words[0]).name if words else ""
    return name if name == SERVER_PROGRAM or name in _LAUNCHER_WORDS else None


def _signal_name(status: int) -> str:
    """The name, in brackets, of the signal that ended a process; empty if none did."""
    if status >= 0:
        return ""
    try:
        return f" ({signal.Signals(-status).name})"
    except ValueError:  # a real-time signal has no name
        return ""


class _CertificateEnd:
    """Warns while a server runs that its certificate ends: when 30, 7 and 1 days are left, and when it has ended."""

    def __init__(self, ends: datetime) -> None:
        self._ends = ends
        self._told = self._step(datetime.now(UTC))  # the check before the start has told what holds then

    def warn(self, now: datetime) -> None:
        step = self._step(now)
        if step > self._told:
            self._told = step
            at = f"{self._ends:%Y-%m-%d %H:%M} UTC"
            if now >= self._ends:
                logger.error("the server's certificate ended on %s: new connections fail; start with another one", at)
            else:
                logger.warning("the server's certificate ends on %s; start again with a renewed one before", at)

    def _step(self, now: datetime) -> int:
        return sum(now >= self._ends - timedelta(days=days) for days in _WARNED_DAYS)


class _Prober:
    """Asks in its own thread whether the server is live, since a hung server answers late or never."""

    def __init__(self, endpoint: HealthEndpoint, limits: Limits) -> None:
        self._endpoint, self._limits = endpoint, limits
        self._answered = time.monotonic()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="liveness", daemon=True).start()

    def _run(self) -> None:
        while not self._ended.wait(max(self._limits.interval, self._limits.liveness / 15)):
            if is_live(self._endpoint, self._limits.liveness / 3):
                self._answered = time.monotonic()

    def silent_s(self) -> float:
        """Seconds since the server last said that it is live."""
        return time.monotonic() - self._answered

    def forgive(self) -> None:
        """Count the seconds from this moment on."""
        self._answered = time.monotonic()

    def stop(self) -> None:
        self._ended.set()
