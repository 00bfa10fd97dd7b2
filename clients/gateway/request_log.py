"""The line of JSON that each request gets where a log of requests is asked for.

Lines are written by a thread of their own. Where the disk is full, or it or a pipe's reader is slow, lines are dropped
and answers go on; the next line that is written says how many were dropped, as `dropped_lines`.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from export.errors import ConfigError
from export.files.own_files import open_log

logger = logging.getLogger(__name__)

MOST_WAITING = 10_000


class RequestLog:
    """Takes lines from the loop that serves, and drops them where too many wait. Without a file it drops all."""

    def __init__(self) -> None:
        self._lines: queue.Queue[dict[str, Any] | None] | None = None
        self._dropped = 0

    def add(self, line: dict[str, Any]) -> None:
        """Take one line."""
        if self._lines is None:
            return
        if self._dropped:
            line = {**line, "dropped_lines": self._dropped}
        try:
            self._lines.put_nowait(line)
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    @contextmanager
    def writing_to(self, descriptor: int) -> Iterator[None]:
        """Write what is added within the block to an open file."""
        lines = self._lines = queue.Queue(MOST_WAITING)
        writer = threading.Thread(target=_write, args=(lines, descriptor), name="moeship-request-log", daemon=True)
        writer.start()
        try:
            yield
        finally:
            self._lines = None
            with suppress(queue.Full):
                lines.put(None, timeout=1)
                writer.join(timeout=2)  # longer only where nobody reads the pipe


REQUEST_LOG = RequestLog()


@contextmanager
def logged_requests(path: Path | None) -> Iterator[None]:
    """Log the requests of this process's gateway to a file within the block; "-" is stdout. Raises ConfigError."""
    if path is None:
        yield
    elif str(path) == "-":
        with REQUEST_LOG.writing_to(os.dup(sys.stdout.fileno())):
            yield
    else:
        with open_log(path, "opening the request log", ConfigError) as descriptor, REQUEST_LOG.writing_to(descriptor):
            yield


def _write(lines: queue.Queue[dict[str, Any] | None], descriptor: int) -> None:
    lost, is_cut = 0, False  # lines since the last whole one; whether the file ends within a line
    while (line := lines.get()) is not None:
        if lost:
            line = {**line, "dropped_lines": line.get("dropped_lines", 0) + lost}
        left = data = memoryview((b"\n" if is_cut else b"") + json.dumps(line).encode() + b"\n")
        try:
            while left:
                left = left[os.write(descriptor, left) :]
            lost, is_cut = 0, False
        except OSError as error:  # the disk is full, for a while at least, or nobody reads any more
            if not lost:
                logger.warning("the request log cannot be written (%s); lines are dropped until it can", error.strerror)
            lost = line.get("dropped_lines", 0) + 1
            is_cut = is_cut or len(left) < len(data)
