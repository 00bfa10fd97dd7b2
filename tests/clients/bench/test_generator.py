"""The measuring itself, against a server with known delays in simulated time: every expected figure is worked out by
hand."""

from __future__ import annotations

import asyncio
from itertools import islice, pairwise

import pytest
from bench_standin import StandIn, simulate, works

from clients.bench.generator import AHEAD, MOST_AHEAD, PAUSE_AFTER_ERROR_S, apply
from clients.bench.load import Load, Work
from clients.bench.prompts import Listed, Prompt
from clients.bench.records import Arrival
from clients.bench.report import summarise
from clients.errors import ServerOverloaded
from export.errors import ConfigError


def measured(load, requests, **server):
    """The run and the report of a load on a stand-in."""

    async def main():
        run = await apply(StandIn(**server), load, requests)
        return run, summarise(run, load, requests, cores=2)

    return simulate(main)


def firsts(run):
    return [pytest.approx(record.first_token_s) for record in run.records]


def test_one_stream():
    run, report = measured(Load(streams=1, requests=2), works())
    # 0.5 s to the first token, three more after 0.1 s each: 0.8 s an answer, two answers.
    assert [record.arrivals for record in run.records] == [
        [(pytest.approx(start + at), 1) for at in (0.5, 0.6, 0.7, 0.8)] for start in (0, 0.8)
    ]
    assert report["window_s"] == pytest.approx(1.6)
    assert report["output_tokens_per_s"] == pytest.approx(8 / 1.6)
    assert report["total_tokens_per_s"] == pytest.approx((8 + 2 * 3) / 1.6)
    assert report["requests_per_s"] == pytest.approx(2 / 1.6)
    assert report["first_token_s"] == {name: pytest.approx(0.5) for name in ("p50", "p90", "p99", "max")} | {"n": 2}
    assert report["between_tokens_s"] == {name: pytest.approx(0.1) for name in ("p50", "p90", "p99", "max")} | {"n": 6}
    assert report["longest_pause_s"] == pytest.approx(0.1)
    assert report["answer_s"]["p50"] == pytest.approx(0.8)
    # Between first and last token: 0.3 s of each answer, three tokens in them.
    assert report["all_streams_running"] == {"seconds": pytest.approx(0.6), "tokens_per_s": pytest.approx(10)}


def test_four_streams_of_a_server_that_answers_all_at_once():
    _, report = measured(Load(streams=4, requests=4), works())
    assert report["output_tokens_per_s"] == pytest.approx(16 / 0.8)
    assert report["all_streams_running"] == {"seconds": pytest.approx(0.3), "tokens_per_s": pytest.approx(40)}
    assert report["fairness"] == {"jain": pytest.approx(1), "over": "tokens of each stream"}


def test_four_streams_of_a_server_that_answers_one_at_a_time():
    run, report = measured(Load(streams=4, requests=4), works(), one_at_a_time=True)
    # Each waits for 0.8 s of every one before it.
    assert firsts(run) == [0.5, 1.3, 2.1, 2.9]
    assert report["output_tokens_per_s"] == pytest.approx(16 / 3.2)
    first = report["first_token_s"]
    # Ranks of 4 values: the middle of the second and third; 0.9 * 3 = 2.7 and 0.99 * 3 = 2.97 from the first.
    assert [first["p50"], first["p90"], first["p99"]] == [
        pytest.approx(value) for value in (1.7, 2.1 + 0.7 * 0.8, 2.1 + 0.97 * 0.8)
    ]
    assert report["longest_pause_s"] == pytest.approx(0.1)
    assert report["all_streams_running"] == {"seconds": 0, "tokens_per_s": None}


def test_a_stream_without_a_turn_makes_the_load_unfair():
    _, report = measured(Load(streams=2, duration_s=0.75), works(), one_at_a_time=True)
    # Three tokens of the first stream, none of the second: (3 + 0)^2 / (2 * 9).
    assert report["fairness"]["jain"] == pytest.approx(0.5)
    assert report["output_tokens"] == 3


