"""Many clients send requests of every kind; they end some early, and some are wrong. Then connections are torn."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

import grpc

from clients.errors import ClientError, DeadlineExceeded, RequestRejected
from clients.generation import AsyncClient
from soak.served import HELD, Report, Served
from soak.wire import Relay, raw_call
from soak.wishes import (
    FITS,
    Answers,
    Wish,
    alone,
    begins,
    cycled,
    difference,
    draw_wishes,
    invalid_wish,
    joined,
    longer,
    misfit,
    pieces_of,
    shape_fault,
)
from triton_repo.contracts.piece import Piece

EARLY_SHARE, INVALID_SHARE = 0.2, 0.05
GROWTH_BAR = 0.02  # of resident memory from one half of the requests to the next
MOST_MESSAGE_BYTES = 2100
TORN_AT_ONCE = 4
LONG_TOKENS = 200
_CHECK_EVERY = 20  # torn connections


class Mix:
    """Sends a mix of requests from several clients and judges what comes back."""

    def __init__(self, served: Served, different: int, seed: int, *, rounds: bool) -> None:
        self.served, self.report = served, Report()
        self._source = random.Random(f"mix {seed}")
        self._rounds = rounds
        self.wishes = draw_wishes(served.model, different, seed)
        self._expected: dict[int, Answers] = {}

    async def learn(self) -> None:
        """Ask each request alone."""
        async with self.served.client() as client:
            answers = await alone(client, self.wishes)
        self._expected = dict(zip(map(id, self.wishes), answers, strict=True))

    async def send(self, number: int, clients: int) -> None:
        """Send so many requests, `clients` at a time, each client with a connection object of its own."""
        todo = cycled(self.wishes, number, self._source)

        async def run() -> None:
            async with self.served.client() as client:
                for wish in todo:
                    await self._send_one(client, wish)

        await asyncio.gather(*(run() for _ in range(clients)))

    async def _send_one(self, client: AsyncClient, wish: Wish) -> None:
        way, share = self._read_whole, self._source.random()
        if share < INVALID_SHARE:
            way = self._expect_refusal
        elif share < INVALID_SHARE + EARLY_SHARE:
            way = self._source.choice((self._close, self._cancel, self._pass_the_deadline))
        try:
            await way(client, wish)
        except ClientError as error:
            self.report.require(False, f"{way.__name__}, {wish.kind}: {error!s:.300}")
        self.report.counts[way.__name__.strip("_")] += 1

    async def _read_whole(self, client: AsyncClient, wish: Wish) -> None:
        self.judge(wish, await pieces_of(client, wish))

    def judge(self, wish: Wish, found: Answers) -> None:
        gap = difference(found, self._expected[id(wish)])
        self.report.counts["other text"] += bool(gap)
        gap = (shape_fault(found, wish) if self._rounds else gap) or misfit(found, wish)
        self.report.counts["whole guided answers"] += sum(
            one.finish_reason == "stop" for one in found if wish.kind in FITS
        )
        self.report.require(not gap, f"{wish.kind}: {gap}")

    async def _expect_refusal(self, client: AsyncClient, _wish: Wish) -> None:
        wrong = invalid_wish(self.served.model, self._source)
        try:
            await pieces_of(client, wrong)
        except RequestRejected as error:
            self.report.require(len(str(error).encode()) < MOST_MESSAGE_BYTES, f"a long refusal: {error!s:.300}")
        else:
            self.report.require(False, f"a wrong request is answered: {wrong.request!r:.300}")

    async def _close(self, client: AsyncClient, wish: Wish) -> None:
        """Close the stream after some of its pieces."""
        left, pieces = self._source.randint(1, 12), []
        async with aclosing(client.stream(wish.request)) as stream:
            async for piece in stream:
                pieces.append(piece)
                left -= 1
                if not left:
                    break
        self._judge_beginning(wish, pieces)

    async def _cancel(self, client: AsyncClient, wish: Wish) -> None:
        """Cancel the task that reads the stream at a random moment."""
        pieces: list[Piece] = []

        async def read() -> None:
            async with aclosing(client.stream(wish.request)) as stream:
                async for piece in stream:
                    pieces.append(piece)

        task = asyncio.create_task(read())
        await asyncio.wait({task}, timeout=self._source.uniform(0.001, 0.3))
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        self._judge_beginning(wish, pieces)

    async def _pass_the_deadline(self, client: AsyncClient, wish: Wish) -> None:
        pieces: list[Piece] = []
        with suppress(TimeoutError, DeadlineExceeded):
            async with (
                asyncio.timeout(self._source.uniform(0.001, 0.3)),
                aclosing(client.stream(wish.request)) as stream,
            ):
                async for piece in stream:
                    pieces.append(piece)
        self._judge_beginning(wish, pieces)

    def _judge_beginning(self, wish: Wish, pieces: Sequence[Piece]) -> None:
        if not self._rounds:
            is_right = begins(joined(pieces), self._expected[id(wish)])
            self.report.require(is_right, f"{wish.kind}: an answer that was ended early is no beginning of the whole")

    async def tear(self, number: int) -> None:
        """Tear so many connections in the middle of answers. A server that dies of it must be served again."""
        done, restarts = 0, await self._restarts()
        while done < number:
            count = min(_CHECK_EVERY, number - done)
            for start in range(0, count, TORN_AT_ONCE):
                await asyncio.gather(*(self._tear_one() for _ in range(min(TORN_AT_ONCE, count - start))))
            done += count
            await self._check_alive()
            if (now := await self._restarts()) > restarts:
                self.report.counts["restarts"] += int(now - restarts)
                restarts = now
        self.report.counts["torn"] += done

    async def _restarts(self) -> float:
        return (await asyncio.to_thread(self.served.metrics))["server_restarts_total"]

    async def _check_alive(self) -> None:
        """A good request has its answer, if need be once the server is served again."""
        wish = self._source.choice(self.wishes)
        for is_last in (False, True):
            try:
                async with self.served.client() as client:
                    self.judge(wish, await pieces_of(client, wish))
                return
            except ClientError as error:
                self.report.counts["failed while it died"] += 1
                served = await self.served.await_answers()
                self.report.require(served and not is_last, f"not served again: {error!s:.300}")

    async def _tear_one(self) -> None:
        wish = longer(self._source.choice(self.wishes), LONG_TOKENS)
        left, way = self._source.randint(0, 6), self._source.choice(("end", "reset", "channel"))
        with suppress(grpc.RpcError, grpc.aio.UsageError, asyncio.CancelledError, OSError):
            async with Relay(self.served.url) as relay, raw_call(self.served, relay.url, [wish]) as (channel, call):
                with suppress(TimeoutError):
                    async with asyncio.timeout(5.0):
                        for _ in range(left):
                            await call.read()
                if way == "channel":
                    await channel.close()
                await relay.tear(reset=way == "reset")


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much is sent."""

    requests: int
    different: int  # requests that are asked alone, and then many times beside others
    clients: int  # requests at a time
    torn: int  # connections


