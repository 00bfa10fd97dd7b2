"""API keys of servers over HTTP: one pair of flags for every command that sends a key."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from batch_standin import batch_server, write_batch

from cli import batch, bench_flags
from cli.main import main

KEY = "of-the-test-0123456789"
URL = "http://127.0.0.1:1"
COMMANDS = {"batch": ["in", "out", "--url"], "bench": ["--url"], "top": []}  # the words before an address


@contextmanager
def answering(status: int, headers: dict[str, str], body: bytes = b"") -> Iterator[tuple[str, list[str | None]]]:
    """A server's address, and the keys that it was asked with."""
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            keys.append(self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/metrics", keys
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def key_file(tmp_path):
    """A file as the gateway's --api-keys takes it."""
    path = tmp_path / "keys.txt"
    path.write_text(f"# of the gateway\n\n{KEY}\n")
    return path


def parsed(module, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("flag", ["--api-key", "--api-key-env"])
def test_every_command_takes_a_key_from_a_file_or_a_variable(flag, key_file, monkeypatch):
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    words = [flag, str(key_file) if flag == "--api-key" else "MY_KEY"]
    assert bench_flags.read_endpoints(parsed(bench_flags, "--url", URL, *words)).api_key == KEY
    assert batch.read_sending(parsed(batch, "in", "out", "--url", "127.0.0.1:1", URL, *words)).access.key == KEY
    with answering(200, {}) as (url, keys):
        assert main(["top", url, "--once", "--json", "--interval", "0.2", *words]) == 0
    assert keys == [f"Bearer {KEY}"] * 2


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("url", "words", "message"),
    [
        (URL, ["--api-key", "/nowhere"], "/nowhere does not exist"),
        (URL, ["--api-key-env", "NO_SUCH_VARIABLE"], "the variable NO_SUCH_VARIABLE of --api-key-env is not set"),
        (URL, ["--api-key-env", "EMPTY"], "the variable EMPTY: expected printable ASCII without spaces"),
        (URL, ["--api-key", "TWO"], "found 2 keys, expected one"),
        (URL, ["--api-key", "NONE"], "found 0 keys, expected one"),
        (URL, ["--api-key", "ODD"], "expected printable ASCII without spaces"),
        ("127.0.0.1:1", ["--api-key", "ONE"], "--api-key is for servers over HTTP, and 127.0.0.1:1 is gRPC's"),
    ],
)
def test_a_key_that_cannot_be_sent_is_one_error(command, url, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EMPTY", " ")
    texts = {"TWO": "a-key\nanother\n", "NONE": "# none\n", "ODD": "smörgås", "ONE": KEY}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    flag, value = words
    assert main([command, *COMMANDS[command], url, flag, str(tmp_path / value) if value in texts else value]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert KEY not in said


def test_a_key_of_a_file_and_one_of_a_variable_are_one_too_many(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--url", URL, "--api-key", "file", "--api-key-env", "NAME"])
    assert "not allowed with argument --api-key" in capsys.readouterr().err


def test_a_key_does_not_follow_a_redirect(key_file, tmp_path, capsys):
    """Neither to another server nor to the same one: whoever answers there was not named."""
    words = ["--api-key", str(key_file)]
    with answering(200, {}) as (other, keys), answering(302, {"Location": other}) as (url, first):
        main(["top", url, "--once", "--json", "--interval", "0.2", *words])
        assert first == [f"Bearer {KEY}"] * 2
        assert keys == [None] * 2
        assert main(["bench", "--url", url.removesuffix("/metrics"), *words]) == 2
        assert "HTTP status 302" in capsys.readouterr().err
        prompts = write_batch(tmp_path / "in.jsonl", 1)
        server = url.removesuffix("/metrics")
        assert main(["batch", str(prompts), str(tmp_path / "o"), "--url", server, "--patience", "0.1", *words]) == 1
        assert "HTTP status 302" in capsys.readouterr().err
        assert keys == [None] * 2


def test_a_server_that_wants_a_key_is_answered_with_the_flags_that_give_one(tmp_path, capsys):
    with answering(401, {}) as (url, _):
        assert main(["top", url, "--once"]) == 1
        assert "HTTP status 401; give --api-key or --api-key-env" in capsys.readouterr().err
        prompts = write_batch(tmp_path / "in.jsonl", 1)
        assert main(["batch", str(prompts), str(tmp_path / "o"), "--url", url.removesuffix("/metrics")]) == 1
        assert "HTTP status 401; give --api-key or --api-key-env" in capsys.readouterr().err


def test_the_key_of_a_variable_goes_with_every_request_of_a_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with batch_server() as server:
        prompts = write_batch(tmp_path / "in.jsonl", 3)
        words = ["batch", str(prompts), str(tmp_path / "out.jsonl"), "--url", server.url, "--api-key-env", "MY_KEY"]
        assert main(words) == 0
        assert [headers["Authorization"] for headers in server.headers] == [f"Bearer {KEY}"] * 3
