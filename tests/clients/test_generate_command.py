"""`moeship generate`: what goes to stdout and stderr, which model is taken, and the exit status of each ending."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from fake_triton import empty_final, piece

from cli.generate import Timeline, statistics
from cli.main import main
from clients.messages import Piece

# Long enough for a busy machine; a test that waits so long has failed.
PATIENCE_S = 60


def sent_tensors(server) -> dict[str, bytes]:
    request = server.requests[-1]
    return dict(zip((tensor.name for tensor in request.inputs), request.raw_input_contents, strict=True))


def test_the_text_goes_to_stdout_and_nothing_to_stderr(server, capsys):
    assert main(["generate", "--url", server.url, "def main("]) == 0
    assert capsys.readouterr() == ("def main\n", "")


def test_statistics_go_to_stderr(server, capsys):
    assert main(["generate", "--url", server.url, "--stats", "def main("]) == 0
    captured = capsys.readouterr()
    assert captured.out == "def main\n"
    assert captured.err.startswith("3 tokens, first after ")


def test_json_is_one_object_with_text_tokens_counts_and_speed(server, capsys):
    assert main(["generate", "--url", server.url, "--json", "def main("]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("time_to_first_token_ms") > 0
    assert found.pop("tokens_per_s") > 0
    assert found == {
        "model": "phixtral",
        "text": "def main",
        "token_ids": [5, 6, 7],
        "finish_reason": "length",
        "num_input_tokens": 3,
        "num_output_tokens": 3,
    }


def test_every_option_reaches_the_server(server):
    sampling = ["--temperature", "0.5", "--top-k", "2", "--top-p", "0.25", "--seed", "9"]
    words = ["--max-tokens", "7", *sampling, "--stop", "a", "--stop", "bc"]
    assert main(["generate", "--url", server.url, *words, "x"]) == 0
    assert sent_tensors(server) == {
        "text_input": b"\x01\x00\x00\x00x",
        "max_tokens": b"\x07\x00\x00\x00",
        "stream": b"\x01",
        "temperature": b"\x00\x00\x00\x3f",
        "top_k": b"\x02\x00\x00\x00",
        "top_p": b"\x00\x00\x80\x3e",
        "random_seed": b"\x09" + bytes(7),
        "stop_words": b"\x01\x00\x00\x00a\x02\x00\x00\x00bc",
    }


def test_a_dash_reads_the_prompt_from_stdin(server, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("zwei\nZeilen"))
    assert main(["generate", "--url", server.url, "-"]) == 0
    assert sent_tensors(server)["text_input"][4:] == b"zwei\nZeilen"


def test_several_ready_models_are_listed_and_one_must_be_chosen(server, capsys):
    server.states = (("phixtral", "READY", ""), ("mixtral", "READY", ""), ("broken", "UNAVAILABLE", "why"))
    assert main(["generate", "--url", server.url, "x"]) == 2
    assert "found 2 ready; give --model, one of: mixtral, phixtral" in capsys.readouterr().err
    assert main(["generate", "--url", server.url, "--model", "mixtral", "x"]) == 0


def test_a_server_without_a_ready_model_says_why(server, capsys):
    server.states = (("phixtral", "UNAVAILABLE", "engine.json is missing"),)
    assert main(["generate", "--url", server.url, "x"]) == 2
    assert "none is ready: phixtral version 1 UNAVAILABLE (engine.json is missing)" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_a_failure_with_a_hint(capsys):
    assert main(["generate", "--url", "127.0.0.1:1", "x"]) == 1
    assert capsys.readouterr().err.startswith("ConnectionFailed: listing the models of 127.0.0.1:1: UNAVAILABLE")


@pytest.mark.parametrize(
    ("status", "exit_status", "name"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2, "RequestRejected"),
        (grpc.StatusCode.NOT_FOUND, 2, "ModelNotFound"),
        (grpc.StatusCode.INTERNAL, 1, "ServerFailed"),
    ],
)
def test_a_failure_keeps_the_text_so_far_and_exits_by_its_kind(server, capsys, status, exit_status, name):
    server.answer = server.failing(status, "words")
    assert main(["generate", "--url", server.url, "x"]) == exit_status
    captured = capsys.readouterr()
    assert captured.out == "def \n"
    assert captured.err.startswith(f"{name}: generating with phixtral at {server.url}: {status.name}: words")


def test_the_timeout_fails_the_command(server, capsys):
    server.answer = server.endless
    assert main(["generate", "--url", server.url, "--timeout", "0.3", "x"]) == 1
    assert capsys.readouterr().err.startswith("DeadlineExceeded: ")


@contextmanager
def started(server, *options: str) -> Iterator[subprocess.Popen]:
    """The command in a process of its own, which does not outlive the block."""
    words = [sys.executable, "-m", "cli.main", "generate", "--url", server.url, *options, "x"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
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
        context.add_callback(server.cancelled.set)
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


def test_speed_counts_the_tokens_after_the_first_piece_by_the_time_after_it():
    clock = iter([10.0, 12.0, 13.0, 14.0]).__next__
    timeline = Timeline(clock=clock)
    for token_ids in ((1, 2, 3), (4,), (5, 6)):
        timeline.add(Piece(text="x", token_ids=token_ids))
    assert (timeline.num_tokens, timeline.time_to_first_token_ms, timeline.tokens_per_s) == (6, 2000, 1.5)
    assert statistics(timeline) == "6 tokens, first after 2000 ms, then 1.5 tokens/s"


def test_a_server_that_names_no_tokens_gets_no_speed():
    timeline = Timeline(clock=iter([0.0, 0.25, 1.0]).__next__)
    timeline.add(Piece(text="a"))
    timeline.add(Piece(text="b"))
    assert statistics(timeline) == "2 pieces, first after 250 ms"


def test_importing_the_command_and_the_clients_loads_neither_grpc_nor_tritonclient():
    code = (
        "import sys, cli.generate, clients.generation, clients.wire, clients.errors;"
        "print([name for name in ('grpc', 'tritonclient', 'google.protobuf', 'torch') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
