"""Responses that notice when their client has gone: server-sent events, and whole answers.

Both run their work as a task of its own and cancel it when the client closes the connection. Starlette's own streaming
cancels a task again and again until it ends, which would interrupt what tells Triton to end the request.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from clients.errors import ClientError
from clients.gateway.errors import ApiError, of_client, of_moeship
from clients.streams import gathered
from export.errors import MoeshipError

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once, not for each event
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event. JSON has no line breaks outside its texts, where they are escaped."""
    return b"data: " + _encode(value).encode("utf-8", "replace") + b"\n\n"


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
        self._events, self._unread_s, self._last = events, unread_s, last

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    if not has_begun:
                        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                        has_begun = True
                    await self._send(send, data)
                await self._send(send, self._last, more=False)
        except _Unread:
            scope["moeship"].disconnected = True
            scope["moeship"].abort()
            await asyncio.sleep(0)  # uvicorn learns of it, and does not log that the answer is incomplete
        except Exception as error:
            failure = as_api_error(error)
            scope["moeship"].error = failure.code or failure.kind
            if not has_begun:
                await error_response(failure)(scope, receive, send)
            else:
                await self._send(send, event(failure.body()), more=False)

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self._unread_s):
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise _Unread from None


class _Unread(Exception):  # noqa: N818 - nobody is told: the connection is closed
    """A client did not read what was sent to it."""


async def _gone(receive: Receive) -> None:
    """Wait until the client closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
