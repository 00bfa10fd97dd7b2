"""More requests at once than the queue holds."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

from clients.errors import ClientError, ServerOverloaded
from clients.generation import AsyncClient, GenerationRequest
from soak.served import Report, Served
from soak.wishes import NO_END, PATIENCE_S, Answers, Wish, alone, difference, draw_wishes, joined, shape_fault

REFUSED_BAR_S, FIRST_BAR_S = 1.0, 2.0
# What a refusal says: how many wait, and when to send the request again.
_REFUSAL = re.compile(r"\d+ requests wait already, .* send it again in about \d+ s")
CONNECTIONS = 4


@dataclass(frozen=True)
class _Outcome:
    """What became of one request of a burst, with the seconds from when it was sent."""

    wish: Wish
    seconds: float
    first_s: float | None
    answers: Answers = ()
    error: ClientError | None = None


async def burst(served: Served, number: int, different: int, seed: int, *, rounds: bool) -> Report:
    """Send `number` requests at once, of so many different ones. `rounds` says that the engine rounds, so that a text
    may differ in a batch."""
    report = Report()
    wishes = [wish for wish in draw_wishes(served.model, different, seed) if wish.request.num_return_sequences is None]
    wishes = [replace(wish, stream=True) for wish in wishes]
    async with AsyncClient(served.url) as client:
        expected = dict(zip(map(id, wishes), await alone(client, wishes), strict=True))
        before = await served.settled()
        clients = [AsyncClient(served.url) for _ in range(CONNECTIONS)]
        for one in clients:
            await one.server_ready()
        outcomes = await asyncio.gather(
            *(_ask(clients[at % CONNECTIONS], wishes[at % len(wishes)]) for at in range(number))
        )
        for one in clients:
            await one.close()
        _judge(report, outcomes, expected, rounds=rounds)
        after = await served.settled()
        report.numbers["queue"] = int(before["requests_waiting_limit"])
        report.require(
            report.counts["answered"] >= min(number, before["requests_waiting_limit"]),
            f"{report.counts['answered']} were answered, fewer than the queue holds",
        )
        report.require(not after["requests_running"] + after["requests_waiting"], "requests are left behind")
        report.require(
            not difference(await _one(client, wishes[0]), expected[id(wishes[0])]),
            "a request behind the burst has another answer",
        )
        await _short_beside_long(report, served, client, int(before["slots"]))
    return report


async def _one(client: AsyncClient, wish: Wish) -> Answers:
    return (await alone(client, [wish]))[0]


async def _ask(client: AsyncClient, wish: Wish) -> _Outcome:
    sent, first, pieces = time.monotonic(), None, []
    try:
        async with aclosing(client.stream(wish.request)) as stream:
            async for piece in stream:
                first = first or time.monotonic() - sent
                pieces.append(piece)
    except ClientError as error:
        return _Outcome(wish, time.monotonic() - sent, first, error=error)
    return _Outcome(wish, time.monotonic() - sent, first, joined(pieces))


def _judge(report: Report, outcomes: list[_Outcome], expected: dict[int, Answers], *, rounds: bool) -> None:
    refused = [outcome for outcome in outcomes if outcome.error]
    for outcome in refused:
        is_right = isinstance(outcome.error, ServerOverloaded) and _REFUSAL.search(str(outcome.error))
        report.require(bool(is_right), f"a refusal says {outcome.error!s:.300}")
        report.counts["refused"] += 1
    answered = [outcome for outcome in outcomes if not outcome.error]
    for outcome in answered:
        report.counts["answered"] += 1
        gap = difference(outcome.answers, expected[id(outcome.wish)])
        report.counts["other text"] += bool(gap)
        gap = shape_fault(outcome.answers, outcome.wish) if rounds else gap
        report.require(not gap, f"{outcome.wish.kind}: {gap}")
    slowest = max((outcome.seconds for outcome in refused), default=0.0)
    report.require(bool(refused), "nothing was refused: the burst is no larger than the queue")
    report.require(slowest <= REFUSED_BAR_S, f"a refusal took {slowest:.2f} s, at most {REFUSED_BAR_S:g} s are allowed")
    report.numbers["slowest_refusal_s"] = round(slowest, 3)
    report.numbers["last_answer_s"] = round(max((outcome.seconds for outcome in answered), default=0.0), 3)


async def _short_beside_long(report: Report, served: Served, client: AsyncClient, slots: int) -> None:
    """Short requests, one after the other, while long ones take all other slots: when their first token comes."""
    short = GenerationRequest(model=served.model, prompt="def main(", max_tokens=2, end_id=NO_END, timeout_s=PATIENCE_S)
    long = replace(short, prompt="word " * 200, max_tokens=1 << 20)
    alone_s = max([await _first_s(client, short) for _ in range(5)])
    stops = asyncio.Event()

    async def keep_busy() -> None:
        while not stops.is_set():
            async with aclosing(client.stream(long)) as pieces:
                async for _ in pieces:
                    if stops.is_set():
                        break

    tasks = [asyncio.create_task(keep_busy()) for _ in range(slots - 1)]
    await asyncio.sleep(0.2)
    beside_s = [await _first_s(client, short) for _ in range(20)]
    stops.set()
    for task in tasks:
        with suppress(ClientError):
            await task
    report.numbers["short_first_token_s"] = {"alone": round(alone_s, 3), "beside_long": round(max(beside_s), 3)}
    report.require(
        max(beside_s) <= alone_s + FIRST_BAR_S,
        f"a short request beside {slots - 1} long ones got its first token after {max(beside_s):.2f} s",
    )


async def _first_s(client: AsyncClient, request: GenerationRequest) -> float:
    sent, first = time.monotonic(), 0.0
    async with aclosing(client.stream(request)) as pieces:
        async for _ in pieces:
            first = first or time.monotonic() - sent
    return first
