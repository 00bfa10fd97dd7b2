"""ci/aiperf_throughput.py reads both generators' figures alike, and ci/kill_batches.py notices a wrong output."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(name):
    found = importlib.util.spec_from_file_location(name, ROOT / "ci" / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # where dataclasses look for annotations
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def aiperf_throughput():
    return script("aiperf_throughput")


def test_two_generators_of_the_same_load_have_the_same_figures(aiperf_throughput):
    """Two streams of two requests of 10 tokens: 2 s each, with 0.5 s between the first and the second of a stream."""
    report = {
        "output_tokens_per_s": 40 / 4.5, "output_tokens": 40, "window_s": 4.5, "requests": {"answered": 4},
        "first_token_s": {"p50": 0.2}, "answer_s": {"p50": 2.0},
    }  # fmt: skip
    found = [
        {
            "metadata": {"benchmark_phase": phase, "request_start_ns": begin * 10**9, "request_end_ns": end * 10**9},
            "metrics": {"usage_completion_tokens": {"value": 10}, "request_latency": {"value": 2000.0},
                        "time_to_first_token": {"value": 200.0}},
        }
        for phase, begin, end in (
            ("warmup", 0, 2), *[("profiling", 3, 5)] * 2, ("profiling", 5.25, 7.25), ("profiling", 5.5, 7.5),
        )
    ]  # fmt: skip
    ours = aiperf_throughput.of_bench(report, [2.0] * 4)
    assert asdict(ours) == pytest.approx(asdict(aiperf_throughput.of_aiperf(found)))
    assert ours.under_way == pytest.approx(8 / 4.5)
    options = Namespace(requests=4, max_tokens=10)
    assert aiperf_throughput.check(ours, options, "x") is ours
    with pytest.raises(aiperf_throughput.LoadFailed, match="had 4 answers of 40 tokens, expected 4 of 44"):
        aiperf_throughput.check(ours, Namespace(requests=4, max_tokens=11), "x")


def test_quartiles_are_those_of_the_rounds(aiperf_throughput):
    assert aiperf_throughput.quartiles([1.0]) == (1.0, 1.0, 1.0)
    assert aiperf_throughput.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda lines: lines[:-1], "found 2 lines, expected 3"),
        (lambda lines: [lines[1], lines[0], lines[2]], "line 1 differs"),
        (lambda lines: [*lines, lines[2]], "found 4 lines, expected 3"),
    ],
)
def test_an_output_that_lacks_a_line_or_has_one_twice_is_noticed(tmp_path, change, told):
    kill_batches = script("kill_batches")
    lines = [
        json.dumps({"custom_id": f"id-{number}", "response": {"body": {"choices": [
            {"text": kill_batches.expected_text(f"prompt {number}")}]}}})
        for number in range(3)
    ]  # fmt: skip
    output = tmp_path / "out.jsonl"
    output.write_text("\n".join(lines) + "\n")
    kill_batches.check(output, 3)
    output.write_text("\n".join(change(lines)) + "\n")
    with pytest.raises(kill_batches.WrongOutput, match=told):
        kill_batches.check(output, 3)


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("aiperf_throughput", ["--url", "u", "--model", "m", "--checkpoint", "c", "--rounds", "0"], "--rounds is 0,"),
        ("aiperf_throughput", ["--url", "u", "--model", "m", "--checkpoint", "c", "--aiperf", "none"], "none is no pr"),
        ("kill_batches", ["--work", "made", "--kills", "0"], "--kills is 0, expected 1 or more"),
        ("kill_batches", ["--work", "made", "--kills", "0", "--victim", "server"], "--kills is 0, expected 1 or more"),
    ],
)
def test_numbers_of_rounds_and_kills_that_are_none_are_refused(tmp_path, monkeypatch, capsys, name, words, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    assert script(name).main() == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
