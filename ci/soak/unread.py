"""Clients that ask and never read."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import grpc

from clients.generation import AsyncClient
from clients.wire import build_request
from soak.served import HELD, Report, Served
from soak.wire import Relay, raw_call
from soak.wishes import Wish, alone, difference, draw_wishes, longer, shape_fault

CONNECTIONS = 4


async def unread(served: Served, number: int, seed: int, *, rounds: bool) -> Report:
    """Have `number` answers of the longest kind written to connections that are not read, ask beside them, and see
    what the server keeps: while the connections last, and once they are torn."""
    report, source = Report(), random.Random(f"unread {seed}")
    wishes = draw_wishes(served.model, 40, seed)
    async with AsyncClient(served.url) as client:
        good = [wish for wish in wishes if wish.kind in ("greedy", "penalties")]
        expected = await alone(client, good)
        before = await served.settled()
        memory = {"before": served.resident()}
        relays = [Relay(served.url) for _ in range(CONNECTIONS)]
        calls = [raw_call((await relay.__aenter__()).url, []) for relay in relays]
        opened = [(await call.__aenter__())[1] for call in calls]
        beside = asyncio.create_task(alone(client, good))
        for count in range(number):
            await opened[count % CONNECTIONS].write(build_request(_longest(wishes, source).request, stream=True))
        for relay in relays:
            relay.stop_reading()
        for wish, found, right in zip(good, await beside, expected, strict=True):
            gap = shape_fault(found, wish) if rounds else difference(found, right)
            report.require(not gap, f"beside those that do not read, {wish.kind}: {gap}")
        held = await served.settled()
        memory["unread"] = served.resident()
        left = {name: held[name] for name in HELD if held[name]}
        report.require(not left, f"answers that nobody reads hold {left}")
        for relay, call in zip(relays, calls, strict=True):
            await relay.tear(reset=False)
            with suppress(grpc.RpcError, grpc.aio.UsageError, asyncio.CancelledError):
                await call.__aexit__(None, None, None)
        report.require(await served.await_answers(), "not served once the connections are torn")
        after = await served.settled()
        memory["torn"] = served.resident()
    tokens = held["output_tokens_total"] - before["output_tokens_total"]
    report.numbers.update(tokens=int(tokens), resident_bytes=memory)
    if memory["before"] and tokens:
        kept = memory["unread"]["server"] - memory["before"]["server"]
        report.numbers["bytes_a_token_unread"] = round(kept / tokens)
    report.counts["restarts"] += int(after["server_restarts_total"] - before["server_restarts_total"])
    return report


def _longest(wishes: Sequence[Wish], source: random.Random) -> Wish:
    """A stream that takes up the whole context, token by token."""
    wish = longer(source.choice([wish for wish in wishes if wish.kind == "greedy"]), 1 << 20)
    return replace(wish, request=replace(wish.request, prompt="def "))
