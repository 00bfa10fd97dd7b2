"""Plans of capacity against queues whose latencies are known: an M/M/1 queue, and a stand-in that is measured."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from bench_standin import works

from clients.bench.capacity import Checked, Curve, as_json, check, plan_capacity
from clients.bench.kept import Level, LoadTest
from clients.bench.load import Load
from clients.bench.objective import read_objective
from clients.bench.points import LARGEST_ERROR, Point, points_of
from clients.bench.records import Record, Run
from clients.bench.report import summarise
from export.errors import ConfigError

ROOT = Path(__file__).parents[3]
SERVICE = 10.0  # answers a second that the queue can give


def quantile(rate, share):
    """The time in an M/M/1 queue is exponential with the rate of services less that of arrivals."""
    return -math.log(1 - share) / (SERVICE - rate)


def point(rate, share=0.9, **fields):
    latencies = {"first_token_s": quantile(rate, share), "answer_s": 2 * quantile(rate, share)}
    values = {"name": f"{rate:g}/s", "rate": rate, "num_requests": 1000, "tokens_per_request": 8.0, "keeps_up": True}
    return Point(**{**values, "latencies": latencies, **fields})


POINTS = [point(rate) for rate in (2.0, 5.0, 8.0, 9.0)]


@pytest.mark.parametrize(("bound_ms", "servers"), [(500, 8), (1000, 6), (2000, 5)])
def test_servers_of_a_queue_that_is_known(bound_ms, servers):
    """p90 is 2.303 / (10 - r): within 0.5 s up to 5.395/s, 1 s up to 7.697/s, 2 s up to 8.849/s. 40/s need 8, 6, 5."""
    plan = plan_capacity(POINTS, 40.0, read_objective(str(bound_ms), "x"), 0.9)
    assert plan.most_rate == pytest.approx(SERVICE - math.log(10) / (bound_ms / 1e3))
    assert plan.servers == servers == math.ceil(40 / plan.most_rate)
    assert plan.predicted["first_token_s"] == pytest.approx(quantile(40 / servers, 0.9))
    assert plan.tokens_per_s == pytest.approx(40 / servers * 8)
    assert not plan.is_measured_end


def test_the_strictest_bound_decides():
    plan = plan_capacity(POINTS, 10.0, read_objective("ttft:2000,e2e:1000", "x"), 0.9)
    assert plan.most_rate == pytest.approx(SERVICE - 2 * math.log(10))


def test_nothing_is_said_beyond_what_was_measured():
    plan = plan_capacity(POINTS, 18.0, read_objective("5000", "x"), 0.9)
    assert (plan.most_rate, plan.is_measured_end, plan.servers) == (9.0, True, 2)
    with pytest.raises(ValueError, match="above the highest measured rate 9.0"):
        Curve([(2.0, 0.1, 1), (9.0, 0.2, 1)]).at(9.1)
    assert Curve([(2.0, 0.1, 1), (9.0, 0.2, 1)]).at(0.5) == pytest.approx(0.1)


def test_no_number_of_servers_meets_what_one_misses_when_idle():
    plan = plan_capacity(POINTS, 1.0, read_objective("100", "x"), 0.9)
    assert plan.servers is plan.most_rate is None
    assert as_json(plan)["rate_of_each"] is None


def test_rates_at_which_the_server_falls_behind_or_fails_are_no_part_of_the_curve():
    behind = [*POINTS[:3], point(9.5, keeps_up=False)]
    failing = [*POINTS[:3], point(9.5, latencies={"first_token_s": math.inf, "answer_s": math.inf})]
    for points in (behind, failing):
        plan = plan_capacity(points, 8.0, read_objective("60000", "x"), 0.9)
        assert (plan.most_rate, plan.servers) == (8.0, 1)
    assert as_json(plan)["points"][3]["latencies"] == {"first_token_s": None, "answer_s": None}
    with pytest.raises(ConfigError, match="kept up at 1 of the 2 measured rates"):
        plan_capacity([POINTS[0], behind[3]], 8.0, read_objective("500", "x"), 0.9)


def test_points_that_fall_by_chance_are_pooled():
    curve = Curve([(1.0, 0.2, 100), (2.0, 0.4, 100), (3.0, 0.1, 300), (4.0, 1.0, 100)])
    # The reciprocals 2.5 and 10 of 100 and 300 requests, then 5 above: all three are (5 + 2.5 + 3 * 10) / 5 = 7.5.
    assert [curve.at(rate) for rate in (1.0, 2.0, 3.0)] == pytest.approx([1 / 7.5] * 3)
    assert curve.at(4.0) == pytest.approx(1.0)


def test_each_point_is_checked_against_the_others():
    found = check(POINTS)
    assert [one.point.rate for one in found] == [5.0, 8.0]
    assert [one.error("first_token_s") for one in found] == pytest.approx([0, 0])
    wrong = [*POINTS[:2], point(8.0, latencies={"first_token_s": 2 * quantile(8, 0.9), "answer_s": 4.0}), POINTS[3]]
    assert check(wrong)[1].error("first_token_s") == pytest.approx(-0.5)


def measured(rate, seed, count=20_000):
    """A server that answers one at a time, in the order of arrival, each in a time of its own: an M/G/1 queue."""
    draws = np.random.default_rng(seed)
    due, free, found = 0.0, 0.0, []
    for index, (gap, tokens) in enumerate(
        zip(draws.exponential(1 / rate, count).tolist(), draws.integers(2, 10, count).tolist(), strict=True)
    ):
        due += gap
        begun = max(due, free)
        first, free = begun + 0.02, begun + 0.02 + 0.01 * (tokens - 1)
        found.append(
            Record(index=index, stream=index, due_s=due, sent_s=due, max_tokens=tokens, end_s=free,
                   arrivals=[(first, 1), (free, tokens - 1)])
        )  # fmt: skip
    load = Load(rate=rate, requests=count)
    run = Run(records=found, window_s=free, cpu_s=0.0, counting="x")
    return Level(name=f"{rate:g}/s", report=summarise(run, load, works(), 2), records=found)


def test_a_round_of_failures_makes_its_rate_uncertain():
    """A tenth of the requests of one round of four failed: it has no p90, and the four together have one."""
    tests = [LoadTest(about={}, levels=[measured(4.0, seed, 400), measured(8.0, seed, 400)]) for seed in range(4)]
    for record in tests[0].levels[1].records[::9]:
        record.error = "ServerFailed"
    calm, failing = points_of(tests, 0.9)
    assert failing.latencies["answer_s"] < math.inf
    assert failing.errors["answer_s"] == LARGEST_ERROR
    assert calm.errors["answer_s"] < 0.5


def test_a_rate_that_the_plan_has_not_seen_is_predicted_within_15_percent():
    """Half of a server's rate to nine tenths of it."""
    tests = [LoadTest(about={}, levels=[measured(rate, 1) for rate in (4.0, 6.0, 8.0, 10.0, 12.0, 13.5)])]
    unseen = points_of([LoadTest(about={}, levels=[measured(rate, 5) for rate in (7.0, 9.0, 11.0, 12.5)])], 0.9)
    points = points_of(tests, 0.9)
    assert [point.num_requests for point in points] == [20_000] * 6
    assert all(point.keeps_up for point in points)
    for one in unseen:
        plan = plan_capacity(points, one.rate, read_objective("60000", "x"), 0.9)
        for name, value in one.latencies.items():
            assert plan.predicted[name] == pytest.approx(value, rel=0.15), (one.name, name)
        assert plan.tokens_per_s == pytest.approx(one.rate * one.tokens_per_request, rel=0.02)


