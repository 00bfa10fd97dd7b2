"""A program that a stage runs, and that ends when the stage does: a command in, a running process out.

    with child_program(["trtllm-build", ...], cwd=folder, stdout=subprocess.PIPE) as process:
        for line in process.stdout: ...
        status = process.wait()

It leads a process group of its own. Where the block is left early, by Ctrl-C or an error, the group is asked to end,
and killed when it does not. Where this process is killed outright, the kernel asks the program to end (Linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

END_GRACE_S = 10  # a call into TensorRT sees no signal before it returns
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextlib.contextmanager
def child_program(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:  # noqa: ANN401 - Popen's
    """Start a program that reads nothing; `options` are Popen's. Raises OSError where it cannot be started."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, text=True, errors="replace", process_group=0, preexec_fn=follow_parent(),
        **options,
    )  # fmt: skip
    with process:
        try:
            yield process
        except BaseException:
            _end(process)
            raise


def follow_parent() -> Callable[[], None] | None:
    """What a child runs before it becomes the program: ask the kernel for SIGTERM when its parent ends."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def follow() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the kernel was asked
            os._exit(1)

    return follow


def _end(process: subprocess.Popen[str]) -> None:
    """Ask the group to end, then kill what is left of it. A second interrupt kills at once."""
    with contextlib.suppress(KeyboardInterrupt, ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
