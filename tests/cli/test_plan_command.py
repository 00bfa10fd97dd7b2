"""`moeship plan`: what it prints, what it refuses, and that it writes nothing."""

from __future__ import annotations

import json

import pytest

from cli.main import main

PLAN = ["plan", "--precision", "int4"]


def planned(capsys, checkpoint, *words):
    status = main([*PLAN, str(checkpoint), "--json", *words])
    return status, json.loads(capsys.readouterr().out)


def test_the_table_names_every_role_and_the_bytes_of_the_whole(capsys, tiny_checkpoint):
    status, report = planned(capsys, tiny_checkpoint)
    assert (status, main([*PLAN, str(tiny_checkpoint)])) == (0, 0)
    text = capsys.readouterr().out
    for name in ("expert", "attention", "embedding", "head", "router", "norm", "bias"):
        assert f"\n  {name} " in text
    assert f"{report['engine_bytes']:,} bytes" in text
    assert "tokens per second" not in text


def test_a_bandwidth_bounds_the_tokens_per_second(capsys, tiny_checkpoint):
    _, report = planned(capsys, tiny_checkpoint, "--bandwidth", "10")
    weights, token = report["weights_bytes_per_token"], report["kv_bytes_per_token"]
    assert report["tokens_per_s_at_start"] == pytest.approx(10e9 / weights)
    assert report["tokens_per_s_at_end"] == pytest.approx(10e9 / (weights + 639 * token))
    assert main([*PLAN, str(tiny_checkpoint), "--bandwidth", "10"]) == 0
    assert f"{10e9 / weights:.1f} for the first" in capsys.readouterr().out


def test_the_bandwidth_is_measured_when_asked(capsys, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("trt_build.ort.command.measure_read_bandwidth", lambda: 7e9)
    assert planned(capsys, tiny_checkpoint, "--measure-bandwidth")[1]["bandwidth_bytes_per_s"] == 7e9


def test_sequences_that_do_not_fit_end_with_status_1_and_say_so(capsys, tiny_checkpoint):
    _, report = planned(capsys, tiny_checkpoint, "--max-seq-len", "64")
    token, data = report["kv_bytes_per_token"], report["resident_bytes"]
    memory = ["--max-seq-len", "64", "--device-memory", str((data + 3 * 64 * token) / 1e9)]
    assert planned(capsys, tiny_checkpoint, *memory, "--max-batch-size", "3")[0] == 0
    status, report = planned(capsys, tiny_checkpoint, *memory, "--max-batch-size", "4")
    assert (status, report["sequences"]) == (1, 3)
    assert main([*PLAN, str(tiny_checkpoint), *memory, "--max-batch-size", "4"]) == 1
    assert "3 of 64 tokens, 294.91 kB each; 4 asked: they do not fit" in capsys.readouterr().out


def test_the_longest_sequence_that_fits_is_told_where_none_does(capsys, tiny_checkpoint):
    _, report = planned(capsys, tiny_checkpoint)
    token, data = report["kv_bytes_per_token"], report["resident_bytes"]
    main([*PLAN, str(tiny_checkpoint), "--device-memory", str((data + 10.5 * token) / 1e9)])
    assert "longest sequence that fits    10 tokens" in capsys.readouterr().out
    main([*PLAN, str(tiny_checkpoint), "--device-memory", str(data / 2e9)])
    assert "none, the weights do not fit" in capsys.readouterr().out


def test_without_a_device_memory_the_cpus_is_the_machines_and_the_gpus_is_unknown(capsys, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("trt_build.ort.command.available_memory", lambda: 12_000_000)
    assert planned(capsys, tiny_checkpoint)[1]["device_memory_bytes"] == 12_000_000
    assert planned(capsys, tiny_checkpoint, "--provider", "cuda")[1]["device_memory_bytes"] is None


def test_nothing_is_written(capsys, tmp_path, tiny_checkpoint, monkeypatch):
    def state():
        return {path: path.stat().st_mtime_ns for path in (tiny_checkpoint, *tiny_checkpoint.iterdir())}

    monkeypatch.chdir(tmp_path)
    before = state()
    planned(capsys, tiny_checkpoint)
    assert list(tmp_path.iterdir()) == []
    assert state() == before


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--max-batch-size", "0"], "ConfigError: planning: --max-batch-size is 0, expected a number above 0"),
        (["--device-memory", "-1"], "ConfigError: planning: --device-memory is -1.0, expected a number above 0"),
        (["--device-memory", "nan"], "ConfigError: planning: --device-memory is nan, expected"),
        (["--bandwidth", "inf"], "ConfigError: planning: --bandwidth is inf, expected a number above 0"),
        (["--max-seq-len", "641"], "ConfigError: setting the longest sequence: found 641 tokens, expected 1 to 640"),
        (
            ["--precision", "zz"],
            "QuantizationError: choosing the precision: 'zz' is unknown. "
            "There are: fp32, int8, int4, int2, q2, q3, q4, q5, q6, q8\n",
        ),
        (
            ["--precision", "zz", "--provider", "cuda"],
            "QuantizationError: choosing the precision: 'zz' is unknown. There are: fp16, int8, int4\n",
        ),
        (
            ["--precision", "fp16", "--kernels", "moeship"],
            "QuantizationError: choosing the precision: the kernels of "
            "moeship multiply quantised matrices, found fp16, expected int8 or int4 or",
        ),
        (["--precision", "int5"], "QuantizationError: choosing the precision: 'int5' is unknown"),
        (["--provider", "tpu"], "ExportError: choosing the provider: 'tpu' is unknown"),
        (["--backend", "x"], "EngineError: choosing the backend: 'x' is unknown"),
        (["--experts-per-token", "9"], "ConfigError: overriding num_experts_per_tok: found 9, expected 1 to 5"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_status_2_and_one_line(capsys, tiny_checkpoint, words, text):
    assert main(["plan", str(tiny_checkpoint), *words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(text)


def test_a_checkpoint_that_is_not_there_is_refused(capsys, tmp_path):
    assert main([*PLAN, str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("CheckpointError: opening the checkpoint")
