"""One queue for a model's workers: what waits is stopped, withdrawn and refused at once while another is computed."""

from __future__ import annotations

import queue
import threading
import time

import pytest
from serve_command import wait_until

from triton_repo.errors import RequestError
from triton_repo.runtime import workers as workers_module
from triton_repo.runtime.workers import Job, Outlet, Workers

PATIENCE_S = 30


class Call:
    """A request whose steps wait for leave; what it was sent is kept."""

    def __init__(self, *names: str, num_steps: int = 2) -> None:
        self.sent: queue.Queue = queue.Queue()
        self.leave = threading.Semaphore(0)
        self.begun = threading.Event()
        self.gone = threading.Event()
        self.asked_after_end = False
        self.ended = False
        self._num_steps = num_steps
        self.job = Job(
            names=frozenset(names), respond=self._respond, withdrawn=lambda: "withdrawn",
            outlet=Outlet(self._send, self._fail, self._is_cancelled),
        )  # fmt: skip

    def _respond(self, seat, is_over):
        self.begun.set()
        for number in range(self._num_steps):
            assert self.leave.acquire(timeout=PATIENCE_S)
            if is_over():
                yield "stopped", True
                return
            yield f"{seat} {number}", number == self._num_steps - 1

    def _send(self, response, is_last):
        self.ended = is_last
        self.sent.put((response, is_last))

    def _fail(self, error):
        self.ended = True
        self.sent.put(error)

    def _is_cancelled(self):
        self.asked_after_end |= self.ended
        return self.gone.is_set()

    def next(self):
        return self.sent.get(timeout=PATIENCE_S)

    def run(self):
        """Let it go on to its end."""
        self.leave.release(self._num_steps)
        return self


class Pulse:
    def __init__(self) -> None:
        self.reports: list[tuple[int, int]] = []
        self.num_steps = 0

    def report(self, *, running, waiting):
        self.reports.append((running, waiting))

    def step(self):
        self.num_steps += 1


@pytest.fixture
def pulse():
    return Pulse()


@pytest.fixture
def workers(pulse):
    made = Workers(["seat"], pulse)
    yield made
    made.close()


@pytest.fixture
def running(workers):
    """A request that is being computed, and waits for leave."""
    call = Call("running", num_steps=3)
    workers.submit(call.job)
    assert call.begun.wait(PATIENCE_S)
    yield call
    call.run()


@pytest.fixture
def waiting(workers, running):
    """A request behind it."""
    call = Call("waiting", "its key")
    workers.submit(call.job)
    return call


def test_requests_are_answered_in_their_order(workers):
    calls = [Call().run() for _ in range(3)]
    for call in calls:
        workers.submit(call.job)
    assert [call.next() for call in calls for _ in range(2)] == [("seat 0", False), ("seat 1", True)] * 3


@pytest.mark.parametrize("name", ["waiting", "its key"])
def test_a_waiting_request_is_stopped_at_once_by_any_of_its_names(workers, running, waiting, name):
    assert workers.stop(name) == 1
    assert waiting.sent.get_nowait() == ("withdrawn", True)
    assert running.sent.empty()


def test_one_that_runs_is_stopped_before_its_next_step(workers, running, waiting):
    running.leave.release()
    assert running.next() == ("seat 0", False)
    assert workers.stop("running") == 1
    running.leave.release()
    assert running.next() == ("stopped", True)
    waiting.run()
    assert waiting.next() == ("seat 0", False)


def test_all_requests_of_a_name_are_stopped_and_of_an_unknown_one_none(workers, running):
    calls = [Call("twice") for _ in range(2)]
    for call in calls:
        workers.submit(call.job)
    assert [workers.stop("twice"), workers.stop("twice"), workers.stop("")] == [2, 0, 0]
    assert [call.sent.get_nowait() for call in calls] == [("withdrawn", True)] * 2


def test_a_waiting_request_whose_client_has_gone_is_withdrawn_while_another_runs(workers, running, waiting):
    waiting.gone.set()
    assert waiting.next() == ("withdrawn", True)
    assert not running.ended


def test_nothing_is_asked_of_a_request_that_has_ended(workers, running, waiting, monkeypatch):
    """Triton 2.51 crashes where it is asked whether such a request is cancelled."""
    waiting.run()
    running.run()
    assert running.next()
    while not waiting.ended:
        waiting.next()
    assert waiting.job.outlet.is_cancelled()
    assert not waiting.asked_after_end


def test_draining_refuses_what_waits_and_what_comes_and_lets_what_runs_finish(workers, running, waiting):
    workers.drain()
    late = Call()
    workers.submit(late.job)
    for call in (waiting, late):
        error = call.sent.get_nowait()
        assert isinstance(error, RequestError)
        assert (error.kind, str(error)) == (
            "UNAVAILABLE",
            "answering the request: the server is stopping; send the request to another server or again later",
        )
    running.run()
    assert [running.next() for _ in range(3)] == [("seat 0", False), ("seat 1", False), ("seat 2", True)]


def test_one_that_runs_can_be_stopped_while_the_server_drains(workers, running):
    workers.drain()
    assert workers.stop("running") == 1
    running.leave.release()
    assert running.next() == ("stopped", True)


def test_closing_stops_what_runs_and_withdraws_what_waits(pulse):
    workers = Workers(["seat"], pulse)
    first, second = Call(), Call()
    workers.submit(first.job)
    assert first.begun.wait(PATIENCE_S)
    workers.submit(second.job)
    first.run()
    workers.close()
    assert second.next() == ("withdrawn", True)
    late = Call()
    workers.submit(late.job)
    assert isinstance(late.next(), RequestError)


def test_the_pulse_knows_how_many_run_and_wait_and_counts_steps(workers, pulse, running, waiting):
    assert pulse.reports[-1] == (1, 1)
    running.run()
    waiting.run()
    while not waiting.ended:
        waiting.next()
    deadline = time.monotonic() + PATIENCE_S
    while pulse.reports[-1] != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pulse.reports[-1] == (0, 0)
    assert pulse.num_steps == 5


def test_a_request_that_can_be_sent_nothing_leaves_the_worker_to_the_next(workers, caplog):
    def closed(*_sent):
        raise RuntimeError("Response sender has been closed.")

    broken, after = Call("broken").run(), Call().run()
    outlet = Outlet(closed, closed, lambda: False)
    workers.submit(
        Job(names=broken.job.names, respond=broken.job.respond, withdrawn=broken.job.withdrawn, outlet=outlet)
    )
    workers.submit(after.job)
    assert after.next() == ("seat 0", False)
    assert "the request broken can be sent neither its answer nor an error" in caplog.text


def test_a_client_that_cannot_be_asked_after_waits_on(workers, running, caplog, monkeypatch):
    monkeypatch.setattr(workers_module, "LOOK_INTERVAL_S", 0.01)
    call = Call("unasked").run()
    asked = threading.Event()

    def broken():
        asked.set()
        raise RuntimeError("no such request")

    outlet = Outlet(call._send, call._fail, broken)
    workers.submit(Job(names=call.job.names, respond=lambda seat, _: iter([(seat, True)]), withdrawn=call.job.withdrawn,
                       outlet=outlet))  # fmt: skip
    assert asked.wait(PATIENCE_S)
    running.run()
    assert call.next() == ("seat", True)
    assert wait_until(lambda: "cannot tell whether the client of the request unasked has gone" in caplog.text)
