"""Runs an engine of sequences in a server: one thread steps, another one sends.

    runner = Runner(lambda post: SequenceEngine(..., post=post), heartbeat)
    runner.submit(request)
    runner.stop("7")
    runner.drain()
    runner.end_running()
    runner.close()

Every method except `close` returns at once, so that a model's `execute` can always take the next request. Responses are
sent while the next step is computed. The sending thread asks once a step whether each client has gone, which takes
about 0.1 ms for each request. In a long step it asks shortly before the end, so that a slot is free after the step in
which its client left, and not one step later.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from triton_repo.runtime.batching.engine import SequenceEngine
from triton_repo.runtime.batching.sequence import Request

logger = logging.getLogger(__name__)

_Action = Callable[[], object]
# A shorter step is not worth a wait for its end: clients are asked for behind it.
LONG_STEP_S = 0.02
_AWAITED_LOOK_S = 0.1
_LOOK_AT = 0.8  # of the time that the step before took


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


class Runner:
    """An engine with its two threads. `make` makes the engine; its argument is the engine's `post`."""

    def __init__(
        self, make: Callable[[Callable[[_Action], object]], SequenceEngine], pulse: Pulse | None = None
    ) -> None:
        self._pulse = pulse or NoPulse()
        self._actions: queue.SimpleQueue[_Action | None] = queue.SimpleQueue()
        self._posting = threading.Lock()  # guards _has_sender
        self._has_sender = True
        self._reporting = threading.Lock()
        self._is_looking = threading.Event()  # whether a look is among the actions
        self._is_stepping = False
        self._look_s: float | None = None  # the sending thread's next look in a long step, and the time between two
        self._look_again_s = 0.0
        self.engine = make(self._post)
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._compute, name="engine", daemon=True),
            threading.Thread(target=self._act, name="sender", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request[Any]) -> None:
        """Queue a request. Raises RequestError as `SequenceEngine.submit` does."""
        self.engine.submit(request)
        self._report()
        self._wake()
        if request.awaited is not None:
            request.awaited.add_done_callback(lambda _done: self._wake())

    def answer(self, request_id: str, make: Callable[[], Request[Any]], fail: Callable[[Exception], object]) -> None:
        """Queue the request that `make` reads. A request that cannot be read or queued fails at once. While there is
        no room for any, none is read, so that refusing many takes nothing from those that are computed."""
        engine = self.engine
        if refusal := engine.refusal():
            reason, error = refusal
            engine.accounts.unread(request_id, error, reason)
            fail(error)
            return
        try:
            request = make()
        except Exception as error:  # whatever it is, the client is told
            engine.accounts.unread(request_id, error)
            fail(error)
            return
        try:
            self.submit(request)
        except Exception as error:  # whatever it is, the client is told
            fail(error)

    def stop(self, name: str) -> int:
        """End the requests with a name, whether they run or wait. Returns how many there were."""
        found = self.engine.stop(name)
        self._report()
        return found

    def drain(self) -> None:
        """Refuse the requests that wait and all further ones; running ones are finished."""
        self.engine.drain()
        self._report()

    def end_running(self) -> None:
        """Have what runs end, with what it has."""
        self.engine.end_running()

    def close(self) -> None:
        """Stop the running requests, withdraw the waiting ones, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wait(self) -> bool:
        """Wait for something to compute, or for `_AWAITED_LOOK_S` where a request only awaits what it needs: its client
        may have gone. Returns whether to go on."""
        with self._changed:
            while not (self._closed or self.engine.has_work()):
                if not self._changed.wait(_AWAITED_LOOK_S if self.engine.awaits() else None):
                    self._pulse.step()  # for supervisors: the engine does not hang
                    break
            return not self._closed

    def _post(self, action: _Action) -> None:
        """Have the sending thread run an action. A thread that stops or drains while the runner is closed may be too
        late for that; then it runs the action itself, after all that was posted before."""
        with self._posting:
            if self._has_sender:
                self._actions.put(action)
                return
        self._threads[-1].join()
        action()

    def _report(self) -> None:
        # Counted and reported by one thread at a time, so that the last report has the last counts.
        with self._reporting:
            running, waiting = self.engine.counts()
            self._pulse.report(running=running, waiting=waiting)

    def _compute(self) -> None:
        self._pulse.step()  # a supervisor expects steps of those that have made one
        took_s = 0.0
        while self._wait():
            begun_s, self._is_stepping = time.monotonic(), True
            if took_s >= LONG_STEP_S:
                self._post(partial(self._plan_look, begun_s, took_s))
            try:
                if self.engine.step():
                    self._pulse.step()
            except Exception as error:  # a fault of ours; the requests that it concerns are not known
                logger.exception("a step of the engine failed")
                self.engine.fail_all(error)
            self._report()
            took_s, self._is_stepping = time.monotonic() - begun_s, False
            if took_s < LONG_STEP_S and not self._is_looking.is_set():
                self._is_looking.set()
                self._post(self._look)
        self.engine.end_all()
        self._report()
        with self._posting:
            self._has_sender = False
            self._actions.put(None)

    def _look(self) -> None:
        self._is_looking.clear()
        self.engine.look()

    def _plan_look(self, begun_s: float, step_s: float) -> None:
        self._look_s, self._look_again_s = begun_s + _LOOK_AT * step_s, (1 - _LOOK_AT) * step_s

    def _look_in_step(self) -> None:
        """Look, and plan another look in case that the step takes longer than the one before."""
        self.engine.look()
        self._look_s = time.monotonic() + self._look_again_s if self._is_stepping else None

    def _next_action(self) -> _Action | None:
        if self._look_s is None:
            return self._actions.get()
        try:
            return self._actions.get(timeout=max(0.0, self._look_s - time.monotonic()))
        except queue.Empty:
            return self._look_in_step

    def _act(self) -> None:
        while (action := self._next_action()) is not None:
            try:
                action()
            except Exception:  # the other requests must still be answered
                logger.exception("sending failed")
