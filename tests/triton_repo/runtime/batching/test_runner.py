"""The two threads of an engine, and others that submit, stop, drain and close at any moment."""

from __future__ import annotations

import random
import sys
import threading
import time

import pytest
from batching_standins import VOCABULARY, Client, Cost, StandInCache, StandInSession, Wish, alone

from triton_repo.runtime.batching.engine import SequenceEngine
from triton_repo.runtime.batching.memory.slots import Slots
from triton_repo.runtime.batching.runner import LONG_STEP_S, Runner
from triton_repo.runtime.batching.scheduler import Limits

PATIENCE_S = 60.0


class CountingPulse:
    """What the heartbeat would be told."""

    def __init__(self):
        self.num_steps = 0
        self.last = None

    def report(self, *, running, waiting):
        self.last = (running, waiting)

    def step(self):
        self.num_steps += 1


class Made:
    """A runner over stand-ins. A step waits until `gate` is set."""

    def __init__(self, *, slots=4, pulse=None, engine=SequenceEngine, step_s=0.0, **limits):
        self.gate, self.computes = threading.Event(), threading.Event()
        self.gate.set()
        self.pulse = pulse or CountingPulse()
        self.cache = StandInCache(slots, 300)
        self.session = StandInSession(Cost(step_s=step_s, prompt_token_s=0.0), advance=self._advance)
        self.limits = Limits(slots=slots, **limits)
        self.slots = Slots(self.cache, slots * self.cache.bytes_of(200))
        self.runner = Runner(lambda post: self._make(engine, post), self.pulse)

    def _make(self, engine, post):
        return engine(self.session, self.cache, self.slots, num_tokens=VOCABULARY, limits=self.limits, post=post)

    def _advance(self, seconds):
        self.computes.set()
        time.sleep(seconds)
        assert self.gate.wait(PATIENCE_S)

    def close(self):
        """Fails where the runner's threads do not end."""
        in_threads(self.runner.close)

    def submit(self, number, **more):
        client = Client(wish(number, **more), time.monotonic)
        client.was_taken = client.submit(self.runner)
        return client


@pytest.fixture
def made():
    """Makes runners, and closes them."""
    runners = []

    def make(**more):
        runners.append(Made(**more))
        return runners[-1]

    yield make
    for each in runners:
        each.gate.set()
        each.close()


def wish(number, **more):
    return Wish(**{"number": number, "prompt": bytes([number % 40, 7, 9]), "most_tokens": 6, "ends": False, **more})


def wait_for(holds):
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.001)


def is_answered(client):
    answers = alone(client.wish, salt=0)
    texts = [client.tokens_of(index) for index in range(client.wish.count)]
    return client.error is None and texts == [answer.tokens for answer in answers]


def in_threads(*targets):
    """Run functions side by side. They must all return."""
    failures = []

    def guarded(target):
        try:
            target()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert failures == []
    assert [thread for thread in threads if thread.is_alive()] == []


