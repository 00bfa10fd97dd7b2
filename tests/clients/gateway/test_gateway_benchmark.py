"""benchmarks/gateway.py against a gateway in front of a server whose answers are known, and gateway_events.py."""

from __future__ import annotations

import json

import pytest
from fake_triton import empty_final, piece

import gateway as benchmark
import gateway_events


def counted(request, context):
    """As many tokens as were asked for, one a piece."""
    names = [tensor.name for tensor in request.inputs]
    number = int.from_bytes(request.raw_input_contents[names.index("max_tokens")], "little")
    for token in range(number):
        last = token == number - 1
        yield piece("a", (5,), finish_reason="length" if last else "", num_output=token + 1)
    yield empty_final()


@pytest.fixture
def measure(gateway, server, tmp_path, capsys):
    """Runs the benchmark; gives its exit status, its result if there is one, and what it said."""

    def run(answer, *words) -> tuple[int, dict, str]:
        server.answer, output = answer, tmp_path / "result.json"
        status = benchmark.main(
            [
                "--grpc", server.url, "--openai", gateway.url, "--model", "phixtral", "--rounds", "2", "--turn", "0",
                "--pairs", "2", "--tokens", "3", "--streams", "2", "--output", str(output), *words,
            ]
        )  # fmt: skip
        said = capsys.readouterr()
        return status, json.loads(output.read_text()) if output.exists() else {}, said.out + said.err

    return run


def test_both_roads_are_asked_alike_by_turns(measure, server):
    status, result, said = measure(counted)
    assert status == 0, said
    assert [sorted(turn) for turn in result["tokens_per_s"]] == [["gateway", "grpc"]] * 2
    assert [sorted(pair) for pair in result["first_token_s"]] == [["gateway", "grpc"]] * 2
    assert all(value > 0 for each in (*result["tokens_per_s"], *result["first_token_s"]) for value in each.values())
    # On each road one request before the measuring, two first tokens, and two turns of two streams.
    assert len(server.requests) == 2 * (1 + 2 + 2 * 2)
    assert "throughput, gateway over gRPC: " in said


def test_an_answer_that_is_cut_is_an_error(measure):
    def short(request, context):
        yield piece("a", (5,), finish_reason="length", num_output=1)
        yield empty_final()

    status, result, said = measure(short)
    assert (status, result) == (1, {}), said
    assert "found an answer of 1 tokens, expected 3" in said


FEW = ["--rounds", "1", "--requests", "1", "--streams", "2", "--tokens", "5"]


def test_the_gateways_own_time_is_taken_over_the_events_of_a_turn(tmp_path, capfd):
    """A thousand events take some 140 ms; the kernel counts in steps of 10 ms."""
    output = tmp_path / "result.json"
    assert gateway_events.main([*FEW, "--tokens", "500", "--tick", "0.001", "--output", str(output)]) == 0
    (found,) = json.loads(output.read_text())["ms_per_1000_events"]
    assert found > 0
    assert "1000 events, " in capfd.readouterr().err


def test_an_answer_that_is_none_is_an_error(monkeypatch, capfd):
    monkeypatch.setattr(gateway_events, "MODEL", "another")
    assert gateway_events.main(FEW) == 1
    assert "found 0 events, expected 5" in capfd.readouterr().err