def lasting(rate, answer_s, *, window_s=60.0, early=False, capacity=math.inf):
    """A load of `window_s` seconds whose requests arrive evenly and are served one after another, `capacity` a second,
    each answer `answer_s` after its turn."""
    found = []
    for index in range(int(rate * window_s)):
        due = index / rate
        end = max(due, index / capacity) + answer_s
        found.append(
            Record(index=index, stream=index, due_s=due, sent_s=due, max_tokens=1, end_s=min(end, window_s),
                   cut=end > window_s, ended_early=early and end <= window_s)
        )  # fmt: skip
    load = Load(rate=rate, duration_s=window_s)
    run = Run(records=found, window_s=window_s, cpu_s=0.0, counting="x")
    return Level(name=f"{rate:g}/s", report=summarise(run, load, works(), 2), records=found)


def test_a_server_falls_behind_by_its_rate_not_by_the_time_of_an_answer():
    """Of answers that take 12 s, a fifth of a minute's are under way at its end, however idle the server is."""
    levels = [lasting(2.0, 12.0), lasting(3.0, 12.0, early=True), lasting(4.0, 12.0, capacity=3.0), lasting(5.0, 0.1),
              lasting(6.0, 0.1, capacity=5.0)]  # fmt: skip
    assert [point.keeps_up for point in points_of([LoadTest(about={}, levels=levels)], 0.9)] == [
        True, True, False, True, False,
    ]  # fmt: skip


