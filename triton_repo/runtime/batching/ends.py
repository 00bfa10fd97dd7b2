"""Ends requests and their sequences, whatever the reason, and sends what their clients get.

Nothing here computes. A client that cannot be told of an end is logged, and holds up no other client.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from triton_repo.errors import RequestError
from triton_repo.runtime.batching.accounts import Accounts
from triton_repo.runtime.batching.refusals import overloaded
from triton_repo.runtime.batching.scheduler import Scheduler
from triton_repo.runtime.batching.sequence import Request, Sequence, Writer

logger = logging.getLogger(__name__)

_RECENT = 0.2  # weight of the last request in the mean time of an answer


class Ends:
    """The ends of the requests of one engine. `lock` guards the scheduler's lists; callers do not hold it. `post` runs
    an action that sends something."""

    def __init__(
        self,
        scheduler: Scheduler,
        accounts: Accounts,
        lock: threading.Lock,
        post: Callable[[Callable[[], object]], object],
    ) -> None:
        self._scheduler, self._accounts, self._lock, self._post = scheduler, accounts, lock, post
        self._answer_s = 1.0  # how long a sequence runs, on average

    def finish(self, sequence: Sequence, reason: str, now: float) -> None:
        """A sequence has its last token."""
        self._end(sequence, reason)
        if sequence.request.begun_s is not None:
            self._answer_s += _RECENT * (now - sequence.request.begun_s - self._answer_s)

    def cancel(self, sequence: Sequence, how: str) -> None:
        """End a sequence that nobody waits for."""
        self._end(sequence, how)
        self._send_cancelled(sequence.request, sequence.writer, is_last=not sequence.request.num_running)

    def fail_running(self, request: Request[Any], error: Exception) -> None:
        """End all sequences of a request with an error."""
        for sequence in [s for s in self._scheduler.running if s.request is request]:
            self._end(sequence, "failed", error)
        self._post(partial(_fail, request, error))

    def fail_step(self, sequences: Iterable[Sequence], error: Exception) -> None:
        """End the requests whose sequences were in a step that failed. How far it wrote into their slots is not
        known."""
        failed = dict.fromkeys(sequence.request for sequence in sequences)
        for sequence in self._scheduler.running:
            if sequence.request in failed:
                self._scheduler.slots.count_all(sequence.slot)
        for request in failed:
            if request.num_running:
                self.fail_running(request, error)

    def fail_waiting(self, request: Request[Any], error: Exception) -> None:
        """End a request that has not begun with an error that is not its own."""
        self._accounts.ended(request, "failed", error)
        self._post(partial(_fail, request, error))

    def withdraw(self, request: Request[Any], how: str) -> None:
        """End a request that has not begun and that nobody waits for."""
        self._accounts.ended(request, how)
        last = request.writers[-1]
        for writer in request.writers:
            self._send_cancelled(request, writer, is_last=writer is last)

    def refuse(self, request: Request[Any], error: Exception, reason: str) -> None:
        """Send the error of a request that does not begin."""
        self._accounts.refused(request, reason, error)
        self._post(partial(_fail, request, error))

    def send(self, request: Request[Any], response: Any, *, is_last: bool) -> None:  # noqa: ANN401 - the layout's own
        """Have a response sent."""
        if request.outlet.put(response, is_last):
            self._post(partial(_flush, request))

    def overloaded(self, problem: str) -> RequestError:
        """The error of a request for which there is no room or no time."""
        return overloaded(problem, len(self._scheduler.waiting), self._scheduler.slots.num_slots, self._answer_s)

    def _end(self, sequence: Sequence, how: str, error: Exception | None = None) -> None:
        with self._lock:
            # What failed may hold keys and values that are wrong.
            self._scheduler.end(sequence, keeps=how != "failed")
        if not sequence.request.num_running:
            self._accounts.ended(sequence.request, how, error)

    def _send_cancelled(self, request: Request[Any], writer: Writer[Any], *, is_last: bool) -> None:
        try:
            response = writer.cancel()
        except Exception as error:  # whatever it is, the client is told
            self._post(partial(_fail, request, error))
            return
        self.send(request, response, is_last=is_last)


def names_of(request: Request[Any]) -> str:
    """How a log names a request."""
    return " ".join(sorted(request.names)) or "without an id"


def _flush(request: Request[Any]) -> None:
    try:
        request.outlet.flush()
    except Exception as error:  # whatever it is, the client is told
        request.is_gone = True
        _fail(request, error)


def _fail(request: Request[Any], error: Exception) -> None:
    try:
        request.outlet.fail(error)
    except Exception:  # the other requests must still be answered
        logger.exception("the request %s can be sent neither its answer nor an error", names_of(request))
