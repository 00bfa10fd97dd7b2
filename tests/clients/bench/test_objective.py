"""Objectives, and which requests met them: every verdict is worked out by hand."""

from __future__ import annotations

import pytest
from bench_standin import StandIn, simulate, works

from clients.bench.generator import apply
from clients.bench.load import Load
from clients.bench.objective import Objective, goodput, read_objective
from clients.bench.records import Record
from clients.bench.report import summarise


def record(times=(), end=None, **fields):
    """A request that was due at 1 s, with one token at each time."""
    arrivals = [(at, 1) for at in times]
    end_s = end if end is not None else times[-1]
    return Record(index=0, stream=0, due_s=1.0, sent_s=1.0, max_tokens=4, arrivals=arrivals, end_s=end_s, **fields)


def test_bounds_are_read_in_milliseconds():
    assert read_objective("500", "x") == Objective(first_token_s=0.5)
    assert read_objective("itl:50, ttft:200.5,e2e:8000", "x") == Objective(
        first_token_s=0.2005, between_tokens_s=0.05, answer_s=8.0
    )
    assert str(read_objective("e2e:8000,ttft:500", "x")) == "ttft:500,e2e:8000"
    assert read_objective(str(read_objective("itl:12.5", "x")), "x") == Objective(between_tokens_s=0.0125)


@pytest.mark.parametrize(
    ("bounds", "measured", "verdict"),
    [
        ("500", record((1.5, 1.6)), True),
        ("499", record((1.5, 1.6)), False),
        # 0.2 s for each of the three tokens after the first, although one came after 0.4 s.
        ("itl:201", record((1.5, 1.6, 1.7, 2.1)), True),
        ("itl:199", record((1.5, 1.6, 1.7, 2.1)), False),
        ("itl:1", record((1.5,)), True),  # an answer of one token has no time between tokens
        ("e2e:1100", record((1.5, 2.1)), True),
        ("e2e:1099", record((1.5, 2.1)), False),
        ("ttft:500,e2e:1000", record((1.5, 2.1)), False),
        ("5000", record((1.5,), error="ServerFailed"), False),
        ("5000", record((), end=1.1, error="ServerOverloaded"), False),
        # Ended before that is known, and after it was.
        ("5000", record((), end=2.0, cut=True), None),
        ("500", record((), end=2.0, cut=True), False),
        ("e2e:5000", record((1.5,), end=2.0, cut=True), None),
        ("ttft:400", record((1.5,), end=2.0, ended_early=True), False),
        ("ttft:600", record((1.5,), end=2.0, ended_early=True), None),
    ],
)
def test_verdicts(bounds, measured, verdict):
    assert read_objective(bounds, "x").verdict(measured) is verdict


def test_goodput_counts_the_requests_that_met_the_objective_in_the_window():
    records = [
        record((1.5,)), record((1.5,), end=9.0), record((1.9,)), record((), end=1.1, error="ServerFailed"),
        record((), end=1.2, cut=True),
    ]  # fmt: skip
    found = goodput(records, Objective(first_token_s=0.6), window_s=4.0)
    assert found == {
        "objective": "ttft:600", "met": 2, "missed": 2, "unknown": 1, "share_met": 0.5, "requests_per_s": 0.25,
    }  # fmt: skip


def test_waiting_in_a_queue_misses_the_objective():
    """Answers take 0.8 s, one at a time, and all four are due at once: first tokens at 0.5, 1.3, 2.1 and 2.9 s."""

    async def main():
        load = Load(streams=4, requests=4)
        run = await apply(StandIn(one_at_a_time=True), load, works())
        return summarise(run, load, works(), 2, Objective(first_token_s=2.0))

    report = simulate(main)
    assert (report["goodput"]["met"], report["goodput"]["missed"]) == (2, 2)
    assert report["goodput"]["requests_per_s"] == pytest.approx(2 / 3.2)
    assert report["requests_per_s"] == pytest.approx(4 / 3.2)