def test_the_end_of_the_duration_cuts_requests_and_later_tokens_do_not_count():
    run, report = measured(Load(streams=2, duration_s=2.0), works(), one_at_a_time=True)
    # Answers end at 0.8 and 1.6; the third has no token before 2.1.
    assert report["window_s"] == 2.0
    assert report["output_tokens_per_s"] == pytest.approx(8 / 2)
    assert report["requests_per_s"] == pytest.approx(1)
    assert report["requests"] == {
        "sent": 4, "answered": 2, "ended_early": 0, "cut_at_the_end": 2, "failed": 0, "without_a_token": 2,
    }  # fmt: skip
    assert [record.cut for record in run.records] == [False, False, True, True]


def test_several_tokens_in_one_message_are_as_many_tokens():
    _, report = measured(Load(streams=1, requests=1), works(), per_message=3, step_s=0.3)
    # Three tokens after 0.5 s, one more after 0.3 s.
    assert report["output_tokens"] == 4
    assert report["between_tokens_s"]["n"] == 1
    assert report["tokens_per_message"] == 2
    _, report = measured(Load(streams=1, requests=1), works(), per_message=2, step_s=0.3)
    # A pause of 0.3 s before two tokens: 0.15 s for each, but nothing came for 0.3 s.
    assert report["between_tokens_s"] == {name: pytest.approx(0.15) for name in ("p50", "p90", "p99", "max")} | {"n": 2}
    assert report["longest_pause_s"] == pytest.approx(0.3)


def test_messages_without_tokens_are_no_first_token():
    async def slow(work):
        await asyncio.sleep(1)
        yield Arrival()
        await asyncio.sleep(1)
        yield Arrival(tokens=1, finish_reason="length", num_output_tokens=2)

    prompts = works(prompts=[Prompt(text="slow")])
    run, report = measured(Load(streams=1, requests=1), prompts, script={"slow": slow})
    assert firsts(run) == [2]
    assert report["miscounted"] == 1  # the server says two


def test_an_open_loop_sends_when_requests_arrive_and_counts_waiting():
    load = Load(rate=2.0, requests=5, seed=3)
    due = list(islice(load.arrivals_s(), 5))
    run, report = measured(load, works(), one_at_a_time=True)
    free, expected = 0.0, []
    for at in due:
        begun = max(at, free)
        expected.append(pytest.approx(begun + 0.5 - at))
        free = begun + 0.8
    assert [record.sent_s for record in run.records] == [pytest.approx(at) for at in due]
    assert [record.first_token_s for record in run.records] == expected
    assert report["generator"]["late_s"]["max"] == pytest.approx(0)
    assert report["fairness"]["over"] == "tokens a second of each answer"


def test_arrivals_of_an_open_loop_have_the_rate_and_the_spread_of_a_poisson_process():
    load = Load(rate=4.0, requests=1)
    times = [0.0, *islice(load.arrivals_s(), 20_000)]
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 4, rel=0.03)  # an exponential distribution's deviation equals its mean
    assert deviation == pytest.approx(1 / 4, rel=0.03)
    assert list(islice(Load(rate=4.0, requests=1).arrivals_s(), 5)) == times[1:6]


def test_a_request_that_is_sent_late_counts_from_when_it_was_due():
    """Coordinated omission: the time in which the generator could not send must not vanish."""

    async def stalling(work):
        asyncio.get_running_loop().simulated.now += 10
        await asyncio.sleep(0.5)
        yield Arrival(tokens=1, finish_reason="length")

    load = Load(rate=100.0, requests=2)
    due = list(islice(load.arrivals_s(), 2))
    prompts = works(prompts=[Prompt(text="stall")])
    run, report = measured(load, prompts, script={"stall": stalling})
    assert run.records[1].sent_s - due[1] > 9
    assert firsts(run)[1] == run.records[1].arrivals[0][0] - due[1]
    assert report["first_token_s"]["max"] > 19
    assert report["generator"]["late_s"]["max"] > 9


