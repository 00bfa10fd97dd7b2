"""`moeship bench`: what it prints and writes, and the status it ends with. The figures are held by
tests/clients/bench/test_generator.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from fake_triton import FakeServer, empty_final, piece
from tritonclient.grpc import service_pb2_grpc

from cli.main import main


@pytest.fixture
def server() -> Iterator[FakeServer]:
    servicer = FakeServer()
    grpc_server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, grpc_server)
    servicer.url = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
    grpc_server.start()
    yield servicer
    grpc_server.stop(grace=None).wait()


def test_the_table_has_a_row_for_each_number_of_streams(server, capsys):
    assert main(["bench", "--url", server.url, "--streams", "1,3", "--requests", "6", "--max-tokens", "3"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:2] == ["streams", "tokens/s"]
    assert [(row[0], row[-3:]) for row in rows[1:3]] == [("1", ["0", "of", "6"]), ("3", ["0", "of", "6"])]
    assert "counted by the token ids of each response" in out
    assert "3 tokens a prompt, 3 an answer; the generator took" in out
    assert len(server.requests) == 2 * (6 + 1)  # one warm-up request each
    prompts = [request.raw_input_contents[0] for request in server.requests]
    assert len(set(prompts)) == 14


def test_json_records_and_picture(server, capsys, tmp_path):
    records, picture = tmp_path / "records.jsonl", tmp_path / "bench.svg"
    arguments = ["--rate", "200", "--requests", "5", "--warm-up", "0", "--early", "0.5", "--seed", "4", "--json"]
    outputs = ["--records", str(records), "--plot", str(picture)]
    assert main(["bench", "--url", server.url, *arguments, *outputs]) == 0
    [report] = json.loads(capsys.readouterr().out)["loads"]
    assert report["load"]["kind"] == "open loop, Poisson arrivals"
    assert (report["load"]["rate"], report["load"]["seed"], report["load"]["early_share"]) == (200, 4, 0.5)
    assert report["requests"]["sent"] == report["first_token_s"]["n"] == 5
    kept = [json.loads(line) for line in records.read_text().splitlines()]
    assert [record["index"] for record in kept] == list(range(5))
    assert all(record["load"] == "200/s" and record["arrivals"][0][1] == 2 for record in kept)
    text = picture.read_text()
    for label in ("output tokens per second", "time to first token", "time between tokens", "milliseconds"):
        assert f"<!-- {label} -->" in text


@pytest.mark.parametrize("flag", ["--records", "--plot"])
def test_an_output_that_exists_or_has_no_place_is_refused_before_the_load(server, capsys, tmp_path, flag):
    taken = tmp_path / "prompts.jsonl"
    taken.write_text("mine")
    for path, message in ((taken, "exists already"), (tmp_path / "none" / "out", "does not exist")):
        assert main(["bench", "--url", server.url, "--requests", "1", flag, str(path)]) == 2
        assert message in capsys.readouterr().err
    assert (taken.read_text(), server.requests) == ("mine", [])


def test_failed_requests_are_told_with_an_example_and_end_with_1(server, capsys):
    def full(request, context):
        context.abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
        yield

    server.answer = full
    assert main(["bench", "--url", server.url, "--requests", "2", "--warm-up", "0"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^ +ServerOverloaded UNAVAILABLE: 2 +generating with phixtral .*Exceeds", out, re.M)
    assert re.search(r"2 of 2$", out, re.M)


def test_a_server_that_gives_no_token_has_no_figures(server, capsys):
    def silent(request, context):
        yield piece("", (), finish_reason="stop")
        yield empty_final()

    server.answer = silent
    assert main(["bench", "--url", server.url, "--requests", "2", "--warm-up", "0"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split()[:5] == ["1", "0", out.splitlines()[1].split()[2], "-", "-"]
    assert "2 requests got no token before the end" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--streams", "1", "--rate", "2"], "found --streams and --rate; give one of them"),
        (["--requests", "1", "--duration", "2"], "found --requests and --duration; give one of them"),
        (["--streams", "two"], "--streams is 'two', expected numbers"),
        (["--streams", "0"], "the number of streams is 0, expected 1 or more"),
        (["--warm-up", "-1"], "--warm-up is -1, expected 0 or more"),
        (["--requests", "0"], "--requests is 0, expected 1 or more"),
        (["--early", "2"], "the share of early ends is 2.0, expected 0 to 1"),
        (["--max-tokens", "x"], "reading --max-tokens: found 'x'"),
        (["--openai", "http://127.0.0.1:1", "--body", "{"], "reading --body: "),
        (["--openai", "http://127.0.0.1:1", "--body", "[]"], "reading --body: found [], expected a JSON object"),
        (["--prompts", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_wrong_input(arguments, message, capsys):
    assert main(["bench", "--url", "127.0.0.1:1", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_server_that_is_not_there(capsys):
    assert main(["bench", "--url", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().err.startswith("ConnectionFailed: ")
    assert main(["bench", "--openai", "http://127.0.0.1:1"]) == 1
    assert capsys.readouterr().err.startswith("ConnectionFailed: ")
