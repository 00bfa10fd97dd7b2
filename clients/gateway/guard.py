"""What every request passes before an endpoint sees it: an id, its key, the number in flight, its line in the log.

The guard is ASGI around the app, so that errors of routing pass it too. `read_json` is how endpoints read a body.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clients.gateway.errors import INVALID, OVERLOADED, SERVER, ApiError
from clients.gateway.events import error_response
from clients.gateway.metrics import Metrics
from clients.gateway.request_log import REQUEST_LOG
from clients.gateway.settings import Settings
from export.files.reading import parse_json

logger = logging.getLogger(__name__)

# Paths that ask for no key: probes, the playground's page, which sends its requests with a key that is typed in.
OPEN_PATHS = ("/health", "/")
OPEN_FOLDERS = ("/playground/",)
METRICS = "/metrics"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_CLIENT_CLOSED = 499  # nginx's status for a client that closed its connection; it stands in the log alone


@dataclass(eq=False)
class Record:
    """What is known of one request; endpoints fill it, the log line and the metrics are made of it."""

    id: str
    began: float  # time.perf_counter
    method: str
    path: str
    abort: Callable[[], None]  # closes the connection without sending what is left
    send: Send  # of the server itself; what is left of an answer that has begun needs none of the layers around the app
    key: int | None = None  # the place of its API key
    model: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    first_token_s: float | None = None
    status: int = 0
    error: str | None = None
    disconnected: bool = False
    num_sent: int = field(default=0, repr=False)  # requests to Triton

    def triton_id(self) -> str:
        """An id for a request to Triton: this request's with a random end, since ids must be unique in flight: a
        request that ends another one names it by its id."""
        self.num_sent += 1
        return f"{self.id}-{secrets.token_hex(6)}"

    def saw_token(self) -> None:
        """Note the time of the first token."""
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.began


class Guard:
    """The app behind everything that holds for each request."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        record = Record(
            id=given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}",
            began=time.perf_counter(),
            method=scope["method"],
            path=scope["path"],
            abort=scope.get("extensions", {}).get("moeship", {}).get("abort", _nothing),
            send=send,
        )
        scope["moeship"] = record

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", record.id.encode())]}
            await send(message)

        is_counted = not _is_probe(record.path)
        self._metrics.in_flight += is_counted
        try:
            try:
                self._admit(record, headers)
                await self._app(scope, receive, sent)
            except ApiError as error:
                record.error = error.code or error.kind
                await error_response(error)(scope, receive, sent)
            except ClientDisconnect:
                record.disconnected = True
            except RecursionError:
                # Python's limit counts all calls, so that a body can be read just so and be too deep further on.
                failure = ApiError("the body's JSON is nested too deeply; send less levels")
                record.error = failure.kind
                if not record.status:
                    await error_response(failure)(scope, receive, sent)
                else:
                    record.abort()
            except Exception:
                logger.exception("a request failed by a bug of the gateway")
                record.error = "internal"
                if not record.status:
                    failure = ApiError("the gateway failed; its log has the reason", status=500, kind=SERVER)
                    await error_response(failure)(scope, receive, sent)
                else:
                    record.abort()
        finally:
            self._metrics.in_flight -= is_counted
            self._finish(record)

    def _admit(self, record: Record, headers: dict[bytes, bytes]) -> None:
        """Raise ApiError for a request without a key that is known, and where too many are in flight."""
        if _is_open(record.path):
            return
        if self._settings.keys.digests:
            record.key = self._settings.keys.place(_bearer(headers))
            if record.key is None:
                raise ApiError(
                    "incorrect API key provided, or none: send the header Authorization: Bearer KEY",
                    status=401, kind=INVALID, code="invalid_api_key",
                )  # fmt: skip
        most = self._settings.limits.in_flight
        if self._metrics.in_flight > most and not _is_probe(record.path):
            raise ApiError(
                f"more than {most} requests are in flight at this gateway; send it again later",
                status=429, kind=OVERLOADED, code="rate_limit_exceeded", retry_s=1,
            )  # fmt: skip

    def _finish(self, record: Record) -> None:
        total_s = time.perf_counter() - record.began
        status = _CLIENT_CLOSED if record.disconnected else record.status
        self._metrics.ended(record.path, status, total_s, record.first_token_s, record.prompt_tokens,
                            record.output_tokens)  # fmt: skip
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "id": record.id, "method": record.method, "path": record.path[:200], "status": status, "key": record.key,
            "model": record.model, "prompt_tokens": record.prompt_tokens, "output_tokens": record.output_tokens,
            "first_token_s": _rounded(record.first_token_s), "total_s": _rounded(total_s), "error": record.error,
        }  # fmt: skip
        REQUEST_LOG.add(line)


async def read_json(request: Request, settings: Settings) -> dict[str, Any]:
    """The JSON object in a request's body. Raises ApiError for one that is none, too large, or too slow."""
    limits = settings.limits
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            f"found a body of type {kind[:80] or 'none'!r}, expected JSON; send the header Content-Type: "
            "application/json", status=415,
        )  # fmt: skip
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(f"found a body of the encoding {coding[:80]!r}, expected none; send it as it is", status=415)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > limits.body_bytes:
        raise _too_large(limits.body_bytes)
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_s):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise _too_large(limits.body_bytes)
                parts.append(part)
    except TimeoutError:
        raise ApiError(f"the body did not arrive within {limits.body_s:g} s", status=408) from None
    try:
        body = parse_json(_text(b"".join(parts)), standard=True)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"we could not parse the JSON body of your request: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise ApiError("the body is JSON but no object; send an object with the request's fields")
    return body


def _text(body: bytes) -> str:
    """The text of a body. Raises ValueError."""
    try:
        return body.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"found bytes that are no UTF-8, the first at place {error.start}, expected UTF-8") from None


def _too_large(most: int) -> ApiError:
    return ApiError(f"the body is larger than {most} bytes; send less", status=413, code="request_too_large")


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


def _is_probe(path: str) -> bool:
    """Whether a request asks for nothing of a model. Such requests are not counted as in flight, and are answered
    where too many others are."""
    return path == METRICS or _is_open(path)


def _bearer(headers: dict[bytes, bytes]) -> str:
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _nothing() -> None:
    """The connection is closed by the server, where it gives no other way."""
