"""`moeship plan merge.yml`: what it says is what the merge then does, and what each expert loses by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from adapters import write_adapter
from checkpoints import write_phi_checkpoint
from dense_checkpoints import write_dense_checkpoint
from merging import run, write_yaml
from safetensors.numpy import load_file, save_file

from cli.main import main
from export.checkpoint.folder import open_checkpoint
from export.inspection import describe
from export.merge.config import read_merge_config
from export.merge.explain import explain_merge


@pytest.fixture
def three(tmp_path):
    for index in range(3):
        write_dense_checkpoint(tmp_path / f"e{index}", seed=index, dtype="bfloat16")
    return write_yaml(tmp_path, 3, dtype="float16")


def test_sizes_are_those_of_the_merge(three):
    told, done = explain_merge(read_merge_config(three)), run(three)
    assert (told.num_bytes, told.num_parameters, told.num_tensors, told.dtype) == (
        done.num_bytes, done.num_parameters, done.num_tensors, done.dtype,
    )  # fmt: skip
    report = describe(open_checkpoint(done.folder))
    assert (told.active_parameters, told.family) == (report.active_parameters, "mixtral")
    assert told.never_chosen == done.routing.never_chosen == ()
    assert 0 < told.read_bytes <= told.num_bytes
    assert told.seconds > 0


def test_what_an_expert_loses_is_measured_over_all_values(tmp_path):
    """By hand, with numpy, in float64; the vocabulary of the second expert is larger, and its head is longer."""
    write_dense_checkpoint(tmp_path / "e0", seed=0)
    write_dense_checkpoint(tmp_path / "e1", seed=0, config={"rope_theta": 1e6})
    ours = load_file(tmp_path / "e0" / "model.safetensors")
    theirs = load_file(tmp_path / "e1" / "model.safetensors")
    theirs["model.layers.1.self_attn.k_proj.weight"][3, 5] += 2.0
    theirs["model.embed_tokens.weight"] *= np.float32(1.5)
    save_file(theirs, tmp_path / "e1" / "model.safetensors")
    told = explain_merge(read_merge_config(write_yaml(tmp_path)))
    attention = np.sqrt(sum(np.sum(v.astype(np.float64) ** 2) for k, v in ours.items() if "self_attn" in k))
    assert told.experts[1].lost == pytest.approx(
        {"embedding": 0.5, "attention": 2.0 / attention, "norm": 0.0, "head": 0.0}, rel=1e-5
    )
    assert told.experts[1].facts == {"rope_base": (1e6, 1e4)}
    assert told.experts[0].is_base
    assert told.experts[0].lost == {}


def test_vocabularies_are_compared_as_far_as_both_reach(tmp_path):
    write_dense_checkpoint(tmp_path / "e0", seed=0)
    write_dense_checkpoint(tmp_path / "e1", seed=1, vocab_size=400)
    tensors, base = (load_file(tmp_path / name / "model.safetensors") for name in ("e1", "e0"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][:371] = base[name]
    save_file(tensors, tmp_path / "e1" / "model.safetensors")
    lost = explain_merge(read_merge_config(write_yaml(tmp_path))).experts[1]
    assert (lost.lost["embedding"], lost.lost["head"], lost.facts) == (0.0, 0.0, {"vocab_size": (400, 371)})


def test_rounding_to_another_dtype_is_no_loss(tmp_path):
    for index, dtype in enumerate(("float32", "bfloat16")):
        write_dense_checkpoint(tmp_path / f"e{index}", seed=0, dtype=dtype)
    assert set(explain_merge(read_merge_config(write_yaml(tmp_path))).experts[1].lost.values()) == {0.0}


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden", "hidden_avg"])
def test_equal_prompts_are_told_as_equal_rows_before_any_gate_is_computed(three, mode):
    words = [["a b", "c"], ["c", "a b"], ["d"]]
    experts = [{"source_model": f"e{i}", "positive_prompts": some} for i, some in enumerate(words)]
    path = write_yaml(three.parent, experts=experts, gate_mode=mode, experts_per_token=1)
    told, done = explain_merge(read_merge_config(path)), run(path)
    assert told.equal_gates == ((0, 1),)
    assert told.never_chosen == (1,)
    if mode == "cheap_embed":  # sums of embeddings; hidden states of several prompts may sum in another order
        assert done.routing.never_chosen == (1,)


def test_empty_prompts_are_told(tmp_path, capsys):
    for index in range(3):
        write_phi_checkpoint(tmp_path / f"e{index}", seed=index)
    experts = [{"source_model": f"e{i}", "positive_prompts": [""]} for i in range(3)]
    assert main(["plan", str(write_yaml(tmp_path, experts=experts))]) == 0
    said = capsys.readouterr().out
    assert said.startswith("a phixtral of phi models\n")
    assert "never chosen     experts 2, whose rows equal those of experts before them" in said
    assert "expert 2 has only empty prompts: its gate row comes from the start token alone" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e0", "e1", "e2", "merge.yml"]


def test_the_command_prints_json_and_text(three, capsys):
    write_adapter(three.parent / "adapter", three.parent / "e1", seed=3)
    text = three.read_text().replace("./e1", "./e1+./adapter")
    three.write_text(text)
    assert main(["plan", str(three), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["experts"][1]["model"] == f"{three.parent / 'e1'}+{three.parent / 'adapter'}"
    assert told["experts"][1]["lost"]["attention"] > 1
    assert main(["plan", str(three)]) == 0
    said = capsys.readouterr().out
    assert f"expert 1: {three.parent / 'e1'}+{three.parent / 'adapter'}\n  loses of" in said
    assert f"{told['num_bytes']:,} (" in said
    assert "memory" in said


def test_the_progress_counts_the_experts(three, caplog):
    with caplog.at_level("INFO"):
        explain_merge(read_merge_config(three))
    told = [line for line in caplog.messages if line.startswith("comparing")]
    assert told == [f"comparing expert {index} with the base ({index + 1} of 3)" for index in range(3)]


def test_flags_of_an_engine_are_refused(three, capsys):
    assert main(["plan", str(three), "--max-batch-size", "3", "--provider", "cuda"]) == 2
    assert "a merge has no --provider, --max-batch-size, which moeship plan takes" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("--precision", "int8"), ("--backend", "tensorrt-llm")])
def test_flags_of_an_engine_that_have_a_default_are_refused_too(three, capsys, flag, value):
    assert main(["plan", str(three), flag, value]) == 2
    assert f"a merge has no {flag}, which moeship plan takes" in capsys.readouterr().err


def test_what_a_merge_refuses_its_plan_refuses(three, capsys):
    write_dense_checkpoint(three.parent / "e1", seed=1, ffn_size=48)
    assert main(["plan", str(three)]) == 2
    assert "has ffn_size 48, the base 56" in capsys.readouterr().err
    assert main(["plan", str(three.parent / "absent.yml")]) == 2
    assert "absent.yml does not exist" in capsys.readouterr().err
