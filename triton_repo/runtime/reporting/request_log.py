"""Writes a line of JSON for each request that has ended, where `moeship serve --request-log` asks for it.

    log = RequestLog.from_environment("phixtral")
    engine.accounts.report = log and log.add
    ...
    log.close()

    {"time": "2026-03-01T09:30:00.125Z", "model": "phixtral", "id": "7", "end": "stop", "status": "OK",
     "prompt_tokens": 5, "reused_tokens": 0, "output_tokens": 32, "queued_s": 0.0, "first_token_s": 0.09,
     "total_s": 1.4}

Neither prompts nor answers are in it. `serve` opens the file and the models inherit it, so it may be a pipe. A thread
of its own writes, so that a reader that stops reading holds up no answer: lines that find no room are dropped, and the
next line says how many.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from datetime import UTC, datetime

from export.files.reading import whole_number
from triton_repo.contracts.server_variables import REQUEST_LOG_VARIABLE
from triton_repo.runtime.batching.accounts import Ended

logger = logging.getLogger(__name__)

MOST_LINES = 10_000  # that wait to be written
MOST_ID = 256  # characters of a request's id. With it a line fits 4,096 bytes, which a pipe takes as one (pipe(7))


class RequestLog:
    """Writes lines to an open file. Any thread may call `add`."""

    def __init__(self, descriptor: int, model: str) -> None:
        self._descriptor, self._model = descriptor, model
        self._lines: queue.Queue[dict[str, object] | None] = queue.Queue(MOST_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._thread.start()

    @classmethod
    def from_environment(cls, model: str) -> RequestLog | None:
        """The log that the environment names, if any."""
        descriptor = whole_number(os.environ.get(REQUEST_LOG_VARIABLE, ""), 0, 1 << 20)
        return None if descriptor is None else cls(descriptor, model)

    def add(self, ended: Ended) -> None:
        """Have a line written, without waiting for it."""
        line: dict[str, object] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "model": self._model,
            "id": ended.request_id[:MOST_ID],
            "end": ended.end,
            "status": ended.status,
            "prompt_tokens": ended.prompt_tokens,
            "reused_tokens": ended.reused_tokens,
            "output_tokens": ended.output_tokens,
            "queued_s": _milliseconds(ended.queued_s),
            "first_token_s": _milliseconds(ended.first_token_s),
            "total_s": _milliseconds(ended.total_s),
        }
        if self._dropped:
            line["dropped_lines"] = self._dropped
        try:
            self._lines.put_nowait(line)
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def close(self, patience_s: float = 1.0) -> None:
        """Write what waits, but do not wait for long."""
        try:
            self._lines.put(None, timeout=patience_s)
        except queue.Full:
            return
        self._thread.join(patience_s)

    def _run(self) -> None:
        has_failed = False
        while (line := self._lines.get()) is not None:
            try:
                os.write(self._descriptor, f"{json.dumps(line)}\n".encode())
                has_failed = False
            except OSError:  # its reader has gone, or the disk is full
                if not has_failed:
                    logger.exception("the request log cannot be written; its lines are lost until it can")
                has_failed = True


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
