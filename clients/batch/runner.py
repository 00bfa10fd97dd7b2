"""Sends the lines of a batch and keeps the answers.

There is a fixed number of slots, `concurrency` for each endpoint. A slot takes the next line when the answer to its
last one is kept, so that no more lines are in memory than there are slots, whatever the size of the file. A slot that
waits to ask again sends nothing meanwhile: a server that refuses for load gets fewer requests.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from clients.batch.endpoints import EndpointAway
from clients.batch.job import Job
from clients.batch.lines import Answer, LineInvalid, RawLine, Request, code_of, invalid, message_of, parse, read_request
from clients.batch.lines import write_line as output_line
from clients.batch.pool import Place, Pool
from clients.batch.store import Journal
from clients.errors import BatchStopped

logger = logging.getLogger(__name__)

FIRST_WAIT_S, MOST_WAIT_S = 0.5, 60.0  # before the second attempt, and at most
LEAST_PAUSE_S = 0.25  # of an endpoint that asks to be left alone for no time at all
FLUSH_S = 1.0  # between two flushes of the records to the disk
_LATER = (408, 409, 425, 429)  # statuses below 500 after which the same request may succeed
_NEVER = (501, 505)  # statuses from 500 on after which it will not
# Codes of errors without a status after which it may. An answer that is no JSON is often of a proxy before the server.
_BROKEN = ("timeout", "connection_lost", "unreadable_answer")
_NO_QUOTA = "insufficient_quota"
_LEAST_IN_A_ROW = 20


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a batch is sent."""

    concurrency: int  # requests at a time for each endpoint
    retries: int  # how often a request is sent again
    patience_s: float  # how long all endpoints may be away


@dataclass(kw_only=True)
class Run:
    """One run over lines of a job. `is_done` says of a line's place whether it has an answer already; `tell` is called
    after each answer with whether it is a good one."""

    job: Job
    lines: Iterator[RawLine]
    is_done: Callable[[int], bool]
    journal: Journal
    pool: Pool
    rules: Rules
    tell: Callable[[bool], None] = lambda _is_good: None

    async def go(self) -> None:
        """Answer all lines. Raises ClientError, and OSError if the disk takes no more."""
        self._source = self._requests()
        self._held: list[tuple[RawLine, Request, Answer]] = []  # failures since the last answer that was none
        slots = min(self.job.num_lines, self.rules.concurrency * len(self.pool.places))
        self._most_in_a_row = max(_LEAST_IN_A_ROW, 2 * slots)
        flusher = asyncio.create_task(self._flush())
        tasks = [asyncio.create_task(self._slot()) for _ in range(slots)]
        try:
            await asyncio.gather(*tasks)
            self._keep_held()
        finally:
            for task in (*tasks, flusher):
                task.cancel()
            await asyncio.gather(*tasks, flusher, return_exceptions=True)  # the journal keeps an error of the flusher

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await asyncio.to_thread(self.journal.flush)

    def _requests(self) -> Iterator[tuple[RawLine, Request]]:
        for line in self.lines:
            if self.is_done(line.index):
                continue
            try:
                value = parse(line.data)
            except LineInvalid as reason:
                self._keep(line, None, invalid(line.number, reason))
                continue
            try:
                request = read_request(value, self.job.form, self.job.model, self.job.defaults)
            except LineInvalid as reason:
                custom_id = value.get("custom_id") if isinstance(value, dict) else None
                self._keep(line, custom_id if isinstance(custom_id, str) else None, invalid(line.number, reason))
                continue
            yield line, request

    async def _slot(self) -> None:
        for line, request in self._source:
            answer = await self._ask(request, self.job.answer_id(line.number))
            if may_succeed_later(answer):
                self._hold(line, request, answer)
            else:
                self._keep_held()
                self._keep(line, request.custom_id, answer)

    async def _ask(self, request: Request, request_id: str) -> Answer:
        """The last answer to a request: the first that will not change by asking again, or that of the last attempt."""
        loop = asyncio.get_running_loop()
        attempt, began = 0, loop.time()
        failed: set[Place] = set()
        while True:
            place = await self.pool.take(failed)
            if place in failed:  # so has every other one
                failed.clear()
            try:
                answer = await place.endpoint.ask(request, f"{request_id}_{attempt}")
            except EndpointAway as reason:
                self.pool.lose(place, str(reason))
                continue
            finally:
                self.pool.give(place)
            if code_of(answer.body) == _NO_QUOTA:
                raise BatchStopped(f"asking {place.endpoint.url}: {message_of(answer.body)}")
            if not may_succeed_later(answer):
                return answer
            # A server that says when to come again is only busy, so this is no attempt until patience is over.
            is_told = answer.retry_s is not None and loop.time() - began < self.rules.patience_s
            if not is_told and attempt >= self.rules.retries:
                return answer
            attempt += not is_told
            failed.add(place)
            if answer.retry_s is not None:
                self.pool.pause(place, max(LEAST_PAUSE_S, answer.retry_s))
            else:
                await asyncio.sleep(wait_s(attempt))

    def _hold(self, line: RawLine, request: Request, answer: Answer) -> None:
        """Keep a failure only when the next request succeeds. Where all fail in a row, the servers are at fault, and
        the lines are to be asked again by the next run."""
        self._held.append((line, request, answer))
        if len(self._held) >= self._most_in_a_row:
            raise BatchStopped(
                f"sending the batch: {len(self._held)} requests in a row failed after {self.rules.retries + 1} "
                f"attempts each, the last one, of line {line.number}, with {_told(answer)}"
            )

    def _keep_held(self) -> None:
        for line, request, answer in self._held:
            self._keep(line, request.custom_id, answer)
        self._held.clear()

    def _keep(self, line: RawLine, custom_id: str | None, answer: Answer) -> None:
        data, is_good = output_line(
            answer, self.job.form, answer_id=self.job.answer_id(line.number), number=line.number, custom_id=custom_id
        )
        self.journal.append(line.index, data, is_good)
        self.tell(is_good)


def may_succeed_later(answer: Answer) -> bool:
    """Whether the same request may get a better answer when it is sent again."""
    if answer.error is not None:
        return answer.error[0] in _BROKEN
    status = answer.status or 0
    return status in _LATER or (status >= 500 and status not in _NEVER)


def wait_s(attempt: int) -> float:
    """Seconds before an attempt, the first being 0: doubled each time, and drawn from the upper half so that requests
    that failed together are not sent again together."""
    longest = min(MOST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(attempt - 1, 20))
    return random.uniform(longest / 2, longest)


def _told(answer: Answer) -> str:
    if answer.error is not None:
        return f"{answer.error[0]}: {answer.error[1][:300]}"
    return f"status {answer.status}: {message_of(answer.body)[:300]}"
