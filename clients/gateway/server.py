"""Runs the gateway's app: uvicorn with bounds on what a connection may do before a request is there.

    serve(app, Listening(host="127.0.0.1", port=8080), on_ready=print)

uvicorn has no limit on how long or how large the head of a request is. Here a head that is late or large ends its
connection, and what is no HTTP is answered in OpenAI's form too.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.gateway.errors import ApiError
from export.errors import MoeshipError
from export.optional import optional_package

with optional_package("uvicorn and httptools", "the gateway", "gateway"):
    import httptools
    import uvicorn
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    from fastapi import FastAPI

HEAD_S = 20.0  # for the head of a request to arrive
MOST_HEAD_BYTES = 64 << 10
MOST_CONNECTIONS = 4096
KEEP_ALIVE_S = 30
_BACKLOG = 1024


class ListenError(MoeshipError):
    """The gateway cannot listen where it was asked to."""


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where and how a gateway listens. `port` 0 is any free one. With a certificate it listens for HTTPS."""

    host: str = "127.0.0.1"
    port: int = 0
    drain_s: float = 30.0  # for answers to end after a request to stop
    certificate: Path | None = None  # PEM files
    private_key: Path | None = None


class Protocol(HttpToolsProtocol):
    """A connection whose requests' heads are bounded in time and size."""

    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - asyncio's
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    data = self._head_without_upgrade() + data[upgrade.args[0] :]
        except httptools.HttpParserError:
            self.send_400_response("")

    def _head_without_upgrade(self) -> bytes:
        """The head that was read, as if its client had not asked for another protocol (RFC 9110, section 7.8): Java's
        client asks for HTTP/2 with the first request of a connection. The parser would take what follows for the other
        protocol, and leave the request without its body."""
        lines = [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        first = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        return b"\r\n".join((first, *lines, b"", b""))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"moeship": {"abort": self.transport.abort}}
        self._begin_head()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._end_head()
        if self.parser.should_upgrade():
            if all(name != b"upgrade" for name, _ in self.headers):
                raise ValueError("a proxy was asked for")  # by CONNECT
            return
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._end_head()
        if self.parser.should_upgrade():
            return
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # An answer that did not wait for the body, such as 404: what is left of the body has as long as a head.
        if self.cycle is not None and self.cycle.response_complete and self.cycle.more_body:
            self._begin_head()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - as the base class calls it
        error = ApiError("found no HTTP request, or one whose head is too large").encoded()
        lines = (
            "HTTP/1.1 400 Bad Request", "content-type: application/json", f"content-length: {len(error)}",
            "connection: close", "", "",
        )  # fmt: skip
        self.transport.write("\r\n".join(lines).encode() + error)
        self.transport.close()

    def _begin_head(self) -> None:
        self._end_head()
        self._head_bytes = 0
        self._timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def _end_head(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _count(self, size: int) -> None:
        """Raise ValueError, which ends the parsing, where a head has become too large."""
        self._head_bytes += size
        if self._head_bytes > MOST_HEAD_BYTES:
            raise ValueError("the head is too large")


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def serve(app: FastAPI, listening: Listening, on_ready: Callable[[str], object]) -> None:
    """Serve until SIGINT or SIGTERM; a second one ends the answers in progress. `on_ready` gets the URL.

    Raises ListenError, and KeyboardInterrupt once a signal has ended it.
    """
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        # Its warnings are of what clients send, which would fill the log of whoever is asked by a hostile one.
        logging.getLogger(name).setLevel(logging.ERROR)
    _allow_files()
    with _open(listening) as listener:
        host, port = listener.getsockname()[:2]
        scheme = "https" if listening.certificate else "http"
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            loop="auto",  # uvloop where it is installed: it takes a tenth less of the processor
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(listening.drain_s)),
            ssl_certfile=listening.certificate,
            ssl_keyfile=listening.private_key,
        )
        _Server(config, lambda: on_ready(url)).run(sockets=[listener])


def _open(listening: Listening) -> socket.socket:
    """A socket that listens; small packets of its connections wait for nothing. Raises ListenError."""
    where = f"listening on {listening.host} port {listening.port}"
    try:
        family = socket.getaddrinfo(listening.host, None, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((listening.host, listening.port), family=family, backlog=_BACKLOG)
        # Connections inherit it. asyncio sets it for sockets of the protocol TCP alone, and such a one has the protocol
        # 0: an answer's first event would wait some 40 ms for the client to acknowledge its head.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError, OverflowError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ListenError(f"{where}: {reason}; give another address or port") from error


def _allow_files() -> None:
    """Allow as many open connections as this user's limits do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST_CONNECTIONS
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
