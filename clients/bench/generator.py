"""Applies a load to a server and records what arrives when.

Coordinated omission: in an open loop a request's latency counts from when it arrived by the load's plan, even where the
generator sent it later, so that a server that stalls does not hide its stall by receiving fewer requests. In a closed
loop a slow server does receive fewer requests; the report says which loop it was.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any

from clients.bench.load import Load, Work
from clients.bench.prompts import Source
from clients.bench.records import Record, Run, Target
from clients.errors import ClientError, ConnectionFailed, ConnectionLost, DeadlineExceeded

# A stream whose request failed waits before it sends the next one, or a refusing server would get thousands a second.
PAUSE_AFTER_ERROR_S = 0.1
AHEAD = 256  # requests that are made before the start, where their number is not known
MOST_AHEAD = 4096  # where it is known: making one takes up to a millisecond, and the others are made when they are sent
_NOT_CONNECTED = (ConnectionFailed.__name__, ConnectionLost.__name__)
INTERRUPTED, GONE = "interrupted", "the server was gone"


async def apply(
    target: Target,
    load: Load,
    works: Source,
    first: int = 0,
    *,
    stop: asyncio.Event | None = None,
    patience_s: float | None = None,
    keep: Callable[[Record], None] | None = None,
) -> Run:
    """Send the requests from number `first` on, and wait until all have ended.

    With a duration the window ends on time, and requests in flight are ended then. With a number of requests the window
    ends with the last answer. `keep` is called with each request that has ended.

    The load ends early when `stop` is set, and when connections have failed for `patience_s` seconds while nothing
    arrived. Then the window ends when it was stopped, or with the first of those failures.
    """
    records: list[Record] = []
    numbers = itertools.islice(itertools.count(first), load.requests)
    works.prepare(first, min(load.requests or AHEAD, MOST_AHEAD))
    clock = asyncio.get_running_loop().time
    started, cpu = clock(), time.process_time()
    run = _Requests(
        target, works, records, lambda: clock() - started, stops_at_error=load.stops_at_error, patience_s=patience_s,
        keep=keep,
    )  # fmt: skip
    if load.streams is not None:
        tasks = [asyncio.create_task(run.stream(stream, numbers)) for stream in range(load.streams)]
    else:
        tasks = [asyncio.create_task(run.open_loop(load.arrivals_s(), numbers))]
    whole = asyncio.gather(*tasks, return_exceptions=True)
    halts: list[asyncio.Task[Any]] = [
        asyncio.create_task(event.wait()) for event in (run.gone, stop) if event is not None
    ]
    try:
        every: list[asyncio.Future[Any]] = [whole, *halts]
        await asyncio.wait(every, timeout=load.duration_s, return_when=asyncio.FIRST_COMPLETED)
        window, busy, was_whole = clock() - started, time.process_time() - cpu, whole.done()
    finally:
        for task in (*tasks, *run.sent, *halts):
            task.cancel()
        ended = await asyncio.gather(*tasks, *run.sent, *halts, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):  # a fault of the generator's own: errors of requests are in the records
            raise error
    early = None
    if not was_whole and run.gone.is_set():
        early, window = GONE, run.gone_since_s or window
    elif not was_whole and stop is not None and stop.is_set():
        early = INTERRUPTED
    elif not was_whole and load.duration_s is not None:  # a trace may end before its duration
        window = load.duration_s
    records.sort(key=lambda record: record.index)
    return Run(records=records, window_s=window, cpu_s=busy, counting=target.counting, ended=early)


class _Requests:
    """Sends the requests of one load."""

    def __init__(
        self,
        target: Target,
        works: Source,
        records: list[Record],
        now: Callable[[], float],
        *,
        stops_at_error: bool,
        patience_s: float | None,
        keep: Callable[[Record], None] | None,
    ) -> None:
        self.sent: list[asyncio.Task[Record]] = []  # requests of an open loop
        self.gone = asyncio.Event()
        self.gone_since_s: float | None = None  # the first of the failed connections after which nothing arrived
        self._target, self._works, self._records, self._now = target, works, records, now
        self._stops_at_error, self._is_over = stops_at_error, False
        self._patience_s, self._keep = patience_s, keep

    async def stream(self, stream: int, numbers: Iterator[int]) -> None:
        """One stream of a closed loop."""
        for index in numbers:
            if self._is_over:
                return
            record = await self._request(index, stream, None)
            if record.error:
                await asyncio.sleep(PAUSE_AFTER_ERROR_S)

    async def open_loop(self, arrivals_s: Iterator[float], numbers: Iterator[int]) -> None:
        """All requests of an open loop, each when it is due."""
        for index, due_s in zip(numbers, arrivals_s, strict=False):
            await asyncio.sleep(max(0.0, due_s - self._now()))
            if self._is_over:
                break
            self.sent.append(asyncio.create_task(self._request(index, index, due_s)))
        await asyncio.gather(*self.sent)

    async def _request(self, index: int, stream: int, due_s: float | None) -> Record:
        work = self._works.work(index)
        sent_s = self._now()
        record = Record(
            index=index, stream=stream, due_s=sent_s if due_s is None else due_s, sent_s=sent_s,
            max_tokens=work.max_tokens,
        )  # fmt: skip
        self._records.append(record)
        try:
            await self._read(work, record)
        except ClientError as error:
            record.error, record.status, record.message = type(error).__name__, error.status, str(error)
            self._is_over = self._stops_at_error
        except asyncio.CancelledError:
            record.cut = True
            raise
        finally:
            record.end_s = self._now()
            self._watch(record)
            record.settle()
            if self._keep is not None:
                self._keep(record)
        return record

    async def _read(self, work: Work, record: Record) -> None:
        """Send a request and record what arrives. Raises ClientError."""
        left = work.early_after
        async with aclosing(self._target.answer(work)) as arrivals:
            async for arrival in arrivals:
                self.gone_since_s = None
                if arrival.tokens:
                    record.arrivals.append((self._now(), arrival.tokens))
                    record.guessed = record.guessed or arrival.guessed
                record.num_input_tokens = arrival.num_input_tokens or record.num_input_tokens
                record.num_output_tokens = arrival.num_output_tokens or record.num_output_tokens
                record.finish_reason = arrival.finish_reason or record.finish_reason
                if left is not None and record.num_tokens >= left and not record.finish_reason:
                    record.ended_early = True
                    break

    def _watch(self, record: Record) -> None:
        """End the load where connections have failed for too long and nothing arrived meanwhile."""
        if self.gone.is_set():
            return
        if record.error not in _NOT_CONNECTED:
            if record.error not in (None, DeadlineExceeded.__name__):  # the server has refused it, so it is there
                self.gone_since_s = None
            return
        now = self._now()
        if self.gone_since_s is None:
            self.gone_since_s = now
        if self._patience_s is not None and now - self.gone_since_s >= self._patience_s:
            self.gone.set()
