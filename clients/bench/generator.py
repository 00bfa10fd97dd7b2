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

from clients.bench.load import Load
from clients.bench.prompts import Source
from clients.bench.records import Record, Run, Target
from clients.errors import ClientError

# A stream whose request failed waits before it sends the next one, or a refusing server would get thousands a second.
PAUSE_AFTER_ERROR_S = 0.1
AHEAD = 256  # requests that are made before the start, where their number is not known


async def apply(target: Target, load: Load, works: Source, first: int = 0) -> Run:
    """Send the requests from number `first` on, and wait until all have ended.

    With a duration the window ends on time, and requests in flight are ended then. With a number of requests the window
    ends with the last answer.
    """
    records: list[Record] = []
    numbers = itertools.islice(itertools.count(first), load.requests)
    works.prepare(first, load.requests or AHEAD)
    clock = asyncio.get_running_loop().time
    started, cpu = clock(), time.process_time()
    run = _Requests(target, works, records, lambda: clock() - started, stops_at_error=load.stops_at_error)
    if load.streams is not None:
        tasks = [asyncio.create_task(run.stream(stream, numbers)) for stream in range(load.streams)]
    else:
        tasks = [asyncio.create_task(run.open_loop(load.arrivals_s(), numbers))]
    try:
        await asyncio.wait(tasks, timeout=load.duration_s)
        window, busy = clock() - started, time.process_time() - cpu
    finally:
        for task in (*tasks, *run.sent):
            task.cancel()
        ended = await asyncio.gather(*tasks, *run.sent, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):  # a fault of the generator's own: errors of requests are in the records
            raise error
    window = window if load.duration_s is None else load.duration_s
    return Run(
        records=sorted(records, key=lambda record: record.index), window_s=window, cpu_s=busy, counting=target.counting
    )


class _Requests:
    """Sends the requests of one load."""

    def __init__(
        self, target: Target, works: Source, records: list[Record], now: Callable[[], float], *, stops_at_error: bool
    ) -> None:
        self.sent: list[asyncio.Task[Record]] = []  # requests of an open loop
        self._target, self._works, self._records, self._now = target, works, records, now
        self._stops_at_error, self._is_over = stops_at_error, False

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
        left = work.early_after
        try:
            async with aclosing(self._target.answer(work)) as arrivals:
                async for arrival in arrivals:
                    if arrival.tokens:
                        record.arrivals.append((self._now(), arrival.tokens))
                    record.num_input_tokens = arrival.num_input_tokens or record.num_input_tokens
                    record.num_output_tokens = arrival.num_output_tokens or record.num_output_tokens
                    record.finish_reason = arrival.finish_reason or record.finish_reason
                    if left is not None and record.num_tokens >= left and not record.finish_reason:
                        record.ended_early = True
                        break
        except ClientError as error:
            record.error, record.status, record.message = type(error).__name__, error.status, str(error)
            self._is_over = self._stops_at_error
        except asyncio.CancelledError:
            record.cut = True
            raise
        finally:
            record.end_s = self._now()
        return record