def test_early_ends_close_the_request_after_the_tokens_that_the_seed_says():
    made = works(early_share=1.0)
    load = Load(streams=2, requests=6)

    async def main():
        server = StandIn()
        run = await apply(server, load, made)
        return server, run, summarise(run, load, made, cores=2)

    server, run, report = simulate(main)
    wanted = [made.work(index).early_after for index in range(6)]
    assert {1, 2, 3} >= set(wanted)
    assert [record.num_tokens for record in run.records] == wanted
    assert sorted(server.closed) == sorted(wanted)
    assert report["requests"]["ended_early"] == 6
    assert report["requests"]["answered"] == report["answer_s"]["n"] == 0


def test_errors_are_counted_by_kind_and_leave_the_others_alone():
    async def refused(work):
        raise ServerOverloaded("queue full", status="UNAVAILABLE")
        yield

    prompts = works(prompts=[Prompt(text="good"), Prompt(text="bad")])
    load = Load(streams=1, requests=20)
    run, report = measured(load, prompts, script={"bad": refused})
    bad = sum(prompts.work(index).prompt == "bad" for index in range(20))
    assert 0 < bad < 20
    assert report["errors"] == {"ServerOverloaded UNAVAILABLE": bad}
    assert report["requests"]["failed"] == report["requests"]["without_a_token"] == bad
    assert report["requests"]["answered"] == 20 - bad
    assert report["window_s"] == pytest.approx(0.8 * (20 - bad) + PAUSE_AFTER_ERROR_S * bad)
    assert next(record.message for record in run.records if record.error).startswith("queue full")


@pytest.mark.parametrize("load", [{"streams": 2}, {"rate": 100.0}])
def test_a_load_that_stops_at_an_error_sends_nothing_after_it(load):
    async def refused(work):
        await asyncio.sleep(0.05)
        raise ServerOverloaded("queue full", status="UNAVAILABLE")
        yield

    made = [Work(prompt="good", max_tokens=4)] * 3 + [Work(prompt="bad", max_tokens=4)] * 1000
    run = simulate(lambda: apply(StandIn(script={"bad": refused}), Load(requests=1003, stops_at_error=True, **load),
                                 Listed(made)))  # fmt: skip
    first_error = min(record.end_s for record in run.records if record.error)
    assert len(run.records) < 50
    assert all(record.sent_s <= first_error for record in run.records)
    assert sum(record.is_answered for record in run.records) == 3


@pytest.mark.parametrize(("load", "ahead"), [
    (Load(streams=1, requests=3), 3), (Load(streams=1, requests=100_000), MOST_AHEAD),
    (Load(streams=1, duration_s=1.0), AHEAD),
])  # fmt: skip
def test_a_long_load_does_not_make_all_of_its_requests_before_it_begins(load, ahead):
    made = []

    class Counted(Listed):
        def prepare(self, first, count):
            made.append((first, count))

    stop = asyncio.Event()
    stop.set()
    simulate(lambda: apply(StandIn(), load, Counted([Work(prompt="x", max_tokens=1)] * 20), 7, stop=stop))
    assert made == [(7, ahead)]


def test_a_fault_of_the_generator_is_no_failed_request():
    async def broken(work):
        raise ZeroDivisionError
        yield

    prompts = works(prompts=[Prompt(text="x")])
    for load in (Load(streams=2, requests=2), Load(rate=5.0, requests=2)):
        with pytest.raises(ZeroDivisionError):
            measured(load, prompts, script={"x": broken})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"requests": 1}, "expected either streams or a rate"),
        ({"streams": 1, "rate": 2.0, "requests": 1}, "expected either streams or a rate"),
        ({"streams": 1}, "expected either a number of requests or a duration"),
        ({"streams": 0, "requests": 1}, "the number of streams is 0, expected 1 or more"),
        ({"rate": float("nan"), "requests": 1}, "the rate is nan, expected"),
        ({"rate": 1.0, "duration_s": -1.0}, "the duration is -1.0, expected seconds above 0"),
        ({"streams": 1, "requests": 0}, "the number of requests is 0, expected 1 or more"),
    ],
)
def test_a_load_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Load(**fields)
