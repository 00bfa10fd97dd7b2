"""Experts that no layer can choose: an engine does without them, and its logits are the reference's all the same."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from checkpoints import write_phixtral_checkpoint
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.trtllm.checkpoint import CheckpointOptions, write_checkpoint
from export.trtllm.parallel import Parallelism
from trt_build.trtllm.build import build_trtllm
from trt_build.trtllm.options import TrtllmOptions

EXPERTS = 4


@pytest.fixture(scope="module")
def equal_gates(tmp_path_factory):
    """As phixtral's published recipe makes it: every expert has the same gate row."""
    return with_rows(tmp_path_factory.mktemp("equal") / "checkpoint", [0, 0, 0, 0])


def with_rows(folder, rows):
    """A random phixtral whose gate rows are those of a distinct one, by number."""
    write_phixtral_checkpoint(
        folder, seed=5, num_experts=EXPERTS, experts_per_token=2, hidden_size=192, num_heads=6, ffn_size=448,
        num_layers=2, rotary_dim=16, max_positions=64, vocab_size=352, dtype="float16",
    )  # fmt: skip
    tensors = load_file(folder / "model.safetensors")
    for name, gate in tensors.items():
        if name.endswith("gate.weight"):
            tensors[name] = np.ascontiguousarray(gate[rows])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_two_of_four_equal_gate_rows_are_enough_for_two_experts_a_token(equal_gates, tmp_path):
    model = read_model(open_checkpoint(equal_gates))
    left_out = model.routing_report().never_chosen
    assert left_out == (2, 3)
    write_checkpoint(model, CheckpointOptions(precision="fp16", left_out=left_out), tmp_path / "less")
    write_checkpoint(model, CheckpointOptions(precision="fp16"), tmp_path / "all")
    assert json.loads((tmp_path / "less" / "config.json").read_text())["moe"]["num_experts"] == 2
    with (
        safe_open(tmp_path / "less" / "rank0.safetensors", "np") as less,
        safe_open(tmp_path / "all" / "rank0.safetensors", "np") as whole,
    ):
        assert set(less.keys()) == set(whole.keys())
        for name in less.keys():  # noqa: SIM118 - safe_open is no mapping
            kept = whole.get_tensor(name)[:2] if ".mlp." in name else whole.get_tensor(name)
            np.testing.assert_array_equal(less.get_tensor(name), kept, err_msg=name)


def test_experts_that_are_left_out_are_counted_out_of_the_ranks(equal_gates, tmp_path):
    model = read_model(open_checkpoint(equal_gates))
    options = CheckpointOptions(precision="fp16", left_out=(2, 3), parallel=Parallelism(tp_size=2, moe_ep_size=2))
    write_checkpoint(model, options, tmp_path / "two")
    for rank in range(2):
        with safe_open(tmp_path / "two" / f"rank{rank}.safetensors", "np") as file:
            found = file.get_tensor("transformer.layers.1.mlp.fc.weight")
        np.testing.assert_array_equal(found[0], model.weights.load("transformer.h.1.moe.mlp.fc1.weight")[rank])


def test_the_engine_of_the_experts_that_count_answers_as_the_reference(equal_gates, tmp_path, trtllm_build):
    outcome = build_trtllm(
        TrtllmOptions(checkpoint=str(equal_gates), output=tmp_path / "engine", precision="fp16", verify_tokens=24)
    )
    assert outcome.engine.manifest.left_out_experts == (2, 3)
    assert outcome.verification.failures == ()
    assert outcome.verification.report.max_logit_difference < 1e-4
    assert outcome.plan.average_bits_per_weight == pytest.approx(16, abs=0.1)


def test_all_experts_can_be_kept(equal_gates, tmp_path):
    options = {"checkpoint": str(equal_gates), "output": tmp_path / "engine", "until": "plan", "precision": "fp16"}
    less, whole = (build_trtllm(TrtllmOptions(**options, keep_all_experts=kept)).plan for kept in (False, True))
    assert less.notes[0] == (
        "left out: experts 2 and 3 of all 2 layers: their gate rows equal those of experts before them, so that they "
        "can never be chosen"
    )
    assert not any("left out" in note for note in whole.notes)
    assert less.rank_bytes[0] < whole.rank_bytes[0]


def test_an_engine_without_an_expert_that_counts_is_told(equal_gates, tmp_path, trtllm_build, monkeypatch):
    monkeypatch.setattr("export.routing.RoutingReport.never_chosen", (0, 1))
    outcome = build_trtllm(
        TrtllmOptions(checkpoint=str(equal_gates), output=tmp_path / "engine", precision="fp16", verify_tokens=24)
    )
    assert outcome.verification.failures


def test_ties_that_stay_are_told(tmp_path, caplog):
    folder = with_rows(tmp_path / "checkpoint", [0, 0, 1, 2])
    outcome = build_trtllm(TrtllmOptions(checkpoint=str(folder), output=tmp_path / "engine", until="plan"))
    assert outcome.plan.notes[0].startswith(
        "some gate rows are equal: equal router logits go to the lowest expert index"
    )
    shutil.rmtree(folder)
    assert (
        build_trtllm(
            TrtllmOptions(checkpoint=str(with_rows(folder, [0, 1, 2, 3])), output=tmp_path / "engine", until="plan")
        ).plan.notes
        == ()
    )


@pytest.mark.parametrize(
    ("sm", "precision", "told"), [(120, "int4_awq", True), (90, "int4_awq", False), (120, "int4_gptq", False)]
)
def test_awq_that_some_releases_pack_wrongly_is_told(tmp_path, sm, precision, told):
    folder = with_rows(tmp_path / "checkpoint", [0, 1, 2, 3])
    options = TrtllmOptions(
        checkpoint=str(folder), output=tmp_path / "engine", until="plan", precision=precision, group_size=64, gpu_sm=sm
    )
    notes = build_trtllm(options).plan.notes
    assert any("NVIDIA/TensorRT-LLM#11561" in note for note in notes) is told
