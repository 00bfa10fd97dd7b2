"""Traces: what their lines mean, when their requests are sent, and which lines are refused."""

from __future__ import annotations

import json

import pytest
from bench_standin import StandIn, simulate

from clients.bench.generator import apply
from clients.bench.load import Lengths, Load
from clients.bench.report import summarise
from clients.bench.trace import BLOCK_TOKENS, TraceWorks, read_trace
from export.errors import ConfigError

FOUR = Lengths(low=4, high=4)


@pytest.fixture
def trace(tmp_path):
    """Reads a trace of lines that are given as objects or as texts."""

    def read(*lines):
        path = tmp_path / "trace.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return read_trace(path)

    return read


def test_requests_are_sent_when_the_trace_says_whatever_the_server_does(trace):
    found = trace(
        {"timestamp": 3000, "input_length": 5, "output_length": 2},
        "",
        {"timestamp": 1000, "prompt": "first of all", "max_tokens": 3},
        {"timestamp": 1500.5, "text_input": "then this"},
    )
    assert [one.at_s for one in found] == pytest.approx([0, 0.5005, 2.0])
    works = TraceWorks(trace=found, max_tokens=FOUR)
    load = Load(schedule=tuple(one.at_s for one in found), requests=3)

    async def main():
        server = StandIn(one_at_a_time=True)
        run = await apply(server, load, works)
        return server.works, run, summarise(run, load, works, 2)

    sent, run, report = simulate(main)
    assert [(work.prompt, work.max_tokens) for work in sent][:2] == [("first of all", 3), ("then this", 4)]
    assert (len(sent[2].prompt.split()), sent[2].max_tokens) == (5, 2)
    assert [record.due_s for record in run.records] == pytest.approx([0, 0.5005, 2.0])
    # One at a time: the first answers at 0.5 and ends at 0.7; the second has its first token at 1.2; the third at 2.5.
    assert [record.first_token_s for record in run.records] == pytest.approx([0.5, 0.6995, 0.5])
    assert report["load"]["kind"] == "open loop, arrivals of a trace"
    assert "schedule" not in report["load"]
    assert report["generator"]["late_s"]["max"] == pytest.approx(0)


def test_a_duration_ends_a_trace(trace):
    found = trace(*({"timestamp": 1000 * at, "input_length": 1, "output_length": 1} for at in range(10)))
    works = TraceWorks(trace=found, max_tokens=FOUR)
    load = Load(schedule=tuple(one.at_s for one in found), duration_s=4.2)
    run = simulate(lambda: apply(StandIn(), load, works))
    assert [(record.index, record.cut) for record in run.records] == [*((at, False) for at in range(4)), (4, True)]
    assert run.window_s == 4.2


def test_a_trace_that_ends_before_its_duration_is_measured_until_its_last_answer(trace):
    found = trace(*({"timestamp": 1000 * at, "input_length": 1, "output_length": 1} for at in range(4)))
    works = TraceWorks(trace=found, max_tokens=FOUR)
    load = Load(schedule=tuple(one.at_s for one in found), duration_s=60.0)
    run = simulate(lambda: apply(StandIn(), load, works))
    assert run.window_s == pytest.approx(3.5)
    assert summarise(run, load, works, 2)["requests_per_s"] == pytest.approx(4 / 3.5)


def test_equal_blocks_are_equal_texts(trace):
    """Two prompts that share their first two blocks of 512 tokens have a common beginning of as many words."""
    long = BLOCK_TOKENS * 2 + 100
    found = trace(
        {"timestamp": 0, "input_length": long, "hash_ids": [7, 8, 9]},
        {"timestamp": 1, "input_length": long + 7, "hash_ids": [7, 8, 10]},
        {"timestamp": 2, "input_length": 100, "hash_ids": [9]},
    )
    works = TraceWorks(trace=found, max_tokens=FOUR)
    first, second, third = (works.work(index).prompt.split() for index in range(3))
    assert [len(first), len(second), len(third)] == [long, long + 7, 100]
    assert first[: 2 * BLOCK_TOKENS] == second[: 2 * BLOCK_TOKENS]
    assert first[2 * BLOCK_TOKENS :] != second[2 * BLOCK_TOKENS :][:100]
    assert first[2 * BLOCK_TOKENS :] == third
    assert works.work(3).prompt.split()[:BLOCK_TOKENS] != first[:BLOCK_TOKENS]  # to warm up, not the trace's own


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: "),
        ("[]", "line 2: found .*expected an object"),
        ({"input_length": 4}, "line 2: timestamp is None"),
        ({"timestamp": -0.5, "input_length": 4}, "line 2: timestamp is -0.5, expected milliseconds of 0 or more"),
        ('{"timestamp": NaN, "input_length": 4}', "line 2: timestamp is nan"),
        ('{"timestamp": Infinity, "input_length": 4}', "line 2: timestamp is inf"),
        ({"timestamp": True, "input_length": 4}, "line 2: timestamp is True"),
        ({"timestamp": "0", "input_length": 4}, "line 2: timestamp is '0'"),
        ('{"timestamp": 1' + "0" * 400 + ', "input_length": 4}', "line 2: timestamp is a whole number of 1329 bits"),
        ('{"timestamp": 1e999, "input_length": 4}', "line 2: timestamp is inf"),
        ("[" * 100_000, "line 2: it is nested too deeply"),
        ('{"timestamp": 0, "prompt": "\\ud800"}', "line 2: a text in it holds half of a surrogate pair"),
        ({"timestamp": 0}, "line 2: expected either a prompt or an input_length"),
        ({"timestamp": 0, "prompt": "a", "input_length": 4}, "line 2: expected either"),
        ({"timestamp": 0, "prompt": ""}, "line 2: the prompt is ''"),
        ({"timestamp": 0, "input_length": 0}, "line 2: input_length is 0, expected tokens from 1"),
        ({"timestamp": 0, "input_length": 1 << 40}, "line 2: input_length is"),
        ({"timestamp": 0, "input_length": 4, "output_length": -1}, "line 2: output_length is -1"),
        ({"timestamp": 0, "input_length": 4, "hash_ids": [1, 2]}, "line 2: it has 2 hash_ids, expected 1 for 4 tokens"),
        ({"timestamp": 0, "input_length": 4, "hash_ids": ["x"]}, r"line 2: hash_ids is \['x'\]"),
    ],
)
def test_broken_lines_are_named(trace, line, message):
    with pytest.raises(ConfigError, match=f"(?s)reading the trace .*1 of 2 lines cannot be sent.*{message}"):
        trace({"timestamp": 0, "input_length": 4}, line)


def test_a_line_ends_with_a_newline_alone(trace):
    texts = ["a\u2028b", "c\x85d"]  # at which Python's splitlines() cuts
    found = trace(*(json.dumps({"timestamp": 0, "prompt": text}, ensure_ascii=False) for text in texts))
    assert [one.prompt for one in found] == texts


def test_an_empty_trace_is_refused(trace):
    with pytest.raises(ConfigError, match="found no request"):
        trace("")
