"""Clients that ask and never read."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from soak.served import HELD, Report, Served
from soak.wire import Relay, raw_call
from soak.wishes import Wish, alone, difference, draw_wishes, longer, shape_fault

CONNECTIONS = 4


async def unread(served: Served, number: int, seed: int, *, rounds: bool) -> Report:
    """Have `number` answers of the longest kind written to connections that are not read, ask beside them, and see
    what the server keeps: while the connections last, and once they are torn."""
    report, source = Report(), random.Random(f"unread {seed}")
    wishes = draw_wishes(served.model, 40, seed)
    good = [wish for wish in wishes if wish.kind in ("greedy", "penalties")]
    async with served.client() as client:
        expected = await alone(client, good)
        before = await served.settled()
        memory = {"before": served.resident()}
        longest = [_longest(wishes, source) for _ in range(min(number, int(before["requests_waiting_limit"])))]
        async with _never_reading(served, longest):
            for wish, found, right in zip(good, await alone(client, good), expected, strict=True):
                gap = shape_fault(found, wish) if rounds else difference(found, right)
                report.require(not gap, f"beside those that do not read, {wish.kind}: {gap}")
            held = await served.settled()
            memory["unread"] = served.resident()
        left = {name: held[name] for name in HELD if held[name]}
        report.require(not left, f"answers that nobody reads hold {left}")
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


@contextlib.asynccontextmanager
async def _never_reading(served: Served, wishes: Sequence[Wish]) -> AsyncIterator[None]:
    """Connections on which these are asked and nothing is read. They are torn when the block ends."""
    async with contextlib.AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(Relay(served.url)) for _ in range(CONNECTIONS)]
        for number, relay in enumerate(relays):
            await stack.enter_async_context(raw_call(served, relay.url, wishes[number::CONNECTIONS]))
            relay.stop_reading()
        yield
        for relay in relays:
            await relay.tear(reset=False)


def _longest(wishes: Sequence[Wish], source: random.Random) -> Wish:
    """A stream that takes up the whole context, token by token."""
    wish = longer(source.choice([wish for wish in wishes if wish.kind == "greedy"]), 1 << 20)
    return replace(wish, request=replace(wish.request, prompt="def "))
