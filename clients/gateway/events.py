"""Responses that notice when their client has gone: server-sent events, and whole answers.

Both run their work as a task of its own and cancel it when the client closes the connection. Starlette's own streaming
cancels a task again and again until it ends, which would interrupt what tells Triton to end the request.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from clients.errors import ClientError
from clients.gateway.errors import ApiError, of_client, of_moeship
from clients.streams import gathered
from export.errors import MoeshipError

if TYPE_CHECKING:
    from clients.gateway.guard import Record

_ABORT_S = 1.0  # for a server to tell that a connection is closed which it was asked to close
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once, not for each event
_encode_text = json.encoder.encode_basestring  # what that one makes of a text
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event. JSON has no line breaks outside its texts, where they are escaped."""
    return b"data: " + _encode(value).encode("utf-8", "replace") + b"\n\n"


class TextEvent:
    """Events that differ in one text alone. All around the text is encoded once: a stream has an event for each token.

    `make(text)` gives the event of a text.
    """

    def __init__(self, make: Callable[[str], bytes]) -> None:
        mark = secrets.token_hex(16)  # no part of an event that a client could have chosen
        self._before, self._behind = make(mark).split(f'"{mark}"'.encode())

    def __call__(self, text: str) -> bytes:
        return self._before + _encode_text(text).encode("utf-8", "replace") + self._behind


def joined(events: Iterable[bytes]) -> Iterator[bytes]:
    """Events that are sent together as one; nothing for none. Where making one raises, those before it come first."""
    return (b"".join(waiting) for waiting in gathered((data,) for data in events if data))


def error_response(error: ApiError) -> Response:
    return Response(error.encoded(), error.status, dict(error.headers()), "application/json")


def as_api_error(error: Exception) -> ApiError:
    """The error that a client sees for one that an endpoint raised. Raises any other again."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientError):
        return of_client(error)
    if isinstance(error, MoeshipError):
        return of_moeship(error)
    raise error


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Raises the errors of the block with the client's own names of fields: `names` has ours to theirs."""
    try:
        yield
    except (ApiError, MoeshipError) as error:
        failure = as_api_error(error)
        ours, dot, rest = (failure.param or "").partition(".")
        if ours not in names:
            raise
        text = str(failure)
        text = f"{names[ours]}{text.removeprefix(ours)}" if text.startswith(ours) else text
        raise ApiError(text, status=failure.status, kind=failure.kind, param=f"{names[ours]}{dot}{rest}",
                       code=failure.code, retry_s=failure.retry_s) from None  # fmt: skip


class _Watched(ABC, Response):
    """A response whose work ends when its client goes."""

    def __init__(self) -> None:
        super().__init__()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._work(scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                scope["moeship"].disconnected = True
                work.cancel()
            with suppress(asyncio.CancelledError):
                await work
        finally:
            gone.cancel()
            if not work.done():  # the server gives up on its connections
                work.cancel()
                await asyncio.wait({work})

    @abstractmethod
    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""


class Whole(_Watched):
    """The JSON that `answer()` gives."""

    def __init__(self, answer: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        super().__init__()
        self._answer = answer

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response: Response = JSONResponse(await self._answer())
        except Exception as error:
            response = error_response(as_api_error(error))
        await response(scope, receive, send)


class Events(_Watched):
    """The events that `events` gives, each item sent at once; it may hold several. An error before the first one is an
    answer with its status; after the first it is an event with the error's object, and the stream ends without `last`.

    While a client does not read, nothing more is taken from `events`. After `unread_s` its answer is ended.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], unread_s: float, last: bytes = DONE) -> None:
        super().__init__()
        self._events, self._last = events, last
        self._patience = _Patience(unread_s)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        record, has_begun = scope["moeship"], False
        with self._patience.begin(record):
            try:
                async with aclosing(self._events) as events:
                    async for data in events:
                        if not has_begun:
                            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                            has_begun = True
                        await self._send(record.send, data)
                    await self._send(send, self._last, more=False)
            except Exception as error:
                failure = as_api_error(error)
                record.error = failure.code or failure.kind
                if not has_begun:
                    await error_response(failure)(scope, receive, send)
                else:
                    await self._send(send, event(failure.body()), more=False)

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        self._patience.wait()
        await send({"type": "http.response.body", "body": data, "more_body": more})
        self._patience.is_read()


class _Patience:
    """Closes the connection of a client that leaves what is sent to it unread for `unread_s` seconds.

    There is one timer for an answer, which looks when the last send began: a timer for each event would cost more than
    making the event.
    """

    def __init__(self, unread_s: float) -> None:
        self._unread_s = unread_s
        self._since: float | None = None  # when the send in progress began
        self._timer: asyncio.TimerHandle

    @contextmanager
    def begin(self, record: Record) -> Iterator[None]:
        """Watch until the end of the block, which a task of its own runs."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._now = loop.time

        def look() -> None:
            since = loop.time() if self._since is None else self._since
            if loop.time() < since + self._unread_s:
                self._timer = loop.call_at(since + self._unread_s, look)
                return
            record.disconnected = True
            record.abort()
            # Once the server has learned that the connection is closed, the response ends as for a client that went.
            self._timer = loop.call_later(_ABORT_S, task.cancel)

        look()
        try:
            yield
        finally:
            self._timer.cancel()

    def wait(self) -> None:
        """A send begins."""
        self._since = self._now()

    def is_read(self) -> None:
        """It has ended."""
        self._since = None


async def _gone(receive: Receive) -> None:
    """Wait until the client closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
