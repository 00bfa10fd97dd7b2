"""What `moeship gateway` refuses before it listens."""

from __future__ import annotations

import socket

import pytest

from cli.main import main

TRITON = ["gateway", "--triton", "127.0.0.1:8001"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gateway", "--triton", "http://127.0.0.1:8001"], "found a scheme; give HOST:PORT"),
        ([*TRITON, "--tokenizer", "nowhere"], "--tokenizer nowhere: there is no such folder"),
        ([*TRITON, "--tokenizer", "=/"], "found no model before the ="),
        ([*TRITON, "--repository", "nowhere"], "--repository nowhere: there is no such folder"),
        ([*TRITON, "--deadline", "0"], "--deadline is 0.0, expected a finite number above 0"),
        ([*TRITON, "--api-keys", "nowhere"], "nowhere does not exist"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(capsys, words, message):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([*TRITON, "--port", str(port)]) == 2
    assert f"listening on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err
