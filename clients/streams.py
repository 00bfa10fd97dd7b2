"""Reads the ModelStreamInfer call of one request to its end, in a thread or task of its own.

The reader of the pieces may leave at any moment: by Ctrl-C, a deadline, a cancelled task or a closed generator. Inside
gRPC that would cancel the call, and a cancelled call may crash Triton before 2.57
(triton-inference-server/server#8078): 2.51 crashed within 350 to 1,950 of them. On such a server a request is ended by
another request that asks for that (`wire.build_stop`), and the call ends as it does after a complete answer.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import grpc
    from tritonclient.grpc import service_pb2 as pb

_Item = TypeVar("_Item")

# Seconds that a server has to end a request after it was asked to. Then the call is cancelled after all. A model
# notices after at most 128 tokens of a prompt, which take 5 s at phixtral-4x2_8's size on two cores.
STOP_PATIENCE_S = 10.0
# The request to stop is repeated, since it may reach the model before the request that it names.
STOP_INTERVAL_S = 1.0
# Responses that an AsyncStream holds for a reader that is slower than the server. Then it reads no more of the call,
# and gRPC's flow control holds the server's responses back.
MOST_UNREAD = 64


def gathered(parts: Iterable[Sequence[_Item]]) -> Iterator[list[_Item]]:
    """The items of all parts as one list; none for no items. Where a part raises, the items before it come first."""
    items: list[_Item] = []
    try:
        for part in parts:
            items.extend(part)
    except Exception:
        if items:
            yield items
        raise
    if items:
        yield items


class Stream:
    """A call of a `grpc` channel. `is_abandoned`: the client was closed, so no more pieces are given out."""

    def __init__(self, call: Any) -> None:  # noqa: ANN401 - grpc's call is of a private class
        self.is_abandoned = False
        self._call = call
        self._read: queue.SimpleQueue[pb.ModelStreamInferResponse | Exception | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        threading.Thread(target=self._pump, name="moeship-stream", daemon=True).start()

    @property
    def has_ended(self) -> bool:
        """Whether the server has ended the call."""
        return self._ended.is_set()

    def responses(self, timeout_s: float | None) -> Iterator[pb.ModelStreamInferResponse]:
        """The responses as they come. Raises TimeoutError `timeout_s` seconds from now, and grpc's RpcError."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                item = self._read.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError from None
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item

    def end(self, ask_to_stop: Callable[[float], None] | None) -> None:
        """End the call: by `ask_to_stop(timeout_s)`, and if that does not end it in time, by cancelling it."""
        try:
            due = time.monotonic() + STOP_PATIENCE_S
            while ask_to_stop is not None and not self._ended.is_set() and (left := due - time.monotonic()) > 0:
                ask_to_stop(left)
                self._ended.wait(min(left, STOP_INTERVAL_S))
        finally:
            self._call.cancel()  # has no effect on a call that has ended

    def _pump(self) -> None:
        last: Exception | None = None
        try:
            for response in self._call:
                self._read.put(response)
        except Exception as error:  # raised by gRPC: the reader gets it
            last = error
        self._ended.set()
        self._read.put(last)


class AsyncStream:
    """A call of a `grpc.aio` channel, in the running loop."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self.is_abandoned = False
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._unread: list[pb.ModelStreamInferResponse] = []
        self._num_taken = 0  # responses that the reader was given and has not come back from
        self._last: BaseException | None = None  # why the call ended, where it failed
        self._has_reader = True
        self._ended = asyncio.Event()
        # One task waits for responses and one for room, so that a future each does, and costs less than a queue.
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._task = asyncio.create_task(self._pump())

    @property
    def has_ended(self) -> bool:
        """Whether the server has ended the call."""
        return self._ended.is_set()

    async def responses(self, timeout_s: float | None) -> AsyncIterator[list[pb.ModelStreamInferResponse]]:
        """The responses as they come, each time all that wait. Raises TimeoutError `timeout_s` seconds from now, and
        grpc's RpcError."""
        is_late = False

        def pass_deadline() -> None:
            nonlocal is_late
            is_late = True
            _wake(self._reader)

        # One timer for the whole call: one for each response would cost as much as reading it.
        timer = None if timeout_s is None else self._loop.call_later(timeout_s, pass_deadline)
        try:
            while True:
                if not (self._unread or self._ended.is_set() or is_late):
                    self._reader = self._loop.create_future()
                    await self._reader
                if is_late:
                    raise TimeoutError
                if self._unread:
                    waiting, self._unread = self._unread, []
                    self._num_taken = len(waiting)
                    yield waiting
                    self._num_taken = 0  # the reader has come back for more
                    _wake(self._room)
                elif self._last is not None:
                    raise self._last
                elif self._ended.is_set():
                    return
        finally:
            if timer is not None:
                timer.cancel()

    async def end(self, ask_to_stop: Callable[[float], Awaitable[None]] | None) -> None:
        """End the call: by `ask_to_stop(timeout_s)`, and if that does not end it in time, by cancelling it."""
        self._leave()
        try:
            due = time.monotonic() + STOP_PATIENCE_S
            while ask_to_stop is not None and not self._ended.is_set() and (left := due - time.monotonic()) > 0:
                await ask_to_stop(left)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._ended.wait(), min(left, STOP_INTERVAL_S))
        finally:
            self._call.cancel()  # has no effect on a call that has ended

    def _leave(self) -> None:
        """From now on drop what comes, so that the call can be read to its end."""
        self._has_reader = False
        _wake(self._room)

    async def _pump(self) -> None:
        try:
            async for response in self._call:
                while self._has_reader and len(self._unread) + self._num_taken >= MOST_UNREAD:
                    self._room = self._loop.create_future()
                    await self._room
                if self._has_reader:
                    self._unread.append(response)
                    _wake(self._reader)
        except (Exception, asyncio.CancelledError) as error:  # the reader gets it
            # grpc.aio raises CancelledError for a call that was cancelled here, as if the reader's task had been.
            self._last = None if self.is_abandoned else error
        self._ended.set()
        _wake(self._reader)


def _wake(waiting: asyncio.Future[None] | None) -> None:
    """Let the task go on that waits for a future, if one does."""
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