async def mixed(served: Served, amounts: Amounts, seed: int, *, rounds: bool) -> Report:
    """Send the requests in two equal halves, between which memory is compared, then tear connections."""
    mix = Mix(served, amounts.different, seed, rounds=rounds)
    await mix.learn()
    await mix.send(min(amounts.requests, amounts.different), amounts.clients)  # so that what is allocated once is there
    memory, begun = [], time.monotonic()
    for _ in range(2):
        await mix.send(amounts.requests // 2, amounts.clients)
        held = await served.settled()
        memory.append({**served.resident(), "kv": int(held["kv_held_bytes"])})
        _require_free(mix.report, held, "after half of the requests")
    shares = _shares(held)
    mix.report.numbers.update(
        seconds=round(time.monotonic() - begun, 1), resident_bytes=memory, tls=served.is_encrypted, **shares
    )
    for name, share in shares.items():
        mix.report.require(share > 0, f"{name} is 0: the requests did not use what the server has")
    mix.report.require(mix.report.counts["whole guided answers"] > 0, "no answer to a guide came to its end")
    if "model" in memory[0]:
        growth = growth_of(*memory)
        mix.report.numbers["growth"] = round(growth, 4)
        mix.report.require(growth <= GROWTH_BAR, f"the process that computes grew by {growth:.1%}")
    await mix.tear(amounts.torn)
    _require_free(mix.report, await served.settled(), "after the torn connections")
    return mix.report


def _shares(metrics: Mapping[str, float]) -> dict[str, float]:
    """The part of the prompts' tokens that the cache had, and of the drafted tokens that were chosen, since the
    server's start; nothing for a server without prefix cache or drafts."""
    found = {}
    for name, part, whole in (
        ("prefix_hits", "prefix_reused_tokens_total", "prefix_asked_tokens_total"),
        ("drafts_accepted", "draft_accepted_tokens_total", "draft_tokens_total"),
    ):
        if metrics.get(whole):
            found[name] = round(metrics[part] / metrics[whole], 3)
    return found


def growth_of(first: Mapping[str, int], then: Mapping[str, int]) -> float:
    """How much the process that computes has grown, as a part of what it took. Keys and values are not counted: their
    slots stay in memory as far as any sequence has come in them, up to a budget of their own."""
    sizes = [memory["model"] - memory["kv"] for memory in (first, then)]
    return sizes[1] / sizes[0] - 1


def _require_free(report: Report, held: dict[str, float], when: str) -> None:
    left = {name: held[name] for name in HELD if held[name]}
    report.require(not left, f"{when} the server holds {left}")
