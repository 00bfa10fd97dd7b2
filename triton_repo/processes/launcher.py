"""Runs a launcher such as mpirun, and ends its ranks in order.

    python -m triton_repo.processes.launcher MARK SECONDS mpirun ...

This process gets SIGTERM when the server is to end; the kernel sends it too if the parent has ended. It then passes the
signal to the launcher's children and not to the launcher: mpirun kills its ranks half a second after its own SIGTERM
(Open MPI 5.0.11, measured), and a server needs longer. However the launcher ends, every process that it started is
ended, and this process ends with the launcher's status.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from triton_repo.processes.program import KILL_GRACE_S, children_of, clear_memory, kill_left, send_signal
from trt_build.machine.child import ending_with_parent


class _Asked(BaseException):
    """This process got SIGTERM."""


def watch(mark: str, end_timeout_s: float, command: Sequence[str]) -> int:
    """Run the command. Returns its status, negative for a signal. After SIGTERM its children have `end_timeout_s`."""
    signal.signal(signal.SIGTERM, _ask)
    process = None
    try:
        process = subprocess.Popen(ending_with_parent(command))
        return process.wait()
    except _Asked:
        return 0 if process is None else _end(process, end_timeout_s)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        kill_left(os.getsid(0), mark)
        clear_memory(mark)


def _end(process: subprocess.Popen[bytes], end_timeout_s: float) -> int:
    """Send SIGTERM to the launcher's children and wait for the launcher. This process is killed only later: of the
    KILL_GRACE_S that it has besides `end_timeout_s`, it waits half."""
    for pid in children_of(process.pid) or [process.pid]:
        send_signal(pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(end_timeout_s + KILL_GRACE_S / 2)
    return process.returncode or 0


def _ask(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Asked


def main(words: Sequence[str]) -> int:
    """Returns the launcher's status, or ends by the signal that ended the launcher."""
    mark, end_timeout_s, *command = words
    status = watch(mark, float(end_timeout_s), command)
    if status < 0:
        number = -status
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
