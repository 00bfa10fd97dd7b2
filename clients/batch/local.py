"""Runs a batch from this process, and what both engines need: the model, the lines that are left, and the answers."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from clients.batch.endpoints import Access
from clients.batch.job import Job, digest
from clients.batch.lines import RawLine, read_lines
from clients.batch.pool import Agreement, Pool, agree
from clients.batch.runner import Rules, Run
from clients.batch.store import Journal, Store
from clients.errors import BatchInputInvalid

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Sending:
    """Where a batch is sent, and how."""

    urls: Sequence[str]
    access: Access
    rules: Rules

    def pool(self) -> Pool:
        return Pool(
            urls=self.urls, access=self.access, concurrency=self.rules.concurrency, patience_s=self.rules.patience_s
        )


def agree_on_models(sending: Sending, named: frozenset[str], *, needs_model: bool) -> Agreement:
    """`pool.agree` with the endpoints of a batch."""

    async def ask() -> Agreement:
        async with sending.pool() as pool:
            return await agree(pool, named, needs_model=needs_model)

    return _run(ask)


def run_local(store: Store, sending: Sending, tell: Callable[[bool], None]) -> None:
    """Answer all lines of a job that are left. `tell` is called after each answer with whether it is a good one. Raises
    ClientError, and OSError if the disk takes no more."""
    index = store.index()
    try:
        if index.num_done < store.job.num_lines:
            answer(store.job, store.folder, read_lines(store.job.path), index.is_done, sending, tell)
    finally:
        index.close()


def answer(
    job: Job,
    folder: Path,
    lines: Iterator[RawLine],
    is_done: Callable[[int], bool],
    sending: Sending,
    tell: Callable[[bool], None],
    first: int = 0,
) -> None:
    """Answer lines in a new file of records in `folder`; `first` is the place of the first line."""
    journal = Journal(folder, first)

    async def send() -> None:
        async with sending.pool() as pool:
            await Run(
                job=job, lines=lines, is_done=is_done, journal=journal, pool=pool, rules=sending.rules, tell=tell
            ).go()

    try:
        _run(send)
    finally:
        journal.close()


def require_same_input(job: Job) -> None:
    """Raise BatchInputInvalid if the input is not the one that the job began with."""
    if digest(job.path) != (job.sha256, job.num_bytes):
        raise BatchInputInvalid(
            f"answering the batch {job.path}: the file changed while it was read; the answers so far are kept: put the "
            "earlier file back, and run the same command again"
        )


def _run(main: Callable[[], Coroutine[None, None, _Result]]) -> _Result:
    """Run a coroutine to its end. SIGTERM ends it as Ctrl-C does: requests in progress are ended on the servers."""
    before, is_main = signal.getsignal(signal.SIGTERM), threading.current_thread() is threading.main_thread()
    if is_main and before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda _number, _frame: signal.raise_signal(signal.SIGINT))
    try:
        return asyncio.run(main())
    finally:
        if is_main and before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)