def records(firsts, *, failed=0, cut=0):
    """Requests that were due once a second, `failed` and `cut` (after 3 s) ones behind them."""
    kinds = [*(("", first) for first in firsts), *[("failed", 0.0)] * failed, *[("cut", 3.0)] * cut]
    return [
        Record(
            index=at, stream=at, due_s=float(at), sent_s=float(at), max_tokens=1,
            arrivals=[] if kind else [(at + first, 1)], end_s=at + first, cut=kind == "cut",
            error="ServerFailed" if kind == "failed" else None,
        )
        for at, (kind, first) in enumerate(kinds)
    ]  # fmt: skip


def level(rate, found, **described):
    load = {"kind": "open loop, Poisson arrivals", "rate": rate, "duration_s": 100.0, **described}
    answered = sum(record.is_answered for record in found) / 100.0
    report = {"load": load, "ended_early": None, "window_s": 100.0, "requests_per_s": answered}
    return Level(name=f"{rate:g}/s", report=report, records=found)


def drawn(draws, rate, count, slow):
    """A round in which first tokens take exponential times as of an M/M/1 queue, all of them `slow` times as long."""
    due = np.sort(draws.uniform(0, count / rate, count)).tolist()
    firsts = slow * draws.exponential(1 / (SERVICE - rate), count)
    found = [
        Record(index=at, stream=at, due_s=due[at], sent_s=due[at], max_tokens=1, arrivals=[(due[at] + first, 1)],
               end_s=due[at] + first)
        for at, first in enumerate(firsts.tolist())
    ]  # fmt: skip
    load = {"kind": "open loop, Poisson arrivals", "rate": rate, "duration_s": count / rate}
    report = {"load": load, "ended_early": None, "window_s": count / rate, "requests_per_s": rate}
    return Level(name=f"{rate:g}/s", report=report, records=found)


@pytest.mark.parametrize("sigma", [0.0, 0.2])
def test_predictions_are_as_far_off_as_chance_is_said_to_put_them(sigma):
    """The law is the one that the curve assumes, so all that is off is chance: 95 % of 60 checks lie within, on
    average 57; fewer than 52 have a chance of 1 %. `sigma`: how far rounds differ."""
    held, spans = 0, []
    for turn in range(20):
        draws = np.random.default_rng(turn)
        rounds = [
            LoadTest(about={}, levels=[
                drawn(draws, rate, 200, math.exp(sigma * draws.normal())) for rate in (1.0, 3.0, 5.0, 7.0, 8.5)
            ])
            for _ in range(3)
        ]  # fmt: skip
        for one in check(points_of(rounds, 0.9)):
            apart, chance = math.log1p(one.error("first_token_s")), one.chance["first_token_s"]
            held += abs(apart) <= math.log1p(chance)
            spans.append(chance)
    assert held >= 52
    # p90 of 600 requests has a relative error of 1.3 / sqrt(600) = 5.3 %, rounds add sigma / sqrt(3). The prediction of
    # two neighbours has about as much, and 95 % lie within 1.96 of both.
    error = math.hypot(0.053, sigma / math.sqrt(3))
    assert np.median(spans) == pytest.approx(math.expm1(1.96 * error * math.sqrt(1.75)), rel=0.25)


def test_what_chance_puts_far_apart_is_called_uncertain():
    draws = np.random.default_rng(3)
    few, many = (
        points_of([LoadTest(about={}, levels=[drawn(draws, rate, count, 1.0) for rate in (2.0, 5.0, 8.0)])], 0.9)
        for count in (80, 6000)
    )
    objective = read_objective("800", "x")
    plan, certain = (plan_capacity(points, 30.0, objective, 0.9) for points in (few, many))
    assert not plan.is_certain("first_token_s")
    assert not plan.checked[0].is_certain("first_token_s")
    assert certain.is_certain("first_token_s")
    assert certain.checked[0].is_certain("first_token_s")
    for one in (plan, certain):
        low, high = one.predicted_within["first_token_s"]
        assert low < one.predicted["first_token_s"] < high
        assert one.servers_within[0] <= one.servers <= one.servers_within[1]
    # The interval narrows with the root of the number of requests: so many times as many make it 15 %.
    low, high = plan.predicted_within["first_token_s"]
    times = plan.times_longer("first_token_s")
    assert math.sqrt(high / low) ** (1 / math.sqrt(times)) <= 1.15 < math.sqrt(high / low) ** (1 / math.sqrt(times - 1))


