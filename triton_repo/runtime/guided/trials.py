"""Tries grammars out in processes that can be killed, before the server compiles them.

    trials = Trials(LIMITS)
    trials.check(grammar)      # raises RequestError where compiling takes too long or too much memory

The library's limits do not bound all of its work: some schemas of a few hundred bytes take it hours or gigabytes. A
thread in the library cannot be stopped, and memory that it cannot get ends the whole process. So each grammar is first
compiled by a process of its own (`trial.py`), as fast as here. What that process has compiled ends here as well.
"""

from __future__ import annotations

import atexit
import json
import logging
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from triton_repo.runtime.guided import trial
from triton_repo.runtime.options import refusal

logger = logging.getLogger(__name__)

CPU_S = 4.0  # of processor time that a trial may take; the dearest guides that are served take 0.7 s
LONGEST_S = 15.0  # of a trial, on a machine where others have most of the processors
MOST_BYTES = 1 << 30  # of memory that a trial may take
_START_S = 60.0  # for a process to begin; it takes 0.05 s on an idle machine
_END_S = 1.0  # for a process to end whose input has ended
_MOST_TRIALS = 1000  # of one process, so that memory that it loses is found again


class Trials:
    """Processes that try grammars, as many as there are threads that ask at a time. They stay for the next grammar, and
    end with this process. Any thread may call it."""

    def __init__(
        self,
        limits: Mapping[str, int],
        *,
        cpu_s: float = CPU_S,
        longest_s: float = LONGEST_S,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._arguments = [f"{cpu_s:g}", str(most_bytes), json.dumps(dict(limits))]
        self._longest_s = longest_s
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        atexit.register(self.close)

    def check(self, grammar: str) -> None:
        """Raise RequestError where compiling a grammar takes too long or too much memory. Errors of the grammar are
        not looked at. Where no process can be started, that is logged and nothing is checked."""
        process = self._taken()
        if process is None:
            return
        if process.tries(grammar, self._longest_s):
            with self._lock:
                self._idle.append(process)
            return
        status = process.close()
        logger.info("the process that tried a guide ended with status %d", status)
        takes = "too long" if process.is_late or status == -signal.SIGPROF else "too much memory"
        raise refusal([f"guided_decoding_guide: compiling it takes {takes}; send a simpler one"])

    def close(self) -> None:
        """End the processes that try nothing."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.close()

    def _taken(self) -> _Process | None:
        """A process that waits for a grammar."""
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None:
                break
            if process.is_alive() and process.num_tried < _MOST_TRIALS:
                return process
            process.close()
        try:
            return _Process(self._arguments)
        except OSError as error:
            logger.warning("guides are compiled without a trial, since no process could be started for it: %s", error)
            return None


class _Process:
    """One process that runs trial.py. One thread at a time calls it. Raises OSError where it does not start."""

    def __init__(self, arguments: list[str]) -> None:
        found = find_spec("llguidance")
        if found is None or found.origin is None:
            raise OSError("the package llguidance is not there as files")
        folder = str(Path(found.origin).parent.parent)
        self.num_tried, self.is_late = 0, False
        # A session of its own: Ctrl-C is for the server, which ends this process by the end of its input.
        self._process = subprocess.Popen(
            [sys.executable or "python3", "-I", "-S", str(Path(trial.__file__)), folder, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        if not self._has_answered(_START_S):
            raise OSError(f"{sys.executable} ended with status {self.close()} before it tried anything")

    def is_alive(self) -> bool:
        """Whether it has not ended by itself."""
        return self._process.poll() is None

    def tries(self, grammar: str, within_s: float) -> bool:
        """Whether the compiling of a grammar ended. If not, `is_late` says whether it took more than `within_s`."""
        self.num_tried += 1
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(grammar).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return False
        return self._has_answered(within_s)

    def _has_answered(self, within_s: float) -> bool:
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        self.is_late = not poll.poll(within_s * 1000)
        return not self.is_late and self._process.stdout.read(1) == b"\n"

    def close(self) -> int:
        """End it by the end of its input, or kill it; its exit status, minus the signal that ended it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        return self._process.returncode
