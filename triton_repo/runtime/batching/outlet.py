"""Sends the responses of one request, and asks whether its client has gone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Response = TypeVar("Response")


def all_of(responses: Sequence[Response]) -> Sequence[Response]:
    """A `merge` that leaves responses as they are."""
    return responses


class Outlet(Generic[Response]):
    """Sends the responses of one request. Any thread may use it.

    One thread puts responses in, and another one flushes them, so that nobody who computes waits for Triton. Responses
    that wait to be sent are merged: `merge` takes them in their order and gives those that are sent in their place. A
    response costs Triton some 0.2 ms, so without that a small model would wait for its responses.

    `send` takes a response and whether it is the last, `fail` takes the error that ends the request, and `is_cancelled`
    asks Triton whether the client has gone. A request ends once: after its last response or an error nothing is sent,
    whoever still tries to. Triton 2.51 crashes if it is asked about a request whose last response was sent
    (TRITONBACKEND_ResponseFactoryIsCancelled of a freed factory), so after that response it is not asked.
    """

    def __init__(
        self,
        send: Callable[[Response, bool], None],
        fail: Callable[[Exception], None],
        is_cancelled: Callable[[], bool],
        merge: Callable[[Sequence[Response]], Sequence[Response]] = all_of,
    ) -> None:
        self._send, self._fail, self._is_cancelled, self._merge = send, fail, is_cancelled, merge
        self._waiting: list[Response] = []
        self._has_last = False  # whether the last response waits
        self._putting = threading.Lock()  # guards these two
        self._has_ended = False  # nothing more is sent
        self._is_closed = False  # Triton is not asked any more
        self._lock = threading.Lock()  # held while something is sent or asked

    def put(self, response: Response, is_last: bool) -> bool:
        """Have a response sent by the next `flush`. Returns whether that must be called: False if it will be for an
        earlier response."""
        with self._putting:
            self._waiting.append(response)
            self._has_last = self._has_last or is_last
            return len(self._waiting) == 1

    def flush(self) -> None:
        """Send what was put in. If that raises, `fail` can still tell the client."""
        with self._lock:
            with self._putting:
                waiting, self._waiting = self._waiting, []
                has_last = self._has_last
            if self._has_ended or not waiting:
                return
            responses = self._merge(waiting) if len(waiting) > 1 else waiting
            for number, response in enumerate(responses, start=1):
                is_last = has_last and number == len(responses)
                self._is_closed = is_last
                self._send(response, is_last)
                self._has_ended = is_last

    def fail(self, error: Exception) -> None:
        """Send the error that ends the request."""
        with self._lock:
            if self._has_ended:
                return
            self._has_ended = self._is_closed = True
            self._fail(error)

    def is_cancelled(self) -> bool:
        """Whether the client has gone or has got its last response."""
        with self._lock:
            return self._is_closed or self._is_cancelled()
