"""A program that a stage runs, and that ends when the stage does: a command in, a running process out.

    with child_program(["trtllm-build", ...], cwd=folder, stdout=subprocess.PIPE) as process:
        for line in process.stdout: ...
        status = process.wait()

It leads a process group of its own. Where the block is left early, by Ctrl-C or an error, the group is asked to end,
and killed when it does not. Where this process is killed outright, the kernel asks the program to end (Linux).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

END_GRACE_S = 10  # a call into TensorRT sees no signal before it returns
# Python ignores these two signals, and a program that it becomes would go on ignoring them. 1 is PR_SET_PDEATHSIG of
# linux/prctl.h; a parent that ended before the kernel was asked is another by now.
_FOLLOW = """
import ctypes, os, resource, signal, sys
parent, stack_bytes, program, *command = sys.argv[1:]
soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
wanted = int(stack_bytes) if hard == resource.RLIM_INFINITY else min(int(stack_bytes), hard)
if soft != resource.RLIM_INFINITY and soft < wanted:
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
for number in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(number, signal.SIG_DFL)
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(parent):
    os.execv(program, command)
"""


@contextlib.contextmanager
def child_program(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:  # noqa: ANN401 - Popen's
    """Start a program that reads nothing; `options` are Popen's. Raises OSError where it cannot be started."""
    process = subprocess.Popen(
        ending_with_parent(command), stdin=subprocess.DEVNULL, text=True, errors="replace", process_group=0, **options
    )
    with process:
        try:
            yield process
        except BaseException:
            _end(process)
            raise


def ending_with_parent(command: Sequence[str], stack_bytes: int = 0) -> list[str]:
    """The command, started by one that has the kernel send SIGTERM when this process ends (Linux). Its threads get
    stacks of at least `stack_bytes`, where this user may have them.

    It is asked in a program of its own and not between fork and exec: there the handlers of libraries that this process
    has loaded would run, and gRPC's may abort. Raises FileNotFoundError where there is no such program.
    """
    program = shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _FOLLOW, str(os.getpid()), str(stack_bytes), program, *command]


def _end(process: subprocess.Popen[str]) -> None:
    """Ask the group to end, then kill what is left of it. A second interrupt kills at once."""
    with contextlib.suppress(KeyboardInterrupt, ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
