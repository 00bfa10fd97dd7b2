"""Turns, rounds and the result: what is run in which order, and what the figures come to."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cpu_decode
from decode import machine, rounds
from decode.contenders import Task, Transformers, load
from decode.entrants import Entrant, prepare
from decode.results import assemble, ratios, table
from decode.rounds import Record, TurnFailed, run_rounds, run_turn
from decode.shape import Weights
from decode.worker import Lengths, measure
from synthetic_checkpoint import PHIXTRAL

SCRIPT = Path(cpu_decode.__file__)
SHORT = Lengths(first=4, short_context=12, long_context=150, decode=8, prefill=40)
SMALL = replace(
    PHIXTRAL, family="mixtral", hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_size=16, rotary_dim=16,
    ffn_size=96, vocab_size=128, num_experts=3, max_positions=256,
)  # fmt: skip


class Tape:
    """A contender that writes down what it is given; its next id is the number of positions it holds."""

    def __init__(self):
        self.length, self.calls = 0, []

    def forget(self):
        self.length = 0

    def run(self, tokens):
        self.calls.append((self.length, len(tokens)))
        self.length += len(tokens)
        return self.length


def entrant(name, **changes):
    facts = {
        "source": None, "model": SMALL, "files": (), "choices": ({},), "weights": Weights(total=20, active=10),
        "weight_bytes": 40, "read_per_token": 1000, "cache_per_position": 10, "notes": {}, **changes,
    }  # fmt: skip
    return Entrant(name=name, **facts)


def turn(short, long=1.0, prefill=1.0, others=0.0):
    return {
        "first_token_s": 2.0, "decode_short": short, "decode_long": long, "prefill": prefill, "peak_bytes": 7e9,
        "steady_bytes": 5e9, "steady_anonymous_bytes": 1e9, "other_cores": others,
    }  # fmt: skip


def test_a_turn_decodes_around_the_contexts_named_and_prefills_an_empty_cache():
    tape = Tape()
    lengths = Lengths()
    measure(tape, lengths, started=0.0, vocab_size=50)
    decoded = [position for position, count in tape.calls if count == 1]
    assert len(decoded) == 2 * 64
    assert np.mean([position + 1 for position in decoded[:64]]) == pytest.approx(96, abs=1)
    assert np.mean([position + 1 for position in decoded[64:]]) == pytest.approx(1024, abs=1)
    assert [call for call in tape.calls if call[1] > 1] == [(0, 16), (0, 64), (0, 512), (0, 992)]
    assert max(position + count for position, count in tape.calls) == lengths.positions


def test_our_engine_runs_a_turn_in_its_own_process(tiny_engine, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "await_quiet", lambda name: None)
    ours = prepare("ours", tiny_engine, PHIXTRAL, tmp_path, scaled_layers=1)
    found, facts = run_turn(ours, {}, SHORT, threads=2)
    assert all(found[rate] > 0 for rate in rounds.RATES)
    assert found["first_token_s"] > 0
    assert found["peak_bytes"] >= found["steady_bytes"] > found["steady_anonymous_bytes"] > 1e6
    assert facts["precision"]["name"] == "int4"


def test_an_engine_of_a_shorter_context_than_the_benchmark_fails_its_turn(tiny_engine, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "await_quiet", lambda name: None)
    ours = prepare("ours", tiny_engine, PHIXTRAL, tmp_path, scaled_layers=1)
    with pytest.raises(TurnFailed, match="its context is 640 tokens, the benchmark runs to 1056; build it"):
        run_turn(ours, {}, Lengths(), threads=2)


def test_a_turn_waits_for_quiet_but_not_for_ever(monkeypatch, caplog):
    caplog.set_level("INFO", logger="decode.rounds")
    slept = []
    monkeypatch.setattr(rounds.time, "sleep", slept.append)
    busy = iter([1.5, 0.4, 0.0])
    monkeypatch.setattr(rounds, "_watch_others", lambda: lambda: next(busy))
    rounds.await_quiet("ours")
    assert slept == [2.0] * 3
    monkeypatch.setattr(rounds, "_watch_others", lambda: lambda: 2.0)
    rounds.await_quiet("llama-q4_0")
    assert slept == [2.0] * 33
    assert caplog.messages == [
        "ours waits: others keep 1.50 cores busy",
        "llama-q4_0 waits: others keep 2.00 cores busy",
    ]


def test_a_turn_without_end_is_ended(monkeypatch):
    monkeypatch.setattr(rounds, "await_quiet", lambda name: None)
    monkeypatch.setattr(rounds, "TURN_LIMIT_S", 0.01)
    with pytest.raises(TurnFailed, match="its turn took more than 0 s and was ended"):
        run_turn(entrant("ours"), {}, SHORT, threads=1)


def test_rates_of_fewer_layers_are_scaled(monkeypatch):
    answer = {"turn": turn(short=8.0, long=6.0, prefill=100.0), "facts": {}}
    done = subprocess.CompletedProcess([], 0, json.dumps(answer), "")
    monkeypatch.setattr(rounds.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(rounds, "await_quiet", lambda name: None)
    scaled = entrant("transformers-fp32", decode_scale=0.5, prefill_scale=0.25)
    found, _ = run_turn(scaled, {}, SHORT, threads=1)
    assert (found["decode_short"], found["decode_long"], found["prefill"]) == (4.0, 3.0, 25.0)


def test_transformers_decodes_what_its_prompt_gives():
    task = Task(contender="transformers-fp32", source=None, model=SMALL, positions=64, threads=2,
                settings={"experts": "eager"})  # fmt: skip
    contender = load(task)
    assert isinstance(contender, Transformers)
    tokens = [5, 90, 17, 33, 101, 8]
    singly = [contender.run([token]) for token in tokens]
    contender.forget()
    assert contender.run(tokens) == singly[-1]
    shapes = {name: tuple(value.shape) for name, value in contender.model.named_parameters()}
    assert shapes["model.layers.1.mlp.experts.gate_up_proj"] == (3, 192, 64)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (32, 64)


@pytest.fixture
def scripted(monkeypatch):
    """run_turn and the bandwidth from a script: (name, settings) -> turns; what ran is kept in order."""
    ran: list[tuple[str, dict[str, object]]] = []

    def play(script):
        def scripted_turn(who, settings, lengths, threads):
            ran.append((who.name, dict(settings)))
            found = script[who.name](settings, len(ran))
            if isinstance(found, Exception):
                raise found
            return found, {}

        monkeypatch.setattr(rounds, "run_turn", scripted_turn)
        monkeypatch.setattr(rounds, "await_quiet", lambda name: None)
        monkeypatch.setattr(rounds.machine, "read_bandwidth", lambda *_: {"integer sum": 9e3, "dot product": 10e3})
        return ran

    return play


def run(entrants, count):
    kept = []
    run_rounds(entrants, SHORT, 2, count, 1 << 20, lambda *known: kept.append(known))
    return kept


def test_contenders_run_in_turns_and_every_round_begins_with_another(scripted):
    ran = scripted({"ours": lambda *_: turn(3), "llama-q4_0": lambda *_: turn(2), "llama-q4_k_m": lambda *_: turn(1)})
    kept = run([entrant("ours"), entrant("llama-q4_0"), entrant("llama-q4_k_m")], 3)
    assert "".join(name[-1] for name, _ in ran) == "s0m0msms0"
    assert len(kept) == 3


def test_the_better_settings_are_taken_and_the_trials_do_not_count(scripted):
    rates = {True: turn(4.0, 5.0, 60.0), False: turn(5.0, 4.5, 90.0)}
    scripted({"llama-q4_0": lambda settings, _: rates[settings["flash_attention"]]})
    choices = ({"flash_attention": True}, {"flash_attention": False})
    [record], _ = run([entrant("llama-q4_0", choices=choices)], 2)[-1]
    assert record.settings == {"flash_attention": False}
    assert [trial["prefill"] for trial in record.trials] == [60.0, 90.0]
    assert len(record.turns) == 2


def test_a_contender_that_fails_is_left_out_with_its_reason_and_the_others_go_on(scripted):
    ran = scripted({"ours": lambda *_: turn(3), "llama-q4_0": lambda _, number: TurnFailed("out of memory")})
    records, bandwidths = run([entrant("ours"), entrant("llama-q4_0")], 2)[-1]
    assert [name for name, _ in ran] == ["ours", "llama-q4_0", "ours"]
    result = assemble({}, SHORT, records, {"transformers-bf16": "no torch"}, bandwidths)
    assert result["not_run"] == {"transformers-bf16": "no torch", "llama-q4_0": "out of memory"}
    assert list(result["contenders"]) == ["ours"]


def test_a_crash_of_llama_cpp_names_the_compilers_fault():
    with pytest.raises(TurnFailed, match="if GCC 11 or 12 compiled it for a processor with AMX"):
        raise TurnFailed(rounds._ending("llama-q4_0", -11, ""))
    assert rounds._ending("ours", -9, "killed") == "its process ended with SIGKILL: killed"
    assert rounds._ending("ours", 1, "KeyError: 'x'\n") == "its process ended with status 1: KeyError: 'x'"


@pytest.fixture
def result():
    ours = Record(entrant=entrant("ours"), settings={}, turns=[turn(6.0, 5.0, 90.0), turn(4.0), turn(5.0, 3.0, 80.0)])
    peer = Record(entrant=entrant("llama-q4_0", read_per_token=880), settings={}, turns=[turn(4.0, 2.0, 40.0)])
    about = {"model": {"name": "phixtral-4x2_8"}, "machine": {"processor": "Some CPU"}, "threads": 2}
    found = assemble(about, SHORT, [ours, peer], {}, [{"sum": 9e3, "dot": 10e3}, {"sum": 8e3, "dot": 2e3}])
    return json.loads(json.dumps(found))


def test_medians_spreads_shares_and_ratios_are_those_worked_by_hand(result):
    assert result["bandwidth"]["bytes_per_second"] == 9000  # the median of the rounds' faster methods, 10000 and 8000
    ours = result["contenders"]["ours"]
    assert (ours["median"]["decode_short"], ours["spread"]["decode_short"]) == (5.0, [4.0, 6.0])
    assert ours["bytes_per_token"] == {"decode_short": 1000 + 12 * 10, "decode_long": 1000 + 150 * 10}
    assert ours["bandwidth_share"]["decode_short"] == pytest.approx(5 * 1120 / 9000)
    assert ours["bandwidth_bound"]["decode_long"] == pytest.approx(9000 / 2500)
    assert ratios(result) == {"llama-q4_0": {"decode_short": 1.25, "decode_long": 1.5, "prefill": 2.0}}


def test_the_table_says_what_the_result_holds(result):
    text = table(result)
    assert "over llama-q4_0: decode 1.25x and 1.50x, prefill 2.00x" in text
    assert "not reliable" not in text
    result["contenders"]["ours"]["spread"]["other_cores"] = [0.0, 0.7]
    assert "ours: others kept 0.70 cores busy in the worst turn, so its rates are not reliable" in table(result)


def test_the_bandwidth_is_measured_by_both_methods():
    rates = machine.read_bandwidth(threads=2, num_bytes=64_000_000)
    assert set(rates) == {"integer sum", "dot product"}
    assert all(1e7 < rate < 1e14 for rate in rates.values())


def test_a_dot_product_that_leaves_bytes_out_is_caught(monkeypatch):
    whole = np.array_split
    monkeypatch.setattr(machine.np, "array_split", lambda buffer, count: whole(buffer, count)[1:])
    with pytest.raises(AssertionError, match="a turn summed 500000.0 ones, expected 1000000"):
        machine._dot_bandwidth(2, 4_000_000)


def test_the_work_of_others_is_what_is_busy_beyond_our_children(monkeypatch):
    # Over 10 seconds all cores worked 19 seconds, the turn's process 12 of them.
    monkeypatch.setattr(rounds.time, "monotonic", iter([100.0, 110.0]).__next__)
    monkeypatch.setattr(rounds.machine, "busy_seconds", iter([50.0, 69.0]).__next__)
    usages = iter([SimpleNamespace(ru_utime=1.0, ru_stime=2.0), SimpleNamespace(ru_utime=12.0, ru_stime=3.0)])
    monkeypatch.setattr(rounds.resource, "getrusage", lambda _: next(usages))
    assert rounds._watch_others()() == pytest.approx(0.7)


def test_busy_seconds_leave_out_idling_and_waiting(monkeypatch):
    monkeypatch.setattr(machine, "_first_line", lambda _: "cpu  100 20 30 9000 8000 1 2 47 0 0\n")
    monkeypatch.setattr(machine.os, "sysconf", lambda _: 100)
    assert machine.busy_seconds() == 2.0


def test_the_machine_is_described_and_named():
    found = machine.describe()
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 1e9
    assert found["packages"]["onnxruntime"].startswith("1.32")
    named = {"processor": "Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz", "cores": 2}
    assert machine.slug(named) == "intel-xeon-platinum-8480c-2-cores"


def test_wrong_options_are_refused(tiny_engine, tmp_path):
    def refused(*words):
        command = [sys.executable, SCRIPT, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        return done.stderr

    assert "no folder for the GGUF files; name one with --gguf" in refused("--engine", tiny_engine)
    gguf = ("--gguf", tmp_path, "--contenders", "ours")
    assert "'ours' needs an engine" in refused(*gguf)
    assert "found 0 rounds" in refused(*gguf, "--rounds", 0)
    assert "--layers is 7" in refused(*gguf, "--engine", tiny_engine, "--layers", 7)
