"""Runs a program, and afterwards ends it together with every process that it started.

    with running_program(Program(arguments=["tritonserver", ...], environment=environment, ...), log, mark) as process:
        process.wait()

The program leads a session of its own. Its processes are found by the session or by a mark in their environment:
mpirun gives each rank a process group, and processes that MPI spawns may leave the session too. If the parent process
is killed, the kernel sends the program SIGTERM (Linux). The kernel does so already when the thread that started the
program ends, so start it from a thread that lives as long as the program. `launcher.py` runs a launcher such as mpirun,
so that its ranks end in order then too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.files.own_files import open_log
from triton_repo.errors import ServerError
from trt_build.machine.child import ending_with_parent

logger = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 5  # for requests in flight to finish after the server was asked to stop
PRIVATE_UMASK = 0o077
KILL_GRACE_S = 10  # after that time, before every process is killed
POLL_INTERVAL_S = 0.1
MARK_VARIABLE = "MOESHIP_SERVER"
LAUNCHER = "triton_repo.processes.launcher"
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Program:
    """A command and how to run it."""

    arguments: Sequence[str]  # the program first
    environment: Mapping[str, str]
    folder: Path  # working directory
    is_launcher: bool = False  # the program starts the processes that do the work, as mpirun does
    end_timeout_s: float = DRAIN_TIMEOUT_S  # seconds to end in after SIGTERM; KILL_GRACE_S later it is killed
    stack_bytes: int = 0  # the least stack of each of its threads
    inherited: tuple[int, ...] = ()  # open files that it gets too, by the same numbers; a launcher's program does not


@contextlib.contextmanager
def running_program(program: Program, log: Path | None, mark: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program. When the block ends, end it and every process that it started, and remove its shared memory. No
    other user can read the files and the shared memory that it makes.

    `log` gets the output; None is stderr. `mark` must be unique; the names of the program's shared memory begin with
    it. Raises ServerError if the log cannot be opened or the program cannot be started.
    """
    logger.debug("starting %s", " ".join(program.arguments))
    watched = [sys.executable, "-m", LAUNCHER, mark, f"{program.end_timeout_s:g}"] if program.is_launcher else []
    with contextlib.ExitStack() as files:
        if log is None:
            output = sys.stderr.fileno()
        else:
            output = files.enter_context(open_log(log, "opening the server's log", ServerError))
        try:
            process = subprocess.Popen(
                ending_with_parent([*watched, *program.arguments], program.stack_bytes),
                env={**program.environment, MARK_VARIABLE: mark},
                cwd=program.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=program.inherited,
                umask=PRIVATE_UMASK,
            )
        except OSError as error:
            raise ServerError(f"starting {program.arguments[0]}: {error.strerror} ({error.filename})") from error
    try:
        yield process
    finally:
        try:
            _stop(process, mark, program.end_timeout_s)
        finally:
            clear_memory(mark)


def _stop(process: subprocess.Popen[bytes], mark: str, end_timeout_s: float) -> None:
    """Send SIGTERM, wait, then kill the processes that are left. A second interrupt kills at once."""
    patience = end_timeout_s + KILL_GRACE_S
    with contextlib.suppress(KeyboardInterrupt):
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            logger.warning("the server did not end within %g s after it was asked to, and was killed", patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kill_left(process.pid, mark)


def kill_left(session: int | None, mark: str) -> None:
    """Kill every process that is in the session or has the mark, except this one, and wait until they have ended."""
    deadline = time.monotonic() + KILL_GRACE_S
    while left := [pid for pid in _left(session, mark) if pid != os.getpid()]:
        if time.monotonic() > deadline:
            logger.warning("processes of the server are still ending: %s", ", ".join(map(str, left)))
            return
        for pid in left:
            send_signal(pid, signal.SIGKILL)
        time.sleep(POLL_INTERVAL_S)


def clear_memory(mark: str) -> None:
    """Remove the shared memory whose names begin with the mark."""
    for region in _SHARED_MEMORY.glob(f"{mark}*"):
        region.unlink(missing_ok=True)


def protect_memory(mark: str) -> None:
    """Forbid other users to read the shared memory whose names begin with the mark.

    Triton's Python backend makes shared memory with Boost, which sets the mode after the creation and ignores the umask
    (boost/interprocess/shared_memory_object.hpp). Call this while models load, when the regions are still empty.
    """
    for region in _SHARED_MEMORY.glob(f"{mark}*"):
        with contextlib.suppress(OSError):  # it was removed meanwhile
            if region.stat().st_mode & PRIVATE_UMASK:
                region.chmod(0o600)


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of this machine, as proc(5) describes it."""

    pid: int
    parent: int
    session: int
    state: str  # proc(5)'s letter: T is stopped; Z has ended, and its parent has not asked for its status
    start_time: int  # clock ticks since the machine's start; differs where a later process got the same pid

    @property
    def has_ended(self) -> bool:
        return self.state in "ZX"

    def words(self) -> list[str]:
        """The program and its arguments; empty if the process has ended."""
        try:
            text = Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return []
        return [word.decode(errors="replace") for word in text.split(b"\0")[:-1]]


def read_process(pid: int) -> Process | None:
    """The process of a pid; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # proc(5): after the name in parentheses come state, parent, process group, session; the start time is the 20th.
    fields = text.rpartition(")")[2].split()
    return Process(pid=pid, state=fields[0], parent=int(fields[1]), session=int(fields[3]), start_time=int(fields[19]))


def start_time(pid: int) -> int | None:
    """The start time of a living process, as in `Process`; None if there is none."""
    found = read_process(pid)
    return None if found is None or found.has_ended else found.start_time


def all_processes() -> Iterator[Process]:
    """Every process of this machine, including those in state Z."""
    for path in Path("/proc").glob("[0-9]*"):
        if found := read_process(int(path.name)):
            yield found


def children_of(parent: int) -> list[int]:
    """The pids of the living processes that a process started."""
    return [found.pid for found in all_processes() if found.parent == parent and not found.has_ended]


def descendants_of(ancestor: int) -> list[Process]:
    """The processes that a process started, those that these started, and so on, including those in state Z."""
    found, family = list(all_processes()), {ancestor}
    while grown := {process.pid for process in found if process.parent in family} - family:
        family |= grown
    return [process for process in found if process.pid in family and process.pid != ancestor]


def _left(session: int | None, mark: str) -> list[int]:
    """The pids of the living processes that are in a session or have the mark."""
    variable = f"{MARK_VARIABLE}={mark}".encode()
    living = (found for found in all_processes() if not found.has_ended)
    return [found.pid for found in living if found.session == session or has_variable(found.pid, variable)]


def has_variable(pid: int, variable: bytes) -> bool:
    """Whether the environment of a process holds `variable`, which is b"NAME=value"."""
    try:
        return variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # another user's process, or it ended meanwhile
        return False


def send_signal(pid: int, number: signal.Signals) -> None:
    """Send a signal. Does nothing if the process has ended or belongs to another user."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