def test_a_round_on_a_busy_machine_is_one_of_several():
    """Of three rounds one has first tokens ten times as late: pooled, it would make the whole tail."""
    draws = np.random.default_rng(4)
    tests = [LoadTest(about={}, levels=[drawn(draws, rate, 400, slow) for rate in (2.0, 8.0)]) for slow in (1, 1, 10)]
    points = points_of(tests, 0.9)
    assert [point.rounds for point in points] == [3, 3]
    for point in points:
        expected = quantile(round(point.rate), 0.9) * 10 ** (1 / 3)
        assert point.latencies["first_token_s"] == pytest.approx(expected, rel=0.2)
        # ln(10) / 3 * sqrt(2) = 1.09 is the deviation of ln(1), ln(1), ln(10): as error of a mean of three 0.77.
        assert point.errors["first_token_s"] == pytest.approx(0.77, rel=0.15)


def test_few_requests_have_no_certain_tail():
    [one, _] = points_of([LoadTest(about={}, levels=[level(r, records([0.1, 0.2] * 20)) for r in (1.0, 2.0)])], 0.9)
    assert one.errors["first_token_s"] == LARGEST_ERROR


def test_failed_and_cut_requests_count():
    firsts = np.linspace(0.1, 1.0, 90).tolist()
    one, two, three = points_of(
        [LoadTest(about={}, levels=[
            level(1.0, records(firsts)), level(2.0, records(firsts, failed=10)), level(3.0, records(firsts, cut=10)),
        ])],
        0.9,
    )  # fmt: skip
    assert one.latencies["first_token_s"] == pytest.approx(np.quantile(firsts, 0.9))
    assert "between_tokens_s" not in one.latencies
    assert two.rate == three.rate == pytest.approx(1.0)
    assert two.latencies["first_token_s"] == math.inf  # the 90th of a hundred has none
    assert three.latencies["first_token_s"] == pytest.approx(np.quantile([*firsts, *[3.0] * 10], 0.9))
    with pytest.raises(ConfigError, match="bounds between_tokens_s, which no answer has"):
        plan_capacity([one, one], 1.0, read_objective("itl:5", "x"), 0.9)


def test_tests_that_cannot_be_planned_with_are_refused():
    found = records([0.1] * 50)
    closed = level(1.0, found)
    closed.report["load"]["kind"] = "closed loop"
    with pytest.raises(ConfigError, match="found 1 whole open loops in the load tests, expected 2 rates or more"):
        points_of([LoadTest(about={}, levels=[level(1.0, found), closed])], 0.9)
    rates = [level(1.0, found), level(2.0, found)]
    with pytest.raises(ConfigError, match="a load test has 2 servers .a:1, b:1., expected one"):
        points_of([LoadTest(about={"urls": ["a:1", "b:1"]}, levels=rates)], 0.9)
    with pytest.raises(ConfigError, match="of different models .mixtral, phixtral.; give tests of one"):
        points_of([LoadTest(about={"model": model}, levels=rates) for model in ("phixtral", "mixtral")], 0.9)
    early = level(2.0, found)
    early.report["ended_early"] = "interrupted"
    with pytest.raises(ConfigError, match="found 1 whole open loops"):
        points_of([LoadTest(about={}, levels=[level(1.0, found), early])], 0.9)
    levels = [level(1.0, found, max_tokens="8"), level(2.0, found, max_tokens="64")]
    with pytest.raises(ConfigError, match="sent different requests .max_tokens 64; max_tokens 8."):
        points_of([LoadTest(about={}, levels=levels)], 0.9)


def test_the_script_that_measures_plans_counts_certain_predictions_alone():
    script = importlib.util.spec_from_file_location("capacity_check", ROOT / "ci" / "capacity_check.py")
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    latencies = {"first_token_s": 0.1}
    checked = [
        Checked(point=point(rate, latencies=latencies), predicted={"first_token_s": value},
                chance={"first_token_s": chance})
        for rate, value, chance in ((1.0, 0.11, 0.1), (2.0, 0.12, 0.1), (3.0, 0.2, 0.3))
    ]  # fmt: skip
    assert module.counts(checked) == (2, 1, 3)
    assert [line.split("  ")[-1] for line in module.lines(checked)] == ["met", "MISSED", "too uncertain to say"]
