"""Sends the responses of one request, and asks whether its client has gone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Response = TypeVar("Response")


class Outlet(Generic[Response]):
    """Sends the responses of one request. Any thread may use it.

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
    ) -> None:
        self._send, self._fail, self._is_cancelled = send, fail, is_cancelled
        self._has_ended = False  # nothing more is sent
        self._is_closed = False  # Triton is not asked any more
        self._lock = threading.Lock()

    def send(self, response: Response, is_last: bool) -> None:
        """Send a response. If that raises, `fail` can still tell the client."""
        with self._lock:
            if self._has_ended:
                return
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
