"""What a contender is asked in its turn. Each scenario takes a target of the load generator and an order, a JSON
object, and gives a JSON object.

- `load`: `streams` streams send `requests` requests in all, one after another each.
- `first`: `requests` short requests one after another; gives the seconds to each one's first token.
- `long`: a long prompt alone; then `streams` streams run, and the long prompt arrives among them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from clients.bench.generator import apply
from clients.bench.load import Lengths, Load, Sampling
from clients.bench.prompts import Works, token_counter
from clients.bench.records import Run, Target
from clients.bench.report import summarise

Order = Mapping[str, Any]
# Random tokens, because greedy ones of random weights soon repeat, and then the experts repeat too.
SAMPLING = Sampling(temperature=1.0, top_k=50, ignore_end=True)
# The long prompt arrives when each stream has so many tokens, or has ended, or after so long. A server that answers one
# request at a time never has all streams running.
TOKENS_BEFORE_LONG = 4
WAIT_S = 20.0
LONG_ANSWER_TOKENS = 4

counter = lru_cache(maxsize=1)(token_counter)


def works_of(order: Order, prompt_tokens: int, max_tokens: int) -> Works:
    """The requests of an order, of exact lengths."""
    return Works(
        prompt_tokens=Lengths(low=prompt_tokens, high=prompt_tokens),
        max_tokens=Lengths(low=max_tokens, high=max_tokens),
        counter=counter(Path(order["tokenizer"])),
        sampling=SAMPLING,
        seed=order["seed"],
    )


async def load(target: Target, order: Order) -> dict[str, Any]:
    """The report of the load generator."""
    works = works_of(order, order["prompt_tokens"], order["max_tokens"])
    applied = Load(streams=order["streams"], requests=order["requests"], seed=order["seed"])
    run = await apply(target, applied, works)
    _require_answers(run)
    return summarise(run, applied, works, cores=len(os.sched_getaffinity(0)))


async def first(target: Target, order: Order) -> dict[str, Any]:
    """Seconds to the first token of short requests. The first request does not count."""
    works = works_of(order, order["short_prompt_tokens"], 1)
    run = await apply(target, Load(streams=1, requests=order["requests"] + 1), works)
    _require_answers(run)
    return {"first_token_s": [record.first_token_s for record in run.records[1:]]}


async def long(target: Target, order: Order) -> dict[str, Any]:
    """What the streams and the long prompt see of each other. Seconds; `longest_pause_s` is that of any stream between
    the arrival of the long prompt and its first token, `steps_s` the times for a token of streams before it arrived.

    A message may bring several tokens, as a server keeps back tokens that end within a character. Then all of them but
    one count as the shortest of these steps, and the rest of the time as the pause."""
    longs = works_of(order, order["long_prompt_tokens"], LONG_ANSWER_TOKENS)
    alone = await apply(target, Load(streams=1, requests=1), longs)
    _require_answers(alone)
    streams = order["streams"]
    works = works_of(order, order["prompt_tokens"], order["long_max_tokens"])
    now = asyncio.get_running_loop().time
    answers = [_Answer(target, works, number, now) for number in range(streams)]
    tasks = [asyncio.create_task(answer.read()) for answer in answers]
    deadline = now() + WAIT_S
    while now() < deadline and not all(a.has_ended or a.num_tokens >= TOKENS_BEFORE_LONG for a in answers):
        await asyncio.sleep(0.005)
    running = sum(bool(answer.arrivals) and not answer.has_ended for answer in answers)
    arrived = now()
    late = await apply(target, Load(streams=1, requests=1), longs, first=1)
    _require_answers(late)
    first_s = late.records[0].first_token_s or 0.0
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await task
    steps_s = [
        (after - before) / tokens
        for answer in answers
        for (before, _), (after, tokens) in pairwise(answer.arrivals)
        if after <= arrived
    ]
    step_s = min(steps_s, default=0.0)
    pauses = [answer.longest_pause(arrived, arrived + first_s, step_s) for answer in answers]
    return {
        "alone_s": alone.records[0].first_token_s,
        "first_s": first_s,
        "streams_running_when_it_arrived": running,
        "longest_pause_s": max(pauses, default=0.0),
        "steps_s": steps_s,
    }


class _Answer:
    """Reads one answer and keeps when messages with tokens came, and with how many."""

    def __init__(self, target: Target, works: Works, number: int, now: Callable[[], float]) -> None:
        self.arrivals: list[tuple[float, int]] = []
        self.has_ended = False
        self._target, self._work, self._now = target, works.work(number), now

    @property
    def num_tokens(self) -> int:
        return sum(tokens for _, tokens in self.arrivals)

    async def read(self) -> None:
        answer = self._target.answer(self._work)
        try:
            async for arrival in answer:
                if arrival.tokens:
                    self.arrivals.append((self._now(), arrival.tokens))
        finally:
            self.has_ended = True
            await answer.aclose()

    def longest_pause(self, begin: float, end: float, step_s: float) -> float:
        """The longest time without a token between two moments, of a stream that had begun before and had not ended.
        All tokens of a message but one take `step_s`."""
        times = [time for time, _ in self.arrivals]
        if not times or times[0] > begin or times[-1] < begin:
            return 0.0
        pauses = [
            after - before - (tokens - 1) * step_s
            for (before, _), (after, tokens) in pairwise(self.arrivals)
            if after > begin and before < end
        ]
        return max([*pauses, *([end - times[-1]] if times[-1] < end and not self.has_ended else [])], default=0.0)


SCENARIOS: Mapping[str, Callable[[Target, Order], Awaitable[dict[str, Any]]]] = {
    "load": load, "first": first, "long": long,
}  # fmt: skip


def _require_answers(run: Run) -> None:
    """Raise an error if a request failed, or an answer does not have the number of tokens that was asked for: figures
    of different work cannot be compared."""
    for record in run.records:
        if record.error or not record.is_answered or record.num_tokens != record.max_tokens:
            raise AssertionError(
                f"request {record.index}: found {record.num_tokens} tokens, finish reason {record.finish_reason}, "
                f"error {record.message}, expected {record.max_tokens} tokens"
            )
