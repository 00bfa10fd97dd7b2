"""`moeship bench`: what it prints and writes, and the status it ends with. The figures are held by
tests/clients/bench/test_generator.py."""

from __future__ import annotations

import itertools
import json
import re
import signal
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from fake_triton import FakeServer, at_the_end_of, empty_final, fake_server, piece, two_pieces
from tritonclient.grpc import service_pb2_grpc

from cli.main import main
from clients.bench.kept import Keeper, read_test


@pytest.fixture
def server() -> Iterator[FakeServer]:
    servicer = FakeServer()
    grpc_server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, grpc_server)
    servicer.url = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
    grpc_server.start()
    servicer.end = grpc_server.stop
    yield servicer
    servicer.cancelled.set()
    grpc_server.stop(grace=None).wait()


def test_the_table_has_a_row_for_each_number_of_streams(server, capsys):
    assert main(["bench", "--url", server.url, "--streams", "1,3", "--requests", "6", "--max-tokens", "3"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    rows = [line.split() for line in lines]
    assert rows[0][:2] == ["streams", "tokens/s"]
    assert rows[3:5] == [[], ["streams", "first", "token,", "s", "between", "tokens,", "ms", "answer,", "s"]]
    assert rows[5] == ["p50", "p90", "p99"] * 3
    assert [(row[0], len(row)) for row in rows[6:8]] == [("1", 10), ("3", 10)]
    # The kinds end where their last percentile does.
    ends = [lines[4].index(name) + len(name) for name in ("first token, s", "between tokens, ms", "answer, s")]
    assert ends == [place + 3 for place in range(len(lines[5])) if lines[5].startswith("p99", place)]
    assert max(map(len, lines[:8])) <= 100
    assert [(row[0], row[-3:]) for row in rows[1:3]] == [("1", ["0", "of", "6"]), ("3", ["0", "of", "6"])]
    assert "counted by the token ids of each response" in out
    assert "3 tokens a prompt, 3 an answer; the generator took" in out
    assert len(server.requests) == 2 * (6 + 1)  # one warm-up request each
    prompts = [request.raw_input_contents[0] for request in server.requests]
    assert len(set(prompts)) == 14


def test_json_and_the_file_of_every_request(server, capsys, tmp_path):
    kept = tmp_path / "run.jsonl"
    arguments = ["--rate", "200", "--requests", "5", "--warm-up", "0", "--early", "0.5", "--seed", "4", "--json"]
    assert main(["bench", "--url", server.url, *arguments, "--output", str(kept), "--slo", "600000"]) == 0
    [report] = json.loads(capsys.readouterr().out)["loads"]
    assert report["load"]["kind"] == "open loop, Poisson arrivals"
    assert (report["load"]["rate"], report["load"]["seed"], report["load"]["early_share"]) == (200, 4, 0.5)
    assert report["requests"]["sent"] == report["first_token_s"]["n"] == 5
    early = report["requests"]["ended_early"]
    assert report["goodput"]["met"] == 5 - early
    assert (report["goodput"]["missed"], report["goodput"]["unknown"]) == (0, early)
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["moeship load test", "load", *["request"] * 5, "end"]
    requests = lines[2:-1]
    assert sorted(record["index"] for record in requests) == list(range(5))
    assert all(record["load"] == "200/s" and record["arrivals"][0][1] == 2 for record in requests)
    assert lines[0]["about"]["urls"] == [server.url]
    assert lines[-1]["report"] == {key: value for key, value in report.items() if key != "server_metrics"}


def test_an_interrupt_keeps_and_marks_what_was_measured(server, capsys, tmp_path):
    kept, answered = tmp_path / "run.jsonl", iter(range(1000))

    def answer(request, context):
        if next(answered) == 6:  # in the middle of the second load
            signal.raise_signal(signal.SIGINT)
            context.add_callback(server.cancelled.set)
            server.cancelled.wait()
        yield from two_pieces(request, context)

    server.answer = answer
    arguments = ["--streams", "1,2,3", "--requests", "4", "--warm-up", "0", "--output", str(kept)]
    assert main(["bench", "--url", server.url, *arguments]) == 130
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["1", "2"]
    assert re.search(r"load 2 +ended early: interrupted; the figures are of the .* s until then", out)
    test = read_test(kept)
    assert test.ended == "interrupted"
    assert [level.name for level in test.levels] == ["1", "2"]
    first, second = test.levels
    assert first.report["requests"]["answered"] == 4
    assert 0 < second.report["requests"]["answered"] < 4
    assert second.report["requests"]["cut_at_the_end"] >= 1


def test_a_server_that_goes_ends_the_test_and_the_loads_before_it_stay(server, capsys, tmp_path):
    kept, stopped = tmp_path / "run.jsonl", []

    def answer(request, context):
        if len(server.requests) == 3:  # this request is not answered, and no later one arrives
            at_the_end_of(context, server.cancelled.set)
            stopped.append(threading.Thread(target=lambda: server.end(None).wait()))
            stopped[0].start()
            server.cancelled.wait()
        yield from two_pieces(request, context)

    server.answer = answer
    arguments = ["--streams", "1,2", "--requests", "1000", "--warm-up", "0", "--patience", "0.2"]
    assert main(["bench", "--url", server.url, *arguments, "--output", str(kept)]) == 1
    stopped[0].join()
    assert "ended early: the server was gone" in capsys.readouterr().out
    test = read_test(kept)
    assert [level.report["ended_early"] for level in test.levels] == ["the server was gone"]
    assert test.levels[0].report["requests"]["answered"] == 2
    assert test.levels[0].report["requests"]["failed"] >= 2


def test_a_full_disk_loses_no_figures(server, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Keeper, "_open", lambda self, path: open("/dev/full", "w"))  # noqa: PTH123, SIM115
    arguments = ["--requests", "5", "--warm-up", "0", "--output", str(tmp_path / "run")]
    assert main(["bench", "--url", server.url, *arguments]) == 2
    found = capsys.readouterr()
    assert re.search(r"0 of 5$", found.out, re.M)
    assert "No space left on device; the file has what was measured before that" in found.err


def test_a_page_that_cannot_be_written_loses_no_figures(server, capsys, tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()

    def answer(request, context):
        folder.rmdir()
        yield from two_pieces(request, context)

    server.answer = answer
    arguments = ["--requests", "1", "--warm-up", "0", "--page", str(folder / "page.html")]
    assert main(["bench", "--url", server.url, *arguments]) == 2
    found = capsys.readouterr()
    assert re.search(r"0 of 1$", found.out, re.M)
    assert "page.html" in found.err or "pages" in found.err


def test_a_server_that_does_not_answer_leaves_no_file(tmp_path):
    assert main(["bench", "--url", "127.0.0.1:1", "--output", str(tmp_path / "run")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_trace_is_sent_request_by_request(server, capsys, tmp_path):
    trace, kept = tmp_path / "trace.jsonl", tmp_path / "run"
    lines = [{"timestamp": 2000 + 40 * turn, "prompt": f"number {turn}", "max_tokens": turn + 1} for turn in range(5)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["bench", "--url", server.url, "--trace", str(trace), "--speed", "2", "--output", str(kept)]) == 0
    assert "trace x2" in capsys.readouterr().out
    sent = {}
    for request in server.requests:
        values = dict(zip([tensor.name for tensor in request.inputs], request.raw_input_contents, strict=True))
        sent[values["text_input"][4:].decode()] = int.from_bytes(values["max_tokens"], "little")
    assert {f"number {turn}": turn + 1 for turn in range(5)}.items() <= sent.items()
    assert len(sent) == 6  # and one to warm up
    [level] = read_test(kept).levels
    assert [record.due_s for record in level.records] == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])
    assert [record.max_tokens for record in level.records] == [1, 2, 3, 4, 5]
    assert level.report["load"]["kind"] == "open loop, arrivals of a trace"


def test_a_trace_with_broken_lines_is_refused_whole(server, capsys, tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 4}\n{"timestamp": -1, "input_length": 4}\n{\n')
    assert main(["bench", "--url", server.url, "--trace", str(trace)]) == 2
    said = capsys.readouterr().err
    assert "2 of 3 lines cannot be sent" in said
    assert "line 2: timestamp is -1, expected milliseconds of 0 or more" in said
    assert "line 3: " in said
    assert server.requests == []
    assert main(["bench", "--url", server.url, "--trace", str(trace), "--rate", "2"]) == 2
    assert "found --trace and --rate; a trace has its own requests" in capsys.readouterr().err


def test_endpoints_that_disagree_on_the_model_are_refused(server, capsys):
    with fake_server() as other:
        other.states = (("mixtral", "READY", ""),)
        both = ["--url", server.url, "--url", other.url]
        assert main(["bench", *both, "--requests", "2"]) == 2
        said = capsys.readouterr().err
        assert "the endpoints have no model in common" in said
        assert f"{server.url} has phixtral; {other.url} has mixtral" in said
        assert main(["bench", *both, "--model", "phixtral", "--requests", "2"]) == 2
        assert "expected phixtral at every address" in capsys.readouterr().err
        assert server.requests == other.requests == []
        other.states = server.states
        assert main(["bench", *both, "--requests", "6", "--warm-up", "0"]) == 0
        assert len(server.requests) == len(other.requests) == 3


@pytest.mark.parametrize("flag", ["--output", "--page"])
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
    assert main(["bench", "--url", server.url, "--requests", "1", "--warm-up", "0"]) == 0
    assert "1 request got no token before the end" in capsys.readouterr().out


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
        (["--body", "{"], "reading --body: "),
        (["--body", "[]"], "reading --body: found [], expected a JSON object"),
        (["--endpoint", "chat"], "--url is 127.0.0.1:1, expected http://HOST:PORT for the endpoint chat"),
        (["--url", "http://127.0.0.1:1"], "--url is http://127.0.0.1:1, expected HOST:PORT for the endpoint grpc"),
        (["--patience", "0"], "--patience is 0.0, expected seconds above 0"),
        (["--timeout", "0"], "--timeout is 0.0, expected seconds above 0"),
        (["--timeout", "nan"], "--timeout is nan, expected seconds above 0"),
        (["--output", "a", "--page", "./a"], "--output and --page are both a; name two files"),
        (["--slo", "fast"], "reading --slo: found 'fast', expected milliseconds"),
        (["--slo", "ttft:0"], "reading --slo: found 'ttft:0'"),
        (["--slo", "ttft:5,ttft:6"], "reading --slo: found"),
        (["--prompts", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_wrong_input(arguments, message, capsys):
    assert main(["bench", "--url", "127.0.0.1:1", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_server_that_is_not_there(capsys):
    assert main(["bench", "--url", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().err.startswith("ConnectionFailed: ")
    assert main(["bench", "--url", "http://127.0.0.1:1"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("ConnectionFailed: ")
    assert "gRPC" not in told


def test_the_loads_of_a_test_have_arrivals_of_their_own(server, tmp_path):
    """Else every rate of a curve would have met the same arrivals in another scale, and chance moved all alike."""
    file = tmp_path / "kept"
    words = ["--rate", "200,400,200", "--requests", "6", "--max-tokens", "1", "--seed", "5", "--output", str(file)]
    assert main(["bench", "--url", server.url, *words]) == 0
    levels = read_test(file).levels
    shapes = [[record.due_s / level.records[0].due_s for record in level.records] for level in levels]
    assert all(len(shape) == 6 for shape in shapes)
    assert not any(one == pytest.approx(other) for one, other in itertools.combinations(shapes, 2))
