"""The workers of one engine: each computes one request at a time, and further requests wait in a queue.

    workers = Workers([seat, ...], heartbeat)
    workers.submit(Job(names=frozenset({"7"}), respond=..., withdrawn=..., outlet=Outlet(send, fail, is_cancelled)))
    workers.stop("7")     # ends the requests with that name, whether they run or wait
    workers.drain()       # refuses waiting and further requests; running ones are finished
    workers.close()

Every method except `close` returns at once, so that a model's `execute` can always take the next request. A waiting
request is answered without a worker if it is stopped, if its client has gone, or if the server is about to end. No lock
is held while an engine computes. While a response is sent, only the lock of its request is held.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from triton_repo.runtime.responses import server_stopping

logger = logging.getLogger(__name__)

# How often Triton is asked whether the clients of waiting requests have gone. It takes about 0.1 ms for each request.
LOOK_INTERVAL_S = 0.2

Seat = TypeVar("Seat")
Response = TypeVar("Response")


class Pulse(Protocol):
    """The methods of `triton_repo.processes.heartbeat.Heartbeat` that are used here."""

    def report(self, *, running: int, waiting: int) -> None:
        """Set the numbers of requests."""

    def step(self) -> None:
        """Count a step of the engine."""


class NoPulse:
    """A `Pulse` that does nothing, for callers without a supervisor."""

    def report(self, *, running: int, waiting: int) -> None:
        pass

    def step(self) -> None:
        pass


class Outlet(Generic[Response]):
    """Sends the responses of one request. Any thread may use it.

    `send` takes a response and whether it is the last, `fail` takes the error that ends the request, and `is_cancelled`
    asks Triton whether the client has gone. Triton 2.51 crashes if it is asked about a request whose last response was
    sent (TRITONBACKEND_ResponseFactoryIsCancelled of a freed factory), so after that response it is not asked.
    """

    def __init__(
        self,
        send: Callable[[Response, bool], None],
        fail: Callable[[Exception], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        self._send, self._fail, self._is_cancelled = send, fail, is_cancelled
        self._is_closed = False
        self._lock = threading.Lock()

    def send(self, response: Response, is_last: bool) -> None:
        """Send a response."""
        with self._lock:
            self._is_closed = is_last
            self._send(response, is_last)

    def fail(self, error: Exception) -> None:
        """Send the error that ends the request."""
        with self._lock:
            self._is_closed = True
            self._fail(error)

    def is_cancelled(self) -> bool:
        """Whether the client has gone or has got its last response."""
        with self._lock:
            return self._is_closed or self._is_cancelled()


@dataclass(frozen=True, kw_only=True, eq=False)
class Job(Generic[Seat, Response]):
    """One request. Two jobs are never equal.

    `respond(seat, is_over)` computes the responses, each with whether it is the last, and calls `is_over` before every
    step of the engine. `withdrawn()` gives the last response of a request that ended before it was computed.
    """

    names: frozenset[str]  # names by which a request to stop may name this one: its id, the key of its answer
    respond: Callable[[Seat, Callable[[], bool]], Iterator[tuple[Response, bool]]]
    withdrawn: Callable[[], Response]
    outlet: Outlet[Response]
    stopped: threading.Event = field(default_factory=threading.Event)

    def is_over(self) -> bool:
        """Whether no client waits for further responses."""
        return self.stopped.is_set() or self.outlet.is_cancelled()


class Workers(Generic[Seat]):
    """One thread for each seat. A seat is what one worker uses alone: a session and its cache."""

    def __init__(self, seats: Sequence[Seat], pulse: Pulse | None = None) -> None:
        self._pulse = pulse or NoPulse()
        self._waiting: deque[Job[Seat, Any]] = deque()
        self._running: list[Job[Seat, Any]] = []
        self._changed = threading.Condition()  # guards all of these
        self._draining = self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(seat,), name=f"worker-{number}", daemon=True)
            for number, seat in enumerate(seats)
        ]
        self._threads.append(threading.Thread(target=self._look_after_waiting, name="waiting-room", daemon=True))
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job[Seat, Any]) -> None:
        """Queue a request. It is refused if the server is about to end."""
        with self._changed:
            refused = self._draining or self._closed
            if not refused:
                self._waiting.append(job)
                self._report()
                self._changed.notify_all()
        if refused:
            _refuse(job)

    def stop(self, name: str) -> int:
        """End the requests with a name. Returns how many there were. A waiting request is answered before this returns,
        a running one ends before its next step. No request has the name ""."""
        with self._changed:
            running = [job for job in self._running if name in job.names]
            waiting = self._take_waiting(lambda job: name in job.names)
        for job in running:
            job.stopped.set()
        for job in waiting:
            _withdraw(job)
        return len(running) + len(waiting)

    def drain(self) -> None:
        """Refuse the requests that wait and all further ones."""
        with self._changed:
            self._draining = True
            refused = self._take_waiting(lambda _job: True)
        for job in refused:
            _refuse(job)

    def close(self) -> None:
        """Stop the running requests, withdraw the waiting ones, and end the threads."""
        with self._changed:
            self._closed = True
            running, waiting = list(self._running), self._take_waiting(lambda _job: True)
            self._changed.notify_all()
        for job in running:
            job.stopped.set()
        for job in waiting:
            _withdraw(job)
        for thread in self._threads:
            thread.join()

    def _take_waiting(self, chosen: Callable[[Job[Seat, Any]], bool]) -> list[Job[Seat, Any]]:
        """Remove waiting requests. The caller holds the lock."""
        taken = [job for job in self._waiting if chosen(job)]
        for job in taken:
            self._waiting.remove(job)
        self._report()
        return taken

    def _report(self) -> None:
        self._pulse.report(running=len(self._running), waiting=len(self._waiting))

    def _next(self) -> Job[Seat, Any] | None:
        """Wait for a request and take the one that has waited longest. None once the workers are closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            job = self._waiting.popleft()
            self._running.append(job)
            self._report()
            return job

    def _work(self, seat: Seat) -> None:
        while (job := self._next()) is not None:
            try:
                self._answer(job, seat)
            except Exception:  # whatever one request does, the worker goes on with the next
                logger.exception("the request %s can be sent neither its answer nor an error", _names(job))
            finally:
                with self._changed:
                    self._running.remove(job)
                    self._report()

    def _answer(self, job: Job[Seat, Any], seat: Seat) -> None:
        """Send the responses of a request, or the error that ends it. Raises what sending the error raises: after a
        failure at the last response, nothing more can be sent."""

        def is_over() -> bool:
            self._pulse.step()
            return job.is_over()

        try:
            for response, is_last in job.respond(seat, is_over):
                job.outlet.send(response, is_last)
        except Exception as error:  # whatever it is, the client is told
            job.outlet.fail(error)

    def _look_after_waiting(self) -> None:
        """Withdraw the waiting requests whose clients have gone."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                waiting = list(self._waiting)
            gone = {job for job in waiting if _has_gone(job)}
            with self._changed:
                withdrawn = self._take_waiting(gone.__contains__)
            for job in withdrawn:
                _withdraw(job)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=LOOK_INTERVAL_S)


def _has_gone(job: Job[Any, Any]) -> bool:
    try:
        return job.outlet.is_cancelled()
    except Exception:  # the request goes on waiting
        logger.exception("cannot tell whether the client of the request %s has gone", _names(job))
        return False


def _withdraw(job: Job[Any, Any]) -> None:
    """End a request that no worker has begun."""
    try:
        job.outlet.send(job.withdrawn(), True)
    except Exception as error:  # whatever it is, the client is told
        _fail(job, error)


def _refuse(job: Job[Any, Any]) -> None:
    _fail(job, server_stopping())


def _fail(job: Job[Any, Any], error: Exception) -> None:
    try:
        job.outlet.fail(error)
    except Exception:  # the other requests must still be answered
        logger.exception("the request %s can be sent neither its answer nor an error", _names(job))


def _names(job: Job[Any, Any]) -> str:
    return " ".join(sorted(job.names)) or "without an id"
