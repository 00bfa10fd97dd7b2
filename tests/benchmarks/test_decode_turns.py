"""Decoding in short turns: processes that are stopped between their turns, and what the figures come to."""

from __future__ import annotations

import io
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from serve_command import wait_until

import decode_turns
from decode import published, turns
from decode.contenders import CHOICES, Task
from decode.entrants import prepare
from decode.worker import task_as_json
from export.errors import ConfigError
from synthetic_checkpoint import PHIXTRAL, QWEN3
from trt_build.ort.engine import open_engine

RESULTS = Path(decode_turns.__file__).parent / "results"


@pytest.fixture
def entrant(tiny_engines, tmp_path):
    """Our engine of the small checkpoint, with ONNX Runtime's kernels, which every machine has."""
    engine = tiny_engines("int4", kernels="onnxruntime")
    facts = open_engine(engine, check_digests=False).manifest.architecture
    return prepare("ours", engine, facts, tmp_path, scaled_layers=1)


def is_stopped(process):
    """Whether a process stands still. The kernel stops it some time after the signal (signal(7))."""
    return wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def test_a_contender_decodes_in_its_turn_and_is_stopped_before_and_after(entrant):
    with decode_turns.started(entrant, threads=1, rounds=2) as runner:
        assert is_stopped(runner._process)
        assert runner.tokens_per_s() > 0
        assert is_stopped(runner._process)
        assert runner.tokens_per_s() > 0
    assert runner._process.returncode == 0


def test_a_contender_that_refuses_says_why(entrant):
    most = (640 - turns.PROMPT_TOKENS) // decode_turns.TURN_TOKENS
    with (
        pytest.raises(ConfigError, match="its context is 640 tokens, the benchmark runs to 656; build it with"),
        decode_turns.started(entrant, threads=1, rounds=most + 1),
    ):
        pass


def test_a_turn_is_of_random_tokens_after_the_prompt_each_by_itself(monkeypatch):
    ran: list[list[int]] = []
    task = Task(contender="ours", source=None, model=PHIXTRAL, positions=99, threads=1, settings={})
    monkeypatch.setattr(turns, "load", lambda given: SimpleNamespace(run=ran.append) if given == task else None)
    monkeypatch.setattr(sys, "argv", ["turns", json.dumps(task_as_json(task))])
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"tokens": 3}\n{"tokens": 2}\n'))
    answered: list[dict[str, float]] = []
    monkeypatch.setattr(turns, "answers", lambda: nullcontext(answered.append))
    turns.main()
    assert [len(tokens) for tokens in ran] == [turns.PROMPT_TOKENS, 1, 1, 1, 1, 1]
    assert len({tuple(tokens) for tokens in ran}) == 6
    assert [list(answer) for answer in answered] == [[], ["seconds"], ["seconds"]]


def test_every_round_measures_the_bandwidth_and_begins_with_another_contender(monkeypatch):
    ran = []

    def runner(name):
        return SimpleNamespace(name=name, tokens_per_s=lambda: ran.append(name) or float(len(ran)))

    monkeypatch.setattr(decode_turns, "await_quiet", lambda name: ran.append(name))
    monkeypatch.setattr(decode_turns, "measure_read_bandwidth", lambda *_: ran.append("read") or 5e9)
    bandwidths, rates = decode_turns.measure([runner("a"), runner("b")], threads=1, rounds=2)
    assert ran == ["round 1 of 2", "read", "a", "b", "round 2 of 2", "read", "b", "a"]
    assert (bandwidths, rates) == ([5e9, 5e9], {"a": [3.0, 8.0], "b": [4.0, 7.0]})


def test_the_settings_are_among_those_that_the_long_benchmark_tries():
    assert all(settings in CHOICES[runtime] for runtime, settings in decode_turns.SETTINGS.items())


def test_a_token_reads_the_cache_of_the_mean_context(entrant):
    # 64 tokens of the prompt and half of 3 * 16.
    assert decode_turns.bytes_of_a_token(entrant, 3) - entrant.read_per_token == 88 * entrant.cache_per_position


def result():
    return {
        "benchmark": "decode_turns", "machine": {"processor": "Some CPU"}, "threads": 2,
        "bandwidth": [30e9, 60e9, 40e9],
        "contenders": {
            "ours": {"tokens_per_s": [6.0, 16.0, 9.0], "bytes_of_a_token": 2_500_000_000},
            "ik-q4_0": {"tokens_per_s": [5.0, 20.0, 6.0], "bytes_of_a_token": 2_000_000_000},
        },
    }  # fmt: skip


