"""Servers in turns: what a scenario measures (by hand, in simulated time), that a contender runs only in its turn, what
rounds come to, and one small run against a real Triton."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_standin import StandIn, simulate
from serve_command import wait_until

import serving
from clients.bench.load import Work
from export.errors import ConfigError
from servers import scenarios
from servers.contenders import Contender, family
from servers.in_process import InProcessTarget
from servers.results import assemble, check_kind, table
from servers.vocabulary import read_vocabulary
from triton_repo.contracts.model_parameters import EngineInstance, ModelParameters
from triton_repo.runtime.single.service import Service

ORDER = {
    "seed": 0, "streams": 4, "requests": 4, "prompt_tokens": 8, "max_tokens": 4, "short_prompt_tokens": 2,
    "long_prompt_tokens": 64, "long_max_tokens": 40,
}  # fmt: skip


@pytest.fixture
def order(tiny_checkpoint):
    return {**ORDER, "tokenizer": str(tiny_checkpoint / "tokenizer.json")}


class LongPrompts(StandIn):
    """A server that needs 2 s for the long prompt, and in that time gives no other stream a token."""

    async def answer(self, work):
        if work.max_tokens == scenarios.LONG_ANSWER_TOKENS:
            self.prefill_s, self.busy_until = 2.0, asyncio.get_running_loop().time() + 2.0
        else:
            self.prefill_s = 0.5
        async for arrival in super().answer(work):
            await asyncio.sleep(max(0.0, getattr(self, "busy_until", 0.0) - asyncio.get_running_loop().time()))
            yield arrival


def test_a_long_prompt_among_streams(order):
    found = simulate(lambda: scenarios.long(LongPrompts(), order))
    assert found["alone_s"] == pytest.approx(2)
    assert found["first_s"] == pytest.approx(2)
    assert found["streams_running_when_it_arrived"] == 4
    # It arrives just after each stream's fourth token, at most 5 ms late; their next one comes when it has its first.
    assert found["longest_pause_s"] == pytest.approx(2, abs=0.11)
    assert found["steps_s"] == [pytest.approx(0.1)] * 12


def test_a_long_prompt_at_a_server_that_answers_one_at_a_time(order):
    found = simulate(lambda: scenarios.long(StandIn(one_at_a_time=True), {**order, "long_max_tokens": 400}))
    assert found["streams_running_when_it_arrived"] == 1
    assert found["alone_s"] == pytest.approx(0.5)
    # 40.4 s for each of the four; the first has had 20 s of them.
    assert found["first_s"] == pytest.approx(4 * 40.4 - scenarios.WAIT_S + 0.5, abs=0.02)


def test_first_tokens_of_short_requests(order):
    found = simulate(lambda: scenarios.first(StandIn(), order))
    assert found["first_token_s"] == [pytest.approx(0.5)] * 4


def test_an_answer_of_another_length_is_no_figure(order):
    class Short(StandIn):
        async def answer(self, work):
            async for arrival in super().answer(Work(prompt=work.prompt, max_tokens=work.max_tokens - 1)):
                yield arrival

    with pytest.raises(AssertionError, match="found 3 tokens, finish reason length, error None, expected 4 tokens"):
        simulate(lambda: scenarios.load(Short(), order))


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def all_stopped(pids):
    """Whether processes stand still. The kernel stops them some time after the signal (signal(7))."""
    return wait_until(lambda: [*map(state_of, pids)] == ["T"] * len(pids))


def test_a_contender_and_its_children_run_only_in_their_turn():
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", child], stdin=pipe, stdout=pipe) as process:
        process.stdout.readline()
        members = family(process.pid)
        assert len(members) == 2
        states = []
        contender = Contender("x", process.pid, lambda order: states.append([*map(state_of, members)]) or order, {})
        stopped = [all_stopped(members)]
        measured = contender.measure({"a": 1})
        stopped.append(all_stopped(members))
        contender.release()
        process.communicate(b"\n")
    # Checked after the processes have ended: leaving the block waits for them, for ever if one stands still.
    assert stopped == [True, True]
    assert "T" not in states[0]
    assert measured["a"] == 1
    assert measured["others_cores"] >= 0
    assert measured["memory"]["resident_bytes"] > measured["memory"]["anonymous_bytes"] > 1_000_000
    assert process.returncode == 0
    assert os.getpid() not in members


def load_answer(rate, first, resident=1000):
    spread = {"p50": first, "p90": first, "p99": first, "max": first, "n": 1}
    return {
        "output_tokens_per_s": rate, "all_streams_running": {"seconds": 1, "tokens_per_s": rate * 2},
        "first_token_s": spread, "between_tokens_s": spread, "longest_pause_s": 1, "fairness": {"jain": 1},
        "generator": {"cores": 0.1}, "memory": {"resident_bytes": resident, "anonymous_bytes": 1}, "others_cores": 0.0,
    }  # fmt: skip


def round_of(ours, llama, bandwidth=1.0):
    memory = {"memory": {"resident_bytes": 1, "anonymous_bytes": 1}, "others_cores": 0.3}
    return {
        "ours": {
            "load 1": load_answer(ours * bandwidth, 0.5), "load 8": load_answer(3 * ours * bandwidth, 2.0),
            "first": {"first_token_s": [0.2, 0.3, 0.4], **memory},
        },
        "in-process": {"first": {"first_token_s": [0.29], **memory}},
        "llama-q4_0": {
            "load 1": load_answer(llama * bandwidth, 0.5), "load 8": load_answer(2 * llama * bandwidth, 2.0),
            "long": {"alone_s": 2, "first_s": 5, "longest_pause_s": 4, "streams_running_when_it_arrived": 4,
                     "steps_s": [0.1], **memory},
        },
    }  # fmt: skip


def test_turns_beside_other_programs_are_told():
    result = assemble(ABOUT, [round_of(10, 8)], None)
    assert table(result).endswith(
        "in doubt, as other programs kept cores busy: ours first: 0.30, in-process first: 0.30, llama-q4_0 long: 0.30"
    )


ABOUT = {"model": {"name": "x"}, "load": {"streams": (1, 8)}, "machine": {}, "threads": 2, "not_run": {}}


def test_ratios_are_of_one_round_whatever_the_bandwidth_was():
    result = assemble(ABOUT, [round_of(10, 8), round_of(10, 8, bandwidth=2.5), round_of(10, 5, bandwidth=0.1)], None)
    bars = result["answers_to_bars"]
    assert bars["tokens/s at 8 streams over 1"] == pytest.approx(3)
    assert bars["tokens/s over llama-q4_0 at 1"] == pytest.approx(10 / 8)
    assert bars["tokens/s over llama-q4_0 at 8"] == pytest.approx(30 / 16)
    assert bars["seconds that the server adds to the first token"] == pytest.approx(0.01)
    assert bars["llama-q4_0: first token of a long prompt among streams over alone"] == 2.5
    assert result["medians"]["ours"]["load 1"]["tokens_per_s"] == 10
    assert result["medians"]["ours"]["load 8"]["decode_tokens_per_s"] == 60


def test_an_earlier_result_is_compared_with_if_it_is_of_the_same_work():
    earlier = assemble(ABOUT, [round_of(10, 8)], None)
    later = assemble(ABOUT, [round_of(20, 8)], json.loads(json.dumps(earlier)))
    assert later["over_before"]["load 1"] == {"tokens_per_s": 2, "first_token_s": 1, "resident_bytes": 1}
    with pytest.raises(ConfigError, match="found load .* expected .*; measure both with the same options"):
        assemble({**ABOUT, "load": {"streams": [1]}}, [round_of(20, 8)], earlier)
    with pytest.raises(ConfigError, match="found benchmark 'decode_turns'"):
        check_kind({"benchmark": "decode_turns"})


def test_the_engine_in_process_answers_as_it_is_asked(tiny_engine, order):
    service = Service.open(EngineInstance(folder=tiny_engine, parameters=ModelParameters(threads=1)))
    try:
        target = InProcessTarget(service)
        report = asyncio.run(scenarios.load(target, {**order, "streams": 2}))
    finally:
        service.runner.close()
    assert report["output_tokens"] == 16
    assert report["requests"]["answered"] == 4
    assert report["input_tokens"] == pytest.approx(4 * 8, abs=8)


def test_the_vocabulary_of_the_example_is_filled_up(tmp_path):
    tokenizer = serving.EXAMPLE.parent / "experts" / "code" / "tokenizer.json"
    found = read_vocabulary(tokenizer, 2100, 0)
    assert len(found.tokens) == len(set(found.tokens)) == 2100
    assert found.tokens[-1] == "Ġunused2099"
    assert all(len(merge.split(" ")) == 2 for merge in found.merges)
    assert set("".join(found.merges).replace(" ", "")) <= set("".join(found.tokens))
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(ConfigError, match="expected a byte-level BPE tokenizer"):
        read_vocabulary(other, 10, 0)


def options(*words):
    return serving._parser().parse_args(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--small", "--contenders", "ours,theirs"], "theirs is unknown. There are: ours, in-process"),
        (["--small", "--rounds", "0"], "found 0 rounds"),
        ([], "no engine; name one with --engine"),
    ],
)
def test_wrong_options(words, message):
    with pytest.raises(ConfigError, match=message):
        serving.benchmark(options(*words))


def test_a_small_run(tmp_path, monkeypatch, capsys, tiny_engine):
    monkeypatch.setattr(serving, "_small_engine", lambda folder: tiny_engine)
    monkeypatch.setattr(serving, "await_quiet", lambda what: None)
    monkeypatch.setattr(serving, "BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr(serving, "SMALL", serving.Lengths(long_prompt_tokens=128, long_max_tokens=16, short_requests=2))
    output = tmp_path / "serving.json"
    words = ["--small", "--contenders", "ours,in-process,llama-q4_0", "--streams", "1,2", "--rounds", "1",
             "--prompt-tokens", "8", "--max-tokens", "4", "--output", str(output)]  # fmt: skip
    assert serving.benchmark(options(*words)) == 1
    result = json.loads(output.read_text())
    assert list(result["not_run"]) == ["llama-q4_0"]
    assert "give its program with --llama-server" in result["not_run"]["llama-q4_0"]
    for name in ("ours", "in-process"):
        turns = result["rounds"][0][name]
        assert [turns[f"load {streams}"]["output_tokens"] for streams in (1, 2)] == [4, 8]
        assert turns["long"]["first_s"] > 0
        assert turns["first"]["memory"]["resident_bytes"] > 10_000_000
    bars = result["answers_to_bars"]
    assert {"tokens/s at 2 streams over 1", "tokens/s over in-process at 2"} <= set(bars)
    assert "seconds that the server adds to the first token" in bars
    assert "ours, 2 streams" in capsys.readouterr().out
    assert "<!-- time to first token, median -->" in output.with_suffix(".svg").read_text()
    assert serving.redraw(output) == 0
