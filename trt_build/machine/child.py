"""Starts a child program that ends when this process ends: a command in, a running process out.

    with child_program(["trtllm-build", ...], cwd=folder, stdout=subprocess.PIPE) as process:
        for line in process.stdout: ...
        status = process.wait()

The child leads a process group of its own. If Ctrl-C or an error ends the block, the group gets SIGTERM, and SIGKILL if
it has not ended after END_GRACE_S. If this process is killed, the kernel sends SIGTERM to the child (Linux only).
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

END_GRACE_S = 10  # seconds; Python handles a signal only after the running call into TensorRT returns
# Python ignores SIGPIPE and SIGXFSZ, and a program that it executes inherits this, so both are set back to their
# defaults. 1 is PR_SET_PDEATHSIG of linux/prctl.h. If the parent ended before prctl was called, no signal would come;
# getppid gives another process then, and the command is not run.
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
    """Start a child program with an empty standard input; `options` are Popen's. Raises OSError if it cannot start."""
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
    """A command that runs `command` so that the kernel sends it SIGTERM when this process ends (Linux only). The stacks
    of its threads have at least `stack_bytes`, as far as this user's limits allow.

    A separate Python program makes the request and then executes the command. Making it between fork and exec of this
    process would run the fork handlers of loaded libraries, and gRPC's handlers may abort. Raises FileNotFoundError if
    there is no such program.
    """
    program = shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _FOLLOW, str(os.getpid()), str(stack_bytes), program, *command]


def _end(process: subprocess.Popen[str]) -> None:
    """Send SIGTERM to the process group, then SIGKILL after END_GRACE_S. A second Ctrl-C sends SIGKILL at once."""
    with contextlib.suppress(KeyboardInterrupt, ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
