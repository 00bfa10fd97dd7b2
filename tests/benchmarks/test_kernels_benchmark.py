"""The kernels' benchmark: what is called in which order, and what the figures come to."""

from __future__ import annotations

import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import kernels
from export.errors import ConfigError
from layer import peak, process
from layer.onnx_layer import moeship_layer, qmoe_layer
from layer.process import started
from layer.shape import HIDDEN, WEIGHTS, WIDTH


def test_calls_that_do_not_count_come_first_and_all_take_the_pairs_in_turn(monkeypatch):
    calls, answers, now = [], [], [100.0]

    def run(rows, pair):
        calls.append((len(rows), pair))
        now[0] += len(rows) / 64  # one row: 1/64 s, so that three calls fill the 0.04 s that do not count

    monkeypatch.setattr(process.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(process.sys, "stdin", io.StringIO('{"rows": 1, "calls": 4}\n{"rows": 16, "calls": 2}\n'))
    process._serve(SimpleNamespace(run=run), answers.append)
    assert calls[:7] == [(1, pair) for pair in ((3, 2), (0, 1), (3, 2), (0, 1), (3, 2), (0, 1), (3, 2))]
    assert calls[7:] == [(16, pair) for pair in ((3, 2), (0, 1), (3, 2))]
    assert answers == [{"seconds": [1 / 64] * 4}, {"seconds": [0.25] * 2}]


def test_every_round_begins_with_another_contender_and_many_rows_are_called_less_often(monkeypatch):
    ran = []

    def contender(name):
        def seconds(rows, calls):
            ran.append((name, rows, calls))
            return [rows / 1000] * calls

        return SimpleNamespace(name=name, num_bytes=100, facts="", seconds=seconds)

    monkeypatch.setattr(kernels, "await_quiet", lambda name: ran.append(name))
    monkeypatch.setattr(kernels, "measure_read_bandwidth", lambda *_: 5e9)
    found = kernels.measure([contender("a"), contender("b")], None, [1, 512], rounds=2, threads=1)
    assert ran == ["round 1 of 2", ("a", 1, 12), ("b", 1, 12), ("a", 512, 2), ("b", 512, 2),
                   "round 2 of 2", ("b", 1, 12), ("a", 1, 12), ("b", 512, 2), ("a", 512, 2)]  # fmt: skip
    assert found["seconds"]["b"][512]["median"] == 0.512
    assert found["int8_products"] is None


def test_the_report_is_of_medians_with_the_best_call_beside_them():
    def spread(median, least):
        return {"median": median, "low": median, "high": median, "least": least, "most": median}

    result = {
        "machine": {"processor": "Some CPU"}, "threads": 2, "rounds": 3,
        "bandwidth": {**spread(10e9, 9e9), "most": 12e9},
        "int8_products": {"instructions": "vpdpbusd", **spread(400e9, 1.0)},
        "bytes_of_two_experts": {"moeship": 55_705_600},
        "seconds": {"moeship": {"1": spread(0.008, 0.005), "8": spread(0.012, 0.010)}},
        "not_run": {"ik_llama.cpp Q4_0": "no package"},
    }  # fmt: skip
    lines = kernels.report(result).splitlines()
    # One row: 104,857,600 weights in 8 ms are 13.1 G/s, 55.7 MB in 8 ms 6.96 GB/s, 70 % of 10; of the peak 13.1 / 400.
    assert lines[-3].split() == ["moeship", "1", "8.00", "1.00", "13.1", "7.0", "70%", "3%", "5.00"]
    # Eight rows: 838.9 M products in 12 ms are 69.9 G/s.
    assert lines[-2].split() == ["moeship", "8", "12.00", "1.50", "69.9", "4.6", "46%", "17%", "10.00"]
    assert lines[-1] == "ik_llama.cpp Q4_0 not run: no package"
    assert "reads 10.0 GB/s (most 12.0)" in lines
    assert WEIGHTS == 104_857_600


@pytest.mark.parametrize(
    ("kind", "num_bytes"),
    # Two experts of 2 * 2560 * 10240 weights: half a byte each, and for 64 of them a scale of 2 bytes or of 4 (QMoE).
    # At 3 bits 3/8 of a byte each, and a scale of 2 bytes for 128.
    [
        pytest.param("", 55_705_600, marks=pytest.mark.needs_kernels),
        pytest.param("avx2 q3 b128", 40_960_000, marks=pytest.mark.needs_kernels),
        (None, 58_982_400),
    ],
)
def test_a_layer_in_onnx_runtime_runs_and_counts_its_bytes(kind, num_bytes, tmp_path):
    layer = qmoe_layer(tmp_path, threads=1) if kind is None else moeship_layer(kind, tmp_path, threads=1)
    assert layer.num_bytes == num_bytes
    assert (HIDDEN, WIDTH) == (2560, 10240)
    layer.run(np.zeros((2, HIDDEN), dtype=np.float32), (3, 2))


def test_a_contender_that_is_unknown_or_cannot_load_says_why():
    with pytest.raises(ConfigError, match="'vllm' is unknown. There are: moeship, onnxruntime QMoE"):  # noqa: SIM117
        with started("vllm", 1):
            pass
    answers = iter([json.dumps({"refused": "no such library"}) + "\n", ""])
    process_ = SimpleNamespace(stdout=SimpleNamespace(readline=answers.__next__), wait=lambda: -11)
    with pytest.raises(ConfigError, match="no such library"):
        process.Contender("llama.cpp Q4_0", process_)
    with pytest.raises(AssertionError, match=r"the process of llama.cpp Q4_0 ended with status -11"):
        process.Contender("llama.cpp Q4_0", process_)


@pytest.mark.skipif(not any(map(shutil.which, peak._COMPILERS)), reason="no C compiler")
def test_the_peak_counts_the_products_of_its_loop(tmp_path):
    loop = peak.Peak(tmp_path)
    once = loop._library.products(1)
    assert once in (12 * 32, 12 * 64, 6 * 16 * 16 * 64)  # sums of one turn: vectors of 32 or 64 bytes, or tiles
    assert loop._library.products(7) == 7 * once
    assert loop.measure(threads=1) > 0


def test_the_peak_of_a_round_is_the_fastest_of_its_turns(monkeypatch):
    now, lengths = [0.0], iter([0.004, 0.002, *[0.008] * 6])
    loop = object.__new__(peak.Peak)
    loop._library = SimpleNamespace(products=lambda steps: 10 * steps)
    monkeypatch.setattr(peak.time, "perf_counter", lambda: now[0])

    def ended(count):
        now[0] += next(lengths)
        return count

    monkeypatch.setattr(peak, "sum", lambda counts: ended(sum(counts)), raising=False)
    assert loop.measure(threads=2) == pytest.approx(2 * 10 * (1 << 21) / 0.002)
    assert next(lengths, None) is None


def test_without_a_compiler_the_peak_names_one_and_the_option_that_leaves_it_out(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no C compiler .cc, gcc, clang. is on PATH .* with --no-peak"):
        peak.Peak(tmp_path)
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(ConfigError, match="/bin/false does not compile int8_peak.c"):
        peak.Peak(tmp_path)
