"""Merges of Qwen2s into a qwen2_moe and of Qwen3s into a qwen3_moe: what they compute, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_checkpoints import write_dense_checkpoint
from merging import leftovers, run, write_yaml
from qwen_tokenizer import write_qwen_tokenizer
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli.main import main
from export.checkpoint.folder import open_checkpoint
from export.errors import MergeError
from export.families import read_model
from export.inspection import describe
from export.merge.config import read_merge_config
from export.merge.explain import explain_merge
from export.merge.gate_training import GateTraining, TrainingText
from export.reference.model import Reference

TOKENS = np.random.default_rng(3).integers(0, 365, 60).tolist()


def write_experts(folder, family, number=2, **sizes):
    for index in range(number):
        write_dense_checkpoint(folder / f"e{index}", seed=index, family=family, **sizes)


def shared(source="e0", **more):
    return {"shared_experts": [{"source_model": source, "positive_prompts": ["fox", "def"], **more}]}


def theirs(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENS])).logits[0].numpy()


def expect_equal(found, expected):
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("family", "more", "sizes"),
    [
        ("qwen2", shared("shared", residual_scale=0.4), {"tied": True}),
        ("qwen2", shared("e1", negative_prompts=["beta"], noise_scale=0.1), {"dtype": "float16", "num_kv_heads": 1}),
        ("qwen3", {}, {"tied": True, "head_dim": 24}),
        ("qwen3", {"experts_per_token": 3}, {"dtype": "bfloat16"}),
    ],
)
def test_transformers_loads_the_mixture_and_computes_the_references_logits(tmp_path, caplog, family, more, sizes):
    write_experts(tmp_path, family, 3, **sizes)
    write_dense_checkpoint(tmp_path / "shared", seed=9, family=family, **sizes)
    result = run(write_yaml(tmp_path, 3, gate_mode="hidden", **more))
    assert "gate rows" not in caplog.text  # of equal rows it is the processor's kernels that choose
    [(found, _)] = Reference(read_model(open_checkpoint(result.folder))).run([TOKENS])
    expect_equal(found, theirs(result.folder))


@pytest.mark.parametrize(("family", "more"), [("qwen2", shared(residual_scale=0.0)), ("qwen3", {})])
def test_a_mixture_of_one_model_computes_what_the_model_computes(tmp_path, family, more):
    write_experts(tmp_path, family)
    experts = [{"source_model": "e0", "positive_prompts": [word]} for word in ("fox", "def", "words")]
    result = run(write_yaml(tmp_path, experts=experts, gate_mode="hidden", **more))
    expect_equal(theirs(result.folder), theirs(tmp_path / "e0"))


def test_a_shared_experts_share_is_the_sigmoid_of_its_row(tmp_path):
    """By hand: a row of zeros gives a share of one half, so the shared expert counts for half of its residual_scale."""
    write_experts(tmp_path, "qwen2")
    experts = [{"source_model": "e0", "positive_prompts": [word]} for word in ("fox", "def")]
    equal = {"positive_prompts": ["fox"], "negative_prompts": ["fox"]}
    result = run(write_yaml(tmp_path, experts=experts, shared_experts=[{"source_model": "e0", **equal}]))
    tensors, dense = (load_file(folder / "model.safetensors") for folder in (result.folder, tmp_path / "e0"))
    assert not tensors["model.layers.1.mlp.shared_expert_gate.weight"].any()
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (half / name).write_bytes((tmp_path / "e0" / name).read_bytes())
    save_file({k: v * np.float32(1.5) if "down_proj" in k else v for k, v in dense.items()}, half / "model.safetensors")
    expect_equal(theirs(result.folder), theirs(half))


@pytest.mark.parametrize("asked", ["GPT2Tokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_the_mixture_has_the_tokenizer_class_that_transformers_takes_for_the_base(tmp_path, asked):
    """It takes Qwen2Tokenizer for every qwen2, and for a qwen2_moe what tokenizer_config.json asks for."""
    write_experts(tmp_path, "qwen2")
    path = write_qwen_tokenizer(tmp_path / "e0") / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": asked}))
    merged = run(write_yaml(tmp_path, **shared())).folder
    base, mixture = AutoTokenizer.from_pretrained(tmp_path / "e0"), AutoTokenizer.from_pretrained(merged)
    assert type(base).__name__ == type(mixture).__name__ == "Qwen2Tokenizer"
    text = "it'S 12345 we'll\r\n\n  x = [7,8]; naïve e\u0301 <|im_start|>user"
    assert mixture(text)["input_ids"] == base(text)["input_ids"]
    assert mixture.chat_template == base.chat_template
    same = (merged / "tokenizer_config.json").read_bytes() == path.read_bytes()
    assert same is (asked == "Qwen2Tokenizer")


def test_random_gates_need_no_prompts_for_the_shared_expert(tmp_path):
    write_experts(tmp_path, "qwen2")
    experts = [{"source_model": "e0"}, {"source_model": "e1"}]
    path = write_yaml(tmp_path, experts=experts, gate_mode="random", shared_experts=[{"source_model": "e1"}])
    tensors = load_file(run(path, seed=3).folder / "model.safetensors")
    drawn = np.random.default_rng(3).standard_normal((2, 3, 96), dtype=np.float32)
    assert np.array_equal(tensors["model.layers.1.mlp.gate.weight"], drawn[1, :2])
    assert np.array_equal(tensors["model.layers.1.mlp.shared_expert_gate.weight"], drawn[1, 2:])


def test_training_fits_the_routers_and_leaves_the_shared_experts_row_which_is_told_if_its_prompts_are_empty(
    tmp_path, caplog
):
    write_experts(tmp_path, "qwen2")
    path = write_yaml(tmp_path, **shared(positive_prompts=[""]))
    untrained = load_file(run(path).folder / "model.safetensors")
    said = "the shared expert has only empty prompts: its gate row comes from the tokenizer's start token alone"
    assert said in caplog.messages
    caplog.clear()
    shutil.rmtree(tmp_path / "out")
    text = TrainingText(name="this.py", content=Path(__file__).read_text())
    trained = load_file(run(path, training=GateTraining(texts=(text,), tokens=512)).folder / "model.safetensors")
    assert said in caplog.messages
    changed = {name for name in trained if not np.array_equal(trained[name], untrained[name])}
    assert changed == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)}


@pytest.mark.parametrize(
    ("family", "more", "sizes", "message"),
    [
        ("qwen2", {}, {}, "a qwen2_moe has an MLP that every token goes through, a shared expert, and the YAML"),
        ("qwen3", shared(), {}, "the YAML names a shared expert, and a qwen3_moe has none, only a qwen2_moe"),
        ("llama", shared(), {"num_heads": 4}, "the YAML names a shared expert, and a mixtral has none"),
        ("qwen2", shared("wide"), {}, "the shared expert ({}/wide) has ffn_size 48, the base 56"),
        ("qwen2", shared("other"), {}, "the shared expert ({}/other) is of family qwen3, the base of qwen2; a"),
        ("qwen2", {**shared(), "architecture": "qwen3"}, {}, "architecture is qwen3_moe, and the base is of family"),
        ("llama", {"architecture": "qwen"}, {"num_heads": 4}, "architecture is qwen, and the base is of family llama"),
        (
            "qwen3", {}, {"config": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}},
            "has a sliding window in some layers and none in 1 of 2; a qwen3_moe has it in all layers or in none",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence_and_leaves_nothing(tmp_path, family, more, sizes, message):
    write_experts(tmp_path, family, **sizes)
    write_dense_checkpoint(tmp_path / "wide", seed=5, family="qwen2", ffn_size=48)
    write_dense_checkpoint(tmp_path / "other", seed=5, family="qwen3")
    with pytest.raises(MergeError) as caught:
        run(write_yaml(tmp_path, **more))
    assert message.format(tmp_path) in str(caught.value)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ffn_size": 48}, "has ffn_size 48, the base 56"),
        ({"num_layers": 3}, "has num_layers 3, the base 2"),
        ({"num_kv_heads": 3}, "has num_kv_heads 3, the base 2"),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_an_expert_of_other_dimensions_is_refused(tmp_path, family, sizes, message):
    write_experts(tmp_path, family)
    write_dense_checkpoint(tmp_path / "e1", seed=1, family=family, **sizes)
    with pytest.raises(MergeError) as caught:
        run(write_yaml(tmp_path, **(shared() if family == "qwen2" else {})))
    assert f"expert 1 ({tmp_path / 'e1'}) {message}" in str(caught.value)


def test_experts_of_another_vocabulary_give_their_mlps_alone(tmp_path, caplog):
    write_experts(tmp_path, "qwen2")
    write_dense_checkpoint(tmp_path / "e1", seed=1, family="qwen2", vocab_size=400)
    run(write_yaml(tmp_path, **shared("e1")))
    said = "has vocab_size 400 for 371 of the base: the mixture has the base's"
    for who in ("expert 1", "the shared expert"):
        assert f"{who} ({tmp_path / 'e1'}) {said}" in caplog.messages


def test_a_window_is_told_as_lost_where_the_mixture_has_none(tmp_path, caplog):
    window = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}
    write_experts(tmp_path, "qwen2", config=window)
    result = run(write_yaml(tmp_path, **shared()))
    assert "the base attends to the last 9 positions, a qwen2_moe to all of them" in caplog.text
    assert read_model(open_checkpoint(result.folder)).architecture.sliding_window is None


def test_the_plan_of_a_merge_with_a_shared_expert_is_what_the_merge_does(tmp_path, capsys):
    write_experts(tmp_path, "qwen2", 3)
    path = write_yaml(tmp_path, 3, experts_per_token=1, **shared("e1", residual_scale=0.2))
    told, done = explain_merge(read_merge_config(path)), run(path)
    assert (told.num_bytes, told.num_parameters, told.num_tensors) == (
        done.num_bytes, done.num_parameters, done.num_tensors,
    )  # fmt: skip
    report = describe(open_checkpoint(done.folder))
    assert (told.active_parameters, told.family, told.num_experts) == (report.active_parameters, "qwen2_moe", 3)
    assert (len(told.experts), told.equal_gates) == (4, ())
    assert main(["plan", str(path)]) == 0
    said = capsys.readouterr().out
    assert "a qwen2_moe of qwen2 models" in said
    assert f"the shared expert: {tmp_path / 'e1'}" in said
    assert main(["plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_experts"] == 3
