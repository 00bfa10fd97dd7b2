"""The socket at which `moeship gateway` listens."""

from __future__ import annotations

import socket

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
