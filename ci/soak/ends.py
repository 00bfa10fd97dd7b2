"""How soon an ended stream gives its slot back, in steps of the engine."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

import grpc

from clients.errors import ClientError
from clients.generation import AsyncClient
from clients.wire import read_piece
from soak.served import Report, Served
from soak.wire import Relay, raw_call
from soak.wishes import Wish, draw_wishes, longer

# What an end takes to reach the model: over the connection, and through Triton.
TRANSIT_S = 0.01
MOST_STEPS = 1  # the one that is computed when the end arrives
# Ends that may take a step more, since a token was on its way to the client, or the end on its way to the model.
LATE_SHARE = 0.1
LOGGED_S = 20.0
_EVENLY = {"temperature": 100.0, "top_k": None, "top_p": 1.0}


async def ends(served: Served, number: int, seed: int) -> Report:
    """End so many streams, one after the other, by a request to stop and by a torn connection in turn.

    A stream that runs alone gets one token a step, where no draft is accepted: the tokens of these are drawn so evenly
    that none can be guessed. So the steps from an end to a free slot are the tokens that the
    request log counts and that had not arrived when the client left.
    """
    report, source = Report(), random.Random(f"ends {seed}")
    if served.log is None:
        report.counts["not measured: no --request-log"] += 1
        return report
    wishes = [wish for wish in draw_wishes(served.model, 40, seed) if wish.kind in ("greedy", "sampled")]
    before = await served.settled()
    received: dict[str, tuple[str, int]] = {}
    async with served.client() as client:
        await _stop(client, longer(wishes[0], 20), 1)  # the client then knows how it must end a stream
        for count in range(number):
            wish = longer(source.choice(wishes), 10_000)
            name, tokens = f"end-{seed}-{time.time_ns()}", source.randint(1, 20)
            wish = replace(wish, request=replace(wish.request, request_id=name, **_EVENLY))
            with suppress(ClientError, grpc.RpcError):
                if count % 2:
                    received[name] = ("stop", await _stop(client, wish, tokens))
                else:
                    received[name] = ("tear", await _tear(served, wish, tokens))
            await served.await_answers()
    lines = await _logged(served, set(received))
    after = await served.settled()
    restarts = int(after["server_restarts_total"] - before["server_restarts_total"])
    report.counts["restarts"] += restarts
    missing = sum(name not in lines for name in received)
    report.require(missing <= restarts, f"{missing} requests have no line in the request log")
    if restarts:  # the counters began again
        before = dict.fromkeys(before, 0.0)
    steps = after["step_seconds_count"] - before["step_seconds_count"]
    step_s = (after["step_seconds_sum"] - before["step_seconds_sum"]) / max(1.0, steps)
    _judge(report, received, lines, step_s)
    return report


def _judge(
    report: Report, received: dict[str, tuple[str, int]], lines: dict[str, dict[str, Any]], step_s: float
) -> None:
    steps: dict[str, Counter[int]] = {"stop": Counter(), "tear": Counter()}
    for name, (way, count) in received.items():
        line = lines.get(name, {})
        if line.get("end") in ("stopped", "disconnected"):
            report.counts[line["end"]] += 1
            steps[way][line["output_tokens"] - count] += 1
    most = MOST_STEPS + int(TRANSIT_S / max(step_s, 1e-6))
    found = {way: dict(sorted(counter.items())) for way, counter in steps.items()}
    report.numbers.update(step_s=round(step_s, 4), steps=found, most_allowed=most)
    for way, counter in steps.items():
        report.require(bool(counter), f"no stream was ended: {way}")
        late = sum(count for taken, count in counter.items() if taken > most)
        is_late = late > LATE_SHARE * counter.total() or max(counter, default=0) > most + 1
        report.require(not is_late, f"{way}: {late} slots were free only after {max(counter, default=0)} steps")


async def _stop(client: AsyncClient, wish: Wish, tokens: int) -> int:
    """Close a stream of our client. Returns the tokens that had arrived when it was closed."""
    count = 0
    async with aclosing(client.stream(wish.request)) as pieces:
        async for piece in pieces:
            count += len(piece.token_ids)
            if count >= tokens:
                break
    return count


async def _tear(served: Served, wish: Wish, tokens: int) -> int:
    """Tear a connection. Returns the tokens that had arrived."""
    count = 0
    async with Relay(served.url) as relay, raw_call(served, relay.url, [wish]) as (_, call):
        while count < tokens:
            message = await call.read()
            piece = read_piece(message.infer_response, log_probs=False)
            count += len(piece.token_ids) if piece else 0
        await relay.tear(reset=False)
    return count


async def _logged(served: Served, ids: set[str]) -> dict[str, dict[str, Any]]:
    """The lines of these requests, once all are written."""
    due = time.monotonic() + LOGGED_S
    while len(lines := served.lines_of(ids)) < len(ids) and time.monotonic() < due:
        await asyncio.sleep(0.2)
    return lines
