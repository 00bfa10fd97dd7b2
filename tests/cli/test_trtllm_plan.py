"""`moeship plan --backend tensorrt-llm`: figures that add up by hand, and refusals before anything is spent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import main

MIXTRAL = Path(__file__).parents[2] / "examples/tiny-mixtral/checkpoint"
DIMS = {"hidden": 192, "layers": 3, "heads": 6, "ffn": 448, "vocab": 352, "experts": 5}


def planned(capsys, checkpoint, *words):
    status = main(["plan", str(checkpoint), "--backend", "tensorrt-llm", "--json", *words])
    return status, json.loads(capsys.readouterr().out)


def float16_bytes():
    """All of the tiny checkpoint's weights at two bytes, the routers at four."""
    h, f, e, v = (DIMS[name] for name in ("hidden", "ffn", "experts", "vocab"))
    layer = 2 * h + 3 * h * h + 3 * h + h * h + h + e * (2 * h * f + f + h)
    return 2 * (v * h + DIMS["layers"] * layer + 2 * h + v * h + v) + 4 * DIMS["layers"] * e * h


def test_rank_files_hold_every_weight_and_a_header(capsys, tiny_checkpoint):
    _, plan = planned(capsys, tiny_checkpoint, "--precision", "fp16")
    [bytes_of_rank] = plan["rank_bytes"]
    assert 0 < bytes_of_rank - float16_bytes() < 20_000
    assert plan["architecture"] == "PhixtralForCausalLM"


def test_experts_are_shared_out_and_all_else_stays_whole(capsys, tiny_checkpoint):
    _, whole = planned(capsys, tiny_checkpoint, "--precision", "fp16")
    _, shared = planned(capsys, tiny_checkpoint, "--precision", "fp16", "--tp-size", "2")
    assert len(shared["rank_bytes"]) == 2
    assert shared["rank_bytes"][0] == shared["rank_bytes"][1] < 0.6 * whole["rank_bytes"][0]
    assert sum(shared["rank_bytes"]) > whole["rank_bytes"][0]  # embedding, norms and some biases on both
    assert shared["kv_bytes_per_token"] * 2 == whole["kv_bytes_per_token"] == 2 * DIMS["layers"] * DIMS["hidden"] * 2


def test_decoding_reads_two_of_five_experts(capsys, tiny_checkpoint):
    _, plan = planned(capsys, tiny_checkpoint, "--precision", "fp16")
    h, f = DIMS["hidden"], DIMS["ffn"]
    unread = 2 * DIMS["layers"] * 3 * (2 * h * f + f + h) + 2 * (DIMS["vocab"] - 1) * h
    assert plan["weights_bytes_per_token"] == pytest.approx(float16_bytes() - unread, abs=2)


def test_ranks_of_a_stage_read_side_by_side_and_stages_in_turn(capsys):
    words = ["--precision", "fp16", "--bandwidth", "2", "--pp-size", "2"]
    for tp in (1, 2):
        _, plan = planned(capsys, MIXTRAL, *words, "--tp-size", str(tp))
        assert len(plan["rank_bytes"]) == 2 * tp
        assert plan["tokens_per_s_at_start"] == pytest.approx(2e9 * tp / plan["weights_bytes_per_token"])


def test_sequences_that_do_not_fit_end_with_status_1(capsys, tiny_checkpoint):
    words = ["--precision", "fp16", "--device-memory", "0.012", "--max-batch-size", "64"]
    status, plan = planned(capsys, tiny_checkpoint, *words)
    left = (12_000_000 - plan["rank_bytes"][0]) * 0.9
    assert plan["sequences"] == left // (plan["kv_bytes_per_token"] * 640) < 64
    assert status == 1
    assert main(["plan", str(tiny_checkpoint), "--backend", "tensorrt-llm", *words]) == 1
    assert "activations not counted" in capsys.readouterr().out


def test_group_wise_experts_with_biases_are_said_to_be_experimental(capsys, caplog, tiny_checkpoint):
    status, plan = planned(capsys, tiny_checkpoint, "--precision", "int4_gptq")
    assert (status, plan["group_size"]) == (0, 64)
    assert "experimental" in caplog.text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--tp-size", "4"], "EngineError: reading the flags: --tp-size: for --backend tensorrt-llm only"),
        (
            ["--backend", "tensorrt-llm", "--provider", "cpu"],
            "--provider: for --backend onnxruntime only; leave them out",
        ),
        (
            ["--backend", "tensorrt-llm", "--measure-bandwidth"],
            "--measure-bandwidth: it measures this machine's memory, and the engine is in a GPU's memory; give",
        ),
        (["--backend", "tensorrt-llm", "--tp-size", "4"], "6 attention heads cannot be divided evenly by tp_size 4"),
    ],
)
def test_flags_of_the_other_backend_and_what_does_not_fit_are_refused(capsys, tiny_checkpoint, words, text):
    assert main(["plan", str(tiny_checkpoint), *words]) == 2
    assert text in capsys.readouterr().err
