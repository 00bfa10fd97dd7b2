"""How `moeship generate` ends before its answer does: by Ctrl-C, a dying server, a reader that leaves, a full disk."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest
from fake_triton import at_the_end_of, empty_final, piece

from cli.main import main

# Long enough for a busy machine; a test that waits so long has failed.
PATIENCE_S = 60


class Breaking:
    """Hands everything on between one connection and a server, until it breaks that off and takes no other."""

    def __init__(self, url: str) -> None:
        host, _, port = url.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        self._listener.close()
        self._sockets = [client, socket.create_connection(self._target)]
        for pair in (self._sockets, self._sockets[::-1]):
            self._threads.append(threading.Thread(target=self._hand_on, args=pair))
            self._threads[-1].start()

    def _hand_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    def break_off(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.break_off()
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()


def test_a_server_that_dies_in_the_middle_of_a_stream_is_not_asked_about_its_port(server, capsys):
    between = Breaking(server.url)

    def answer(request, context):
        yield piece("def ", (5,), num_output=1)
        between.break_off()
        server.cancelled.wait(PATIENCE_S)

    server.answer = answer
    try:
        assert main(["generate", "--url", between.url, "--model", "phixtral", "x"]) == 1
    finally:
        server.cancelled.set()
        between.close()
    captured = capsys.readouterr()
    assert captured.out in ("def \n", "")
    assert captured.err.startswith(f"ConnectionLost: generating with phixtral at {between.url}: UNAVAILABLE: ")
    assert "check whether the server ended" in captured.err
    assert "port" not in captured.err


@contextmanager
def started(server, *options: str, stdout: int | IO[bytes] = subprocess.PIPE) -> Iterator[subprocess.Popen]:
    """The command in a process of its own, which does not outlive the block."""
    words = [sys.executable, "-m", "cli.main", "generate", "--url", server.url, *options, "x"]
    with subprocess.Popen(words, stdout=stdout, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_cancels_on_the_server_keeps_the_text_and_exits_130(server):
    server.answer = server.endless
    with started(server) as process:
        assert process.stdout.read(4) == b"def "
        assert not server.cancelled.is_set()
        process.send_signal(signal.SIGINT)
        assert server.cancelled.wait(PATIENCE_S)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (130, b"\n", b"")


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_ctrl_c_asks_a_server_to_stop_that_may_not_survive_a_cancelled_call(server, options):
    server.version, server.answer = "2.51.0", server.stoppable
    with started(server, *options) as process:
        assert server.started.wait(PATIENCE_S)
        assert options or process.stdout.read(4) == b"def "
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (130, b"")
    assert json.loads(out)["finish_reason"] == "cancelled" if options else out == b"\n"
    assert server.stops == [request.id for request in server.requests]
    assert not server.cancelled.is_set()


def test_ctrl_c_with_json_still_prints_the_object(server):
    server.answer = server.endless
    with started(server, "--json") as process:
        assert server.started.wait(PATIENCE_S)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (130, b"")
    assert json.loads(out)["finish_reason"] == "cancelled"


def test_a_reader_that_goes_away_cancels_the_request_without_a_traceback(server):
    def answer(request, context):
        at_the_end_of(context, server.cancelled.set)
        while not server.cancelled.is_set():
            yield piece("x" * 100, (1,))
        yield empty_final()

    server.answer = answer
    with started(server) as process:
        process.stdout.read(100)
        process.stdout.close()
        assert process.wait(PATIENCE_S) == 141
        assert process.stderr.read() == b""
    assert server.cancelled.wait(PATIENCE_S)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_full_disk_cancels_the_request_and_is_said_in_one_line(server, options):
    if not options:
        server.answer = server.endless
    with Path("/dev/full").open("wb") as full, started(server, *options, stdout=full) as process:
        _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (
        2,
        b"OSError: No space left on device; remove the cause, or name another path\n",
    )
    assert options or server.cancelled.wait(PATIENCE_S)
