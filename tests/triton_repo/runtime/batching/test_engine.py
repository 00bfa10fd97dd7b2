"""One thing at a time that an engine of sequences does; all of them at once are in test_histories.py."""

from __future__ import annotations

import pytest
from batching_simulation import Simulation
from batching_standins import Client, Cost, Wish, alone

from triton_repo.errors import RequestError
from triton_repo.runtime.batching.scheduler import Limits

SECOND = Cost(step_s=1.0, prompt_token_s=0.0)  # a step takes a second


def wish(number: int, **more) -> Wish:
    return Wish(**{"number": number, "prompt": bytes([number, 7, 9]), "most_tokens": 6, "ends": False, **more})


def is_answered(client: Client) -> bool:
    """Whether a client got all that it would have got alone."""
    answers = alone(client.wish, salt=0)
    texts = [client.tokens_of(index) for index in range(client.wish.count)]
    return client.error is None and texts == [answer.tokens for answer in answers]


def run(*wishes: Wish, **more) -> tuple[Simulation, list[Client]]:
    simulation = Simulation(SECOND, **more)
    clients = [simulation.submit(each) for each in wishes]
    simulation.run()
    return simulation, clients


def test_every_answer_to_a_prompt_is_drawn_for_itself_from_one_computation_of_the_prompt():
    simulation, [client] = run(wish(1, count=3, temperature=1.0))
    assert is_answered(client)
    assert len({client.tokens_of(index) for index in range(3)}) == 3
    assert simulation.engine.stats.prompt_tokens == 3
    assert simulation.engine.stats.steps == 6


