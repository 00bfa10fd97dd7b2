"""The socket at which `moeship gateway` listens."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from clients.gateway.server import Listening, _open


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_answers_first_event_does_not_wait_for_its_head_to_be_acknowledged(host):
    """Nagle's algorithm (RFC 896) holds a small packet back until the one before is acknowledged, which clients delay
    by up to 40 ms."""
    with _open(Listening(host=host)) as listener, socket.create_connection(listener.getsockname()[:2]):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@contextlib.contextmanager
def connected(gateway) -> Iterator[socket.socket]:
    address = urlsplit(gateway.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        yield connection


def answer(connection: socket.socket) -> tuple[int, dict]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


# As Java's HttpClient sends it, and `curl --http2`.
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA\r\n"


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("pieces", ["one", "head and body", "bytes"])
def test_a_request_that_offers_another_protocol_keeps_its_body(gateway, pieces, is_chunked):
    """A server may leave the offer unread (RFC 9110, section 7.8); the connection goes on in HTTP/1.1."""
    body = json.dumps({"model": "phixtral", "prompt": "a"}).encode()
    length = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(body)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" + UPGRADE + length
    sent = head + b"\r\n\r\n" + (b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if is_chunked else body)
    end = sent.index(b"\r\n\r\n") + 4
    parts = {"one": [sent], "head and body": [sent[:end], sent[end:]], "bytes": [bytes([byte]) for byte in sent]}
    with connected(gateway) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            for part in parts[pieces]:
                connection.sendall(part)
            status, found = answer(connection)
            assert status == 200
            assert found["choices"][0]["text"] == "def main"
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert answer(connection)[0] == 200


@pytest.mark.parametrize("extra", [b"", UPGRADE])
def test_no_proxy_is_opened(gateway, extra):
    with connected(gateway) as connection:
        connection.sendall(b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n" + extra + b"\r\n")
        assert answer(connection)[0] == 400