def test_ratios_and_shares_are_medians_of_what_a_round_gives():
    lines = [line.split() for line in decode_turns.report(result()).splitlines()]
    assert lines[1] == ["reads", "40.0", "GB/s", "(30.0", "to", "60.0)"]
    # 2.5 GB at 6, 16 and 9 tokens/s are 50, 67 and 56 % of the rounds' bandwidths.
    assert lines[3] == ["ours", "9.00", "16.00", "2.50", "56%", "1.00"]
    # 2 GB at 5, 20 and 6 tokens/s are 33, 67 and 30 %; ours is 1.2, 0.8 and 1.5 times as fast.
    assert lines[4] == ["ik-q4_0", "6.00", "20.00", "2.00", "33%", "1.20"]


def test_a_published_model_is_named_with_the_layers_that_were_measured():
    lines = decode_turns.report({**result(), "like": "qwen3-30b-a3b", "model": {"num_layers": 3}}).splitlines()
    assert lines[0] == "qwen3-30b-a3b, 3 of 48 layers"
    assert lines[1].startswith("Some CPU, 2 threads")


def test_an_engine_of_some_layers_is_built_once_and_its_checkpoint_removed(tmp_path, monkeypatch):
    small = replace(
        QWEN3, hidden_size=128, num_heads=2, num_kv_heads=1, head_size=64, rotary_dim=64, ffn_size=128, num_layers=3,
        num_experts=4, experts_per_token=2, vocab_size=6144,
    )  # fmt: skip
    monkeypatch.setitem(published.MODELS, "small", small)
    made = published.engine_of("small", 1, "int4", tmp_path / "cache")
    assert made.name == "engine-small-L1-V2048-int4"
    assert list((tmp_path / "cache").iterdir()) == [made]
    facts = open_engine(made).manifest.architecture
    assert (facts.family, facts.num_layers, facts.vocab_size, facts.num_experts) == ("qwen3_moe", 1, 2048, 4)
    monkeypatch.setattr(published, "write", None)
    assert published.engine_of("small", 1, "int4", tmp_path / "cache") == made


@pytest.mark.parametrize("given", [[], ["--engine", "a", "--like", "olmoe-1b-7b"]])
def test_one_of_engine_and_published_model_is_named(given, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decode_turns", "--gguf", "cache", *given])
    assert decode_turns.main() == 2
    assert "name an engine with --engine, or a model with --like, and a folder" in capsys.readouterr().err


def test_a_task_names_its_file_by_a_whole_path(monkeypatch, tmp_path):
    """The process of a contender runs in another folder."""
    monkeypatch.chdir(tmp_path)
    task = Task(contender="ours", source=Path("engine"), model=PHIXTRAL, positions=9, threads=1, settings={})
    assert task_as_json(task)["source"] == str(tmp_path / "engine")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("decode_turns-*.json")), ids=lambda path: path.stem)
def test_the_kept_results_are_read(path, capsys):
    assert decode_turns.table(path) == 0
    assert "ours " in capsys.readouterr().out


def options(**given):
    return SimpleNamespace(**{"contenders": ["ours"], "rounds": 2, "threads": 1, "output": None, "like": None, **given})


def test_what_cannot_run_says_why(entrant, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="transformers-bf16 is unknown. There are: ours, llama-q4_0"):
        decode_turns.benchmark(options(contenders=["ours", "transformers-bf16"]))
    with pytest.raises(ConfigError, match="found 0 rounds, expected at least one"):
        decode_turns.benchmark(options(rounds=0))
    monkeypatch.setattr("decode.machine.memory", lambda key: 100_000)
    with pytest.raises(ConfigError, match=r"the weights of ours take 0.0 GB together, 0.0 GB are free; name fewer"):
        decode_turns.benchmark(options(engine=entrant.source, gguf=tmp_path))
    other = tmp_path / "other.json"
    other.write_text('{"benchmark": "kernels"}')
    with pytest.raises(ConfigError, match="found benchmark 'kernels', expected 'decode_turns'"):
        decode_turns.table(other)


def test_a_result_names_the_settings_and_can_be_printed_again(entrant, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode_turns, "BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr(decode_turns, "await_quiet", lambda name: None)
    kept = tmp_path / "result.json"
    assert decode_turns.benchmark(options(engine=entrant.source, gguf=tmp_path, output=kept)) == 0
    printed = capsys.readouterr().out
    found = json.loads(kept.read_text())
    assert (found["prompt_tokens"], found["tokens_of_a_turn"], len(found["bandwidth"])) == (64, 16, 2)
    assert found["contenders"]["ours"]["settings"] == {}
    assert len(found["contenders"]["ours"]["tokens_per_s"]) == 2
    decode_turns.table(kept)
    assert capsys.readouterr().out == printed
