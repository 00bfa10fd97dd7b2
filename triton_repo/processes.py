"""A program with every process that it starts: a command in, a running process out; none of them left afterwards.

    with running_program(Program(arguments=["tritonserver", ...], environment=environment, ...), log, mark) as process:
        process.wait()

The program leads a session of its own. Its processes are known by the session or by a mark in their environment, since
mpirun gives each of its ranks a process group, and what MPI spawns may leave the session too. Where the parent process
is killed outright, the kernel asks the program to end (Linux); it is bound to the thread that started it, so start it
from one that lives as long as it should. A launcher is watched (`watcher.py`), so that its ranks end in order then too.
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

from triton_repo.errors import ServerError
from trt_build.child import following

logger = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 5  # what requests in flight have to finish in when the server is asked to stop
KILL_GRACE_S = 10  # on top of it, before every process is killed
POLL_INTERVAL_S = 0.1
MARK_VARIABLE = "MOESHIP_SERVER"
WATCHER = "triton_repo.watcher"
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Program:
    """`arguments`, the program first; `folder` is where it works. A launcher, as mpirun, starts what does the work."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    is_launcher: bool = False


@contextlib.contextmanager
def running_program(program: Program, log: Path | None, mark: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program; end it with all that it started, and its shared memory, when the block ends.

    `log` gets the output, None is stderr. `mark` is unlike any other program's and begins the names of its shared
    memory. Raises ServerError where the log cannot be opened or the program not be started.
    """
    logger.debug("starting %s", " ".join(program.arguments))
    watched = [sys.executable, "-m", WATCHER, mark] if program.is_launcher else []
    with contextlib.ExitStack() as files:
        try:
            output = sys.stderr.fileno() if log is None else files.enter_context(log.open("ab")).fileno()
        except OSError as error:
            raise ServerError(f"opening the server's log {log}: {error.strerror}; name another file") from error
        try:
            process = subprocess.Popen(
                following([*watched, *program.arguments]),
                env={**program.environment, MARK_VARIABLE: mark},
                cwd=program.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ServerError(f"starting {program.arguments[0]}: {error.strerror} ({error.filename})") from error
    try:
        yield process
    finally:
        try:
            _stop(process, mark)
        finally:
            clear_memory(mark)


def _stop(process: subprocess.Popen[bytes], mark: str) -> None:
    """Ask for an orderly end, then kill what is left. A second interrupt kills at once."""
    with contextlib.suppress(KeyboardInterrupt):
        process.terminate()
        try:
            process.wait(DRAIN_TIMEOUT_S + KILL_GRACE_S)
        except subprocess.TimeoutExpired:
            logger.warning(
                "the server had not ended %d s after it was asked to; killed", DRAIN_TIMEOUT_S + KILL_GRACE_S
            )
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kill_left(process.pid, mark)


def kill_left(session: int, mark: str) -> None:
    """Kill every process of a session or with the mark but this one, and wait until they have ended."""
    deadline = time.monotonic() + KILL_GRACE_S
    while left := [pid for pid in _left(session, mark) if pid != os.getpid()]:
        if time.monotonic() > deadline:
            logger.warning("processes of the server are still ending: %s", ", ".join(map(str, left)))
            return
        for pid in left:
            send_signal(pid, signal.SIGKILL)
        time.sleep(POLL_INTERVAL_S)


def clear_memory(mark: str) -> None:
    """Give back the shared memory whose names begin with the mark."""
    for region in _SHARED_MEMORY.glob(f"{mark}*"):
        region.unlink(missing_ok=True)


def children_of(parent: int) -> list[int]:
    """The living processes that a process started."""
    return [found.pid for found in _processes() if found.parent == parent]


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    session: int


def _processes() -> Iterator[_Process]:
    """Every living process of this machine. One that ended but was not yet reaped by its parent is not living."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # proc(5): the fields after the name in parentheses are state, parent, process group, session.
            state, parent, _, session, *_ = path.read_text().rpartition(")")[2].split()
            if state not in "ZX":
                yield _Process(int(path.parent.name), int(parent), int(session))


def _left(session: int, mark: str) -> list[int]:
    """The processes of a session, and those that bear the mark."""
    variable = f"{MARK_VARIABLE}={mark}".encode()
    return [found.pid for found in _processes() if found.session == session or _bears(found.pid, variable)]


def _bears(pid: int, variable: bytes) -> bool:
    try:
        return variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # another user's process, or it ended meanwhile
        return False


def send_signal(pid: int, number: signal.Signals) -> None:
    """Nothing where the process has ended or is another user's."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
