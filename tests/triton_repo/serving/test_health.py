"""What answers at a server's port may be another program, once the server has gone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from triton_repo.errors import ServerError
from triton_repo.serving.health import HealthEndpoint, is_live, model_states, server_version

# The first frames of an HTTP/2 server, as gRPC's, a line without an end, an answer that breaks off, and nothing at all.
ANSWERS = [
    b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x05\x00\x3f\xff\xff\r\n", b"x" * 70_000,
    b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", b"",
]  # fmt: skip


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A program at a port that reads a request and answers with these bytes."""

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):  # who asked may have gone
                connection.recv(65_536)
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("answer", ANSWERS, ids=["http2", "endless line", "broken off", "nothing"])
def test_what_is_no_answer_of_triton_is_no_crash(answer: bytes) -> None:
    with answering(answer) as port:
        url = f"http://127.0.0.1:{port}"
        endpoint = HealthEndpoint(http=url, grpc="")
        assert is_live(endpoint, timeout_s=10) is (b" 200 " in answer)  # the status says it, whatever comes behind
        assert server_version(url) is None
        with pytest.raises(ServerError, match="is it a Triton server"):
            model_states(endpoint)