FAULTS = {
    "a token that cannot be written": {"writing_fails": 2},
    "a token that cannot be chosen": {"sampling_fails": 2},
    "log-probabilities that cannot be taken": {"echo": True, "prompt_fails": True},
    "a stream that is closed": {"sending_fails": 2},
    "a stream that is closed, and takes no error either": {"sending_fails": 2, "telling_fails": True},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_request_that_fails_fails_alone(fault, count):
    simulation, [before, failing, after] = run(wish(1), wish(2, count=count, **FAULTS[fault]), wish(3, echo=True))
    assert failing.is_over
    assert failing.error is not None
    assert is_answered(before)
    assert is_answered(after)
    assert simulation.scheduler.slots.num_free == 8
    assert len(simulation.step_ends) == 6


def test_a_step_that_fails_ends_the_requests_in_it_and_the_next_ones_are_computed():
    simulation = Simulation(SECOND)
    in_it = [simulation.submit(wish(number, count=number)) for number in (1, 2)]
    later = simulation.submit(wish(3, arrives_s=1.5))
    simulation.session.fails = lambda rows: 1 if simulation.clock.now == 2.0 else None
    simulation.run()
    assert [str(client.error) for client in in_it] == ["the engine failed"] * 2
    assert is_answered(later)
    assert simulation.scheduler.slots.reserved_bytes == 0


def test_logits_that_are_no_numbers_fail_the_request_whose_they_are():
    """One text in 20 has such logits, whoever computes it."""
    wishes = [wish(number) for number in range(8)]
    expected = [alone(each, salt=0, broken_one_in=20)[0].end for each in wishes]
    assert {"error", "length"} == set(expected)
    _, clients = run(*wishes, broken_one_in=20)
    errors = [client.error for client in clients]
    assert [error is not None for error in errors] == [end == "error" for end in expected]
    assert {error.kind for error in errors if error} == {"INTERNAL"}


NAMES = {"stopped": "stopped", "gone": "disconnected", "late": "deadline"}  # in the counts


@pytest.mark.parametrize("how", NAMES)
def test_a_request_that_ends_early_frees_its_slots_before_the_next_step(how):
    """In the third step, which begins at 2 s and ends at 3 s."""
    simulation = Simulation(SECOND)
    early = simulation.submit(wish(1, count=2, patience_s=2.5 if how == "late" else None))
    other = simulation.submit(wish(2))
    if how == "stopped":
        simulation.at(2.5, lambda: simulation.engine.stop("1"))
    if how == "gone":
        simulation.at(2.5, lambda: setattr(early, "has_left", True))
    slots = []
    simulation.session.before = lambda rows: slots.append([row.slot for row in rows])
    simulation.run()
    assert slots == [[0, 2], [0, 1, 2], [0, 1, 2], [2], [2], [2]]
    assert [early.end_of(index) for index in range(2)] == ["cancelled"] * 2
    assert +simulation.engine.stats.ends == {NAMES[how]: 1, "length": 1}
    assert is_answered(other)


@pytest.mark.parametrize("how", ["stopped", "gone"])
def test_a_waiting_request_that_ends_early_is_answered_and_never_begins(how):
    simulation = Simulation(SECOND, slots=1)
    running, waiting = simulation.submit(wish(1)), simulation.submit(wish(2, count=1, arrives_s=0.5))
    if how == "stopped":
        simulation.at(1.5, lambda: simulation.engine.stop("2"))
    if how == "gone":
        simulation.at(1.5, lambda: setattr(waiting, "has_left", True))
    simulation.run()
    assert [(moment, part.end) for moment, part in waiting.parts] == [(1.5 if how == "stopped" else 2.0, "cancelled")]
    assert is_answered(running)


def test_a_request_whose_time_passes_in_the_queue_is_unavailable():
    _, [running, waiting] = run(wish(1), wish(2, patience_s=2.5), slots=1)
    assert is_answered(running)
    assert waiting.error.kind == "UNAVAILABLE"
    assert "the time that it allows passed while it waited" in str(waiting.error)
    assert [moment for moment, number, _ in waiting.log if number == 2] == [3.0]


def test_a_request_that_waits_too_long_is_unavailable_and_told_when_to_come_again():
    limits = Limits(slots=1, max_wait_s=3.0)
    _, [running, waiting] = run(wish(1), wish(2), slots=1, limits=limits)
    assert is_answered(running)
    assert waiting.error.kind == "UNAVAILABLE"
    assert "waited 3 s for its turn" in str(waiting.error)
    assert "send it again in about" in str(waiting.error)


def test_a_draining_engine_finishes_what_runs_and_refuses_the_rest():
    simulation = Simulation(SECOND, slots=1)
    running, waiting = simulation.submit(wish(1)), simulation.submit(wish(2))
    simulation.at(2.5, simulation.engine.drain)
    late = simulation.submit(wish(3, arrives_s=2.6))
    simulation.run()
    assert is_answered(running)
    assert [(client.error.kind, "stopping" in str(client.error)) for client in (waiting, late)] == [
        ("UNAVAILABLE", True)
    ] * 2
    assert +simulation.engine.stats.refusals == {"stopping": 2}


def test_a_full_queue_tells_when_to_come_again_by_how_long_requests_run():
    """A request runs for 10 s, and 16 of them wait for 8 slots: two rounds and one more. It is no part of it how long
    those waited that were answered."""
    limits = Limits(slots=8, max_waiting=16)
    wishes = [wish(number % 40, most_tokens=10, arrives_s=number / 2) for number in range(1000)]
    _, clients = run(*wishes, limits=limits)
    last_refused = next(client for client in reversed(clients) if client.error)
    assert last_refused.error.kind == "UNAVAILABLE"
    assert "16 requests wait already" in str(last_refused.error)
    assert "send it again in about 30 s" in str(last_refused.error)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"count": 3}, "num_return_sequences: found 3, expected at most 2"),
        ({"count": 2, "most_tokens": 60}, "exceed the memory of this server, which has room for 33 each"),
    ],
)
def test_what_could_never_begin_is_refused_at_once(asked, named):
    """The queue behind it would wait for ever. Two sequences of 32 positions are 6,000 bytes of the stand-in's."""
    simulation = Simulation(SECOND, slots=2, positions=64, budget=0.6)
    assert simulation.scheduler.slots.budget == 6000
    impossible, other = simulation.submit(wish(1, **asked)), simulation.submit(wish(2))
    simulation.run()
    assert isinstance(impossible.error, RequestError)
    assert impossible.error.kind == "INVALID_ARG"
    assert named in str(impossible.error)
    assert is_answered(other)


def test_500_requests_at_once_into_a_queue_of_64():
    """Those that find the queue full are refused in the moment in which they arrive, with what waits and when to come
    again; all others are answered; and the engine is well after it."""
    simulation = Simulation(SECOND, limits=Limits(slots=8, max_waiting=64, max_wait_s=600.0))
    clients = [simulation.submit(wish(number % 48, arrives_s=5.0)) for number in range(500)]
    after = simulation.submit(wish(7, arrives_s=1000.0))
    simulation.run()
    refused = [client for client in clients if client.error]
    assert len(refused) == 500 - 64
    assert {moment for moment, _, what in simulation.log if isinstance(what, str)} == {5.0}
    assert {client.error.kind for client in refused} == {"UNAVAILABLE"}
    assert all(
        "64 requests wait already" in str(c.error) and "send it again in about 9 s" in str(c.error) for c in refused
    )
    assert all(is_answered(client) for client in clients if not client.error)
    assert is_answered(after)
    assert simulation.engine.counts() == (0, 0)
    assert +simulation.engine.stats.refusals == {"queue_full": 436}