@pytest.fixture
def _restless():
    """Threads take turns a thousand times as often as by default."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


def random_wish(rng, number):
    draws = lambda share, value: value if rng.random() < share else None  # noqa: E731
    size = rng.choice((1, 3, rng.randint(1, 100)))
    return {
        "prompt": bytes(rng.choices(range(VOCABULARY), k=size)),
        "most_tokens": rng.randint(1, 20),
        "count": rng.choice((1, 1, 1, 2, 4)),
        "temperature": rng.choice((0.0, 1.0)),
        "echo": rng.random() < 0.1,
        "every": rng.choice((1, 3)),
        "names": (f"group {number % 5}",),
        "sending_fails": draws(0.05, 2),
        "writing_fails": draws(0.05, 3),
        "cancel_fails": bool(draws(0.1, True)),
        "looking_fails": bool(draws(0.05, True)),
    }


@pytest.mark.usefixtures("_restless")
@pytest.mark.parametrize("seed", range(24))
def test_threads_that_submit_stop_drain_and_close_lose_nothing(seed, made, caplog):
    caplog.set_level("CRITICAL")
    rng = random.Random(seed)
    each = made(slots=rng.choice((1, 4, 8)), max_waiting=rng.choice((5, 100)), step_s=rng.choice((0.0, 0.0005)))
    clients, everyone_is_in = [], threading.Barrier(4)

    def submit(first, rng):
        everyone_is_in.wait(PATIENCE_S)
        for number in range(first, first + 25):
            client = each.submit(number, **random_wish(rng, number))
            clients.append(client)
            client.has_left = rng.random() < 0.1
            time.sleep(rng.choice((0.0, 0.0, rng.uniform(0, 0.002))))

    def stop(rng):
        everyone_is_in.wait(PATIENCE_S)
        for _ in range(40):
            each.runner.stop(rng.choice((str(rng.randrange(75)), f"group {rng.randrange(5)}", "nobody")))
            time.sleep(rng.uniform(0, 0.002))

    def end(rng):
        time.sleep(rng.uniform(0, 0.05))
        if rng.random() < 0.5:
            each.runner.drain()
        if rng.random() < 0.3:
            each.runner.end_running()
        if rng.random() < 0.5:
            each.close()

    seeds = [random.Random(rng.random()) for _ in range(6)]
    in_threads(
        *(lambda first=first, rng=own: submit(first, rng) for first, own in zip((0, 25, 50), seeds, strict=False)),
        lambda: stop(seeds[3]),
        *([lambda: end(seeds[4]), lambda: end(seeds[5])] if seed % 3 else []),
    )
    taken = [client for client in clients if client.was_taken]
    if seed % 3 == 0:  # all are answered without an end of the runner
        wait_for(lambda: all(client.is_over for client in taken))
        wait_for(lambda: each.pulse.last == (0, 0))
    each.close()
    assert len(clients) == 75
    assert [client.wish for client in taken if not client.is_over] == []
    for client in taken:
        for index, answer in enumerate(alone(client.wish, salt=0)):
            assert answer.tokens.startswith(client.tokens_of(index))
    assert each.pulse.last == (0, 0)
    stats = each.runner.engine.stats
    assert each.pulse.num_steps - 1 == stats.steps == each.session.num_steps  # it counts one at the start
    assert stats.ends.total() + stats.refusals.total() == len(clients)
    assert (each.slots.num_free, each.slots.reserved_bytes) == (each.cache.num_slots, 0)
    assert not any(thread.is_alive() for thread in each.runner._threads)


@pytest.mark.usefixtures("_restless")
def test_500_requests_at_once_are_refused_by_a_full_queue_or_answered(made):
    """Beyond those that begin at once, 64 wait; each refusal is raised by `submit` itself."""
    each = made(slots=8, max_waiting=64)
    each.gate.clear()
    clients, everyone_is_in = [], threading.Barrier(10)

    def submit(first):
        everyone_is_in.wait(PATIENCE_S)
        for number in range(first, first + 50):
            clients.append(each.submit(number))

    in_threads(*(lambda first=first: submit(first) for first in range(0, 500, 50)))
    taken = [client for client in clients if client.was_taken]
    refused = [client for client in clients if not client.was_taken]
    assert 64 <= len(taken) <= 64 + 8
    assert {client.error.kind for client in refused} == {"UNAVAILABLE"}
    assert all("64 requests wait already" in str(client.error) for client in refused)
    assert all("send it again in about" in str(client.error) for client in refused)
    each.gate.set()
    wait_for(lambda: all(client.is_over for client in taken))
    assert all(is_answered(client) for client in taken)
    after = each.submit(7)
    wait_for(lambda: after.is_over)
    assert is_answered(after)


def test_responses_are_sent_while_the_next_step_is_computed(made):
    each = made()
    each.gate.clear()
    client = each.submit(1)
    each.gate.set()
    wait_for(lambda: client.is_over)
    assert is_answered(client)
    assert {thread.name for thread in each.runner._threads} == {"engine", "sender"}


def test_the_heartbeat_is_told_at_once_that_a_waiting_request_was_stopped(made):
    """Nothing else may tell it: an engine without work makes no step."""
    each = made(slots=1)
    each.gate.clear()
    running = each.submit(1)
    assert each.computes.wait(PATIENCE_S)
    waiting = each.submit(2)
    assert each.pulse.last == (1, 1)
    assert each.runner.stop("2") == 1
    assert each.pulse.last == (1, 0)
    wait_for(lambda: waiting.is_over)
    assert not running.is_over


class SlowPulse(CountingPulse):
    """A thread that reports that a request waits beside one that runs is held up before the report arrives. Meanwhile
    the engine goes on, by `gate`."""

    def __init__(self):
        super().__init__()
        self.gate, self.is_idle = None, threading.Event()

    def report(self, *, running, waiting):
        if running and waiting:
            self.is_idle.clear()
            self.gate.set()
            self.is_idle.wait(0.3)
        super().report(running=running, waiting=waiting)
        if not running and not waiting:
            self.is_idle.set()


def test_the_last_report_has_the_last_counts(made):
    """Else the heartbeat of an idle engine would say for good that a request waits."""
    each = made(pulse=SlowPulse())
    each.pulse.gate = each.gate
    each.gate.clear()
    running = each.submit(1, most_tokens=1)
    assert each.computes.wait(PATIENCE_S)
    waiting = each.submit(2, most_tokens=1)
    wait_for(lambda: running.is_over and waiting.is_over)
    wait_for(each.pulse.is_idle.is_set)
    assert each.pulse.last == (0, 0)


class LateEngine(SequenceEngine):
    """A thread that drains is held up after it has taken the waiting requests."""

    has_taken, goes_on = threading.Event(), threading.Event()

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        refuse = self._ends.refuse

        def refuse_late(*refused):
            self.has_taken.set()
            self.goes_on.wait(PATIENCE_S)
            refuse(*refused)

        self._ends.refuse = refuse_late


def test_a_request_that_was_taken_from_the_queue_is_refused_though_the_runner_was_closed_meanwhile(made):
    each = made(slots=1, engine=LateEngine)
    each.gate.clear()
    running = each.submit(1)
    assert each.computes.wait(PATIENCE_S)
    waiting = each.submit(2)

    def close():
        assert LateEngine.has_taken.wait(PATIENCE_S)
        each.gate.set()
        each.close()
        LateEngine.goes_on.set()

    in_threads(each.runner.drain, close)
    assert running.is_over
    assert waiting.error.kind == "UNAVAILABLE"


def test_a_request_is_withdrawn_in_order_though_the_runner_is_closed_meanwhile(made):
    """Of two answers the first is posted before the end of the engine's thread, and the second after it, while the
    sending thread is held up."""
    each = made(slots=2)
    each.gate.clear()
    running = each.submit(1, count=2)
    assert each.computes.wait(PATIENCE_S)
    waiting = each.submit(2, count=2)
    engine = each.runner._threads[0]
    cancel, is_held, goes_on = waiting.writers[1].cancel, threading.Event(), threading.Event()

    def late_cancel():
        is_held.set()
        engine.join(PATIENCE_S)
        threading.Timer(0.2, goes_on.set).start()
        return cancel()

    waiting.writers[1].cancel = late_cancel

    def close():
        assert is_held.wait(PATIENCE_S)
        each.gate.set()
        each.close()

    each.runner._post(lambda: goes_on.wait(PATIENCE_S))
    in_threads(lambda: each.runner.stop("2"), close)
    assert running.is_over
    assert [part.index for _, part in waiting.parts] == [0, 1]
    assert waiting.is_over


def test_requests_for_which_there_is_no_room_are_refused_unread(made):
    each = made(slots=1, max_waiting=1)
    each.gate.clear()
    each.submit(1)
    assert each.computes.wait(PATIENCE_S)
    each.submit(2)
    errors, lines = [], []
    each.runner.engine.accounts.report = lines.append

    def read():
        raise AssertionError("it was read")

    each.runner.answer("late", read, errors.append)
    each.runner.drain()
    each.runner.answer("later", read, errors.append)
    each.gate.set()
    assert ["1 requests wait already" in str(errors[0]), "the server is stopping" in str(errors[1])] == [True, True]
    assert {error.kind for error in errors} == {"UNAVAILABLE"}
    wait_for(lambda: len(lines) >= 3)
    ends = {line.request_id: (line.end, line.status, line.prompt_tokens) for line in lines}
    assert ends["late"] == ("queue_full", "UNAVAILABLE", None)
    assert ends["later"] == ("stopping", "UNAVAILABLE", None)


def test_a_client_that_has_gone_is_noticed_while_others_are_computed(made):
    each = made(step_s=0.0005)
    leaving, staying = each.submit(1, most_tokens=190), each.submit(2, most_tokens=190)
    wait_for(lambda: leaving.parts)
    leaving.has_left = True
    wait_for(lambda: leaving.is_over and staying.is_over)
    assert leaving.end_of(0) == "cancelled"
    assert is_answered(staying)


def test_a_client_that_leaves_in_a_long_step_is_not_in_the_next_one(made):
    each = made(step_s=2 * LONG_STEP_S)
    leaving, staying = each.submit(1, most_tokens=190), each.submit(2, most_tokens=190)
    wait_for(lambda: len(leaving.parts) >= 2 and len(staying.parts) >= 2)
    rows = []

    def hold_the_first(given):
        if not rows:
            each.gate.clear()
        rows.append(len(given))

    each.session.before = hold_the_first
    wait_for(lambda: rows)
    leaving.has_left = True
    wait_for(lambda: each.runner.engine._scheduler.running[0].request.is_gone)
    each.gate.set()
    wait_for(lambda: len(rows) > 1)
    each.runner.engine.stop("2")
    assert rows[:2] == [2, 1]


def test_a_fault_of_the_engine_ends_its_requests_and_no_later_ones(made, caplog):
    class Faulty(SequenceEngine):
        def _end_requests(self):
            if any("1" in sequence.request.names for sequence in self._scheduler.running):
                raise ZeroDivisionError
            super()._end_requests()

    each = made(slots=1, engine=Faulty)
    each.gate.clear()
    clients = [each.submit(number) for number in (1, 2)]
    each.gate.set()
    wait_for(lambda: all(client.is_over for client in clients))
    assert [type(client.error) for client in clients] == [ZeroDivisionError] * 2
    assert "a step of the engine failed" in caplog.text
    later = each.submit(3)
    wait_for(lambda: later.is_over)
    assert is_answered(later)


def test_a_closed_runner_refuses_and_can_be_closed_again(made):
    each = made()
    running = each.submit(1, most_tokens=190)
    each.close()
    each.close()
    assert running.is_over
    client = each.submit(2)
    assert not client.was_taken
    assert client.error.kind == "UNAVAILABLE"
