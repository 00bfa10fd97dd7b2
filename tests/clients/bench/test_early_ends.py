"""Loads that end early: stopped, or because the server is gone. What was measured stays, and is marked."""

from __future__ import annotations

import asyncio

import pytest
from bench_standin import StandIn, simulate, works

from clients.bench.generator import GONE, INTERRUPTED, PAUSE_AFTER_ERROR_S, apply
from clients.bench.load import Load
from clients.bench.records import Arrival
from clients.bench.report import summarise
from clients.errors import ConnectionFailed, ServerOverloaded


def measured(load, server, stops_at=None, **fields):
    async def main():
        stop = asyncio.Event()
        if stops_at is not None:
            asyncio.get_running_loop().call_later(stops_at, stop.set)
        run = await apply(server, load, works(), stop=stop, **fields)
        return run, summarise(run, load, works(), cores=2)

    return simulate(main)


class Mortal(StandIn):
    """A stand-in that refuses connections from a time on, and answers again from another."""

    dies_at, lives_at, error = 2.0, float("inf"), ConnectionFailed

    async def answer(self, work):
        if self.dies_at <= asyncio.get_running_loop().time() < self.lives_at:
            raise self.error("nobody there", status="UNAVAILABLE")
        async for arrival in super().answer(work):
            yield arrival


@pytest.mark.parametrize("load", [{"streams": 2}, {"rate": 2.0, "seed": 1}])
def test_a_stopped_load_keeps_what_has_arrived(load):
    kept = []
    run, report = measured(Load(requests=1000, **load), StandIn(), stops_at=5.0, keep=kept.append)
    assert run.ended == report["ended_early"] == INTERRUPTED
    assert run.window_s == pytest.approx(5.0)
    assert sorted(record.index for record in kept) == [record.index for record in run.records]
    cut = [record for record in run.records if record.cut]
    assert cut
    assert all(record.end_s == pytest.approx(5.0) for record in cut)
    assert report["requests"]["answered"] == sum(record.due_s + 0.8 <= 5.0 + 1e-9 for record in run.records)
    assert report["requests"]["failed"] == 0
    arrived = sum(tokens for record in run.records for _, tokens in record.arrivals)
    assert report["output_tokens_per_s"] == pytest.approx(arrived / 5)


def test_a_load_that_was_whole_is_not_marked():
    run, report = measured(Load(streams=1, requests=2), StandIn(), stops_at=50.0)
    assert run.ended is report["ended_early"] is None
    run, _ = measured(Load(streams=1, duration_s=2.0), StandIn(), stops_at=50.0)
    assert (run.ended, run.window_s) == (None, 2.0)


def test_a_server_that_is_gone_ends_the_load_at_the_first_of_the_failures():
    run, report = measured(Load(streams=1, requests=10_000), Mortal(), patience_s=1.0)
    # Answers end at 0.8, 1.6 and 2.4; connections fail from 2.4 on, every PAUSE_AFTER_ERROR_S.
    assert run.ended == GONE
    assert run.window_s == pytest.approx(2.4)
    assert report["requests"]["answered"] == 3
    assert report["requests"]["failed"] == pytest.approx(1.0 / PAUSE_AFTER_ERROR_S, abs=2)
    assert report["requests_per_s"] == pytest.approx(3 / 2.4)
    assert report["output_tokens_per_s"] == pytest.approx(12 / 2.4)


def test_a_server_that_comes_back_in_time_is_measured_through_its_absence():
    server = Mortal()
    server.lives_at = 2.9
    run, report = measured(Load(streams=1, requests=20), server, patience_s=1.0)
    assert run.ended is None
    assert len(run.records) == 20
    assert report["errors"] == {"ConnectionFailed UNAVAILABLE": 20 - report["requests"]["answered"]}
    assert 4 <= 20 - report["requests"]["answered"] <= 6


def test_refusals_and_answers_beside_failures_are_no_gone_server():
    server = Mortal()
    server.error = ServerOverloaded
    run, report = measured(Load(streams=1, requests=60), server, patience_s=1.0)
    assert (run.ended, report["requests"]["sent"]) == (None, 60)

    class Half(StandIn):
        """Every second connection fails."""

        async def answer(self, work):
            if len(self.works) % 2:
                self.works.append(work)
                raise ConnectionFailed("one of two is gone", status="UNAVAILABLE")
            async for arrival in super().answer(work):
                yield arrival

    run, report = measured(Load(streams=1, requests=40), Half(), patience_s=0.01)
    assert (run.ended, report["requests"]["failed"]) == (None, 20)


def test_a_server_that_refuses_between_failed_connections_is_there():
    """Connections fail at 0, are refused by the server for 2 s, and fail again: at no time for as long as 1 s."""

    class Restarting(StandIn):
        async def answer(self, work):
            self.works.append(work)
            now = asyncio.get_running_loop().time() - started
            raise (ServerOverloaded if 0.2 < now < 2.2 else ConnectionFailed)("not yet", status="UNAVAILABLE")
            yield

    started = 0.0
    run, _ = measured(Load(streams=1, requests=28), Restarting(), patience_s=1.0)
    assert (run.ended, len(run.records)) == (None, 28)


def test_a_request_that_was_answered_by_then_is_whole():
    async def quick(work):
        yield Arrival(tokens=1, finish_reason="length")

    server = StandIn()
    server.answer = quick
    run, _ = measured(Load(streams=1, requests=3), server, stops_at=0.0)
    assert all(record.is_answered for record in run.records)
