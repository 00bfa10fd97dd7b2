"""Merges of Mistrals and Llamas into a Mixtral: what it computes, what each expert loses, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters import write_adapter
from dense_checkpoints import write_dense_checkpoint
from merging import leftovers, run, write_yaml
from safetensors.numpy import load_file, save_file
from transformers import MistralForCausalLM, MixtralForCausalLM

from cli.main import main
from export.errors import MergeError
from export.merge.config import read_merge_config
from export.merge.merge import merge

TOKENS = np.random.default_rng(3).integers(0, 365, 60).tolist()


def write_experts(folder, number=2, family="mistral", **sizes):
    for index in range(number):
        write_dense_checkpoint(folder / f"e{index}", seed=index, family=family, **sizes)
    return write_yaml(folder, number)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENS])).logits


def test_a_mixture_of_one_model_computes_what_the_model_computes(tmp_path):
    write_experts(tmp_path)
    experts = [{"source_model": "e0", "positive_prompts": [word]} for word in ("fox", "def", "words")]
    result = run(write_yaml(tmp_path, experts=experts, gate_mode="hidden"))
    mixture = MixtralForCausalLM.from_pretrained(result.folder, experts_implementation="eager")
    dense = MistralForCausalLM.from_pretrained(tmp_path / "e0")
    torch.testing.assert_close(logits(mixture), logits(dense), rtol=1e-4, atol=1e-4)


def test_experts_of_another_vocabulary_give_their_mlps_alone(tmp_path, caplog):
    path = write_experts(tmp_path)
    write_dense_checkpoint(tmp_path / "e1", seed=1, vocab_size=400, config={"rope_theta": 1e6})
    merged = load_file(run(path).folder / "model.safetensors")
    expert, base = (load_file(tmp_path / name / "model.safetensors") for name in ("e1", "e0"))
    name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    assert merged[name].tobytes() == expert["model.layers.1.mlp.up_proj.weight"].tobytes()
    assert merged["model.embed_tokens.weight"].tobytes() == base["model.embed_tokens.weight"].tobytes()
    assert (
        f"expert 1 ({tmp_path / 'e1'}) has vocab_size 400 for 371, rope_base 1000000.0 for 10000.0 of the base: the "
        "mixture has the base's"
    ) in caplog.messages


def test_experts_of_float64_are_merged_as_float32(tmp_path):
    write_experts(tmp_path)
    path = write_yaml(tmp_path, dtype="float32")
    write_adapter(tmp_path / "adapter", tmp_path / "e1", seed=3)
    plain = load_file(run(path).folder / "model.safetensors")
    for name in ("e0", "e1"):
        narrow = load_file(tmp_path / name / "model.safetensors")
        wide = {key: values.astype(np.float64) for key, values in narrow.items()}
        save_file(wide, tmp_path / name / "model.safetensors")
    found = load_file(merge(read_merge_config(path), tmp_path / "wide").folder / "model.safetensors")
    assert {name: values.tobytes() for name, values in found.items()} == {k: v.tobytes() for k, v in plain.items()}
    experts = [
        {"source_model": "e0", "positive_prompts": ["fox"], "residual_scale": 0.5},
        {"source_model": "e1+adapter", "positive_prompts": ["def"], "noise_scale": 0.1},
    ]
    path = write_yaml(tmp_path, experts=experts, dtype="float32")
    scaled = load_file(merge(read_merge_config(path), tmp_path / "scaled").folder / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    np.testing.assert_array_equal(scaled[name], plain[name] * np.float32(0.5))


def test_a_window_of_the_base_is_told_as_lost(tmp_path, caplog):
    run(write_experts(tmp_path, config={"sliding_window": 9}))
    assert "the base attends to the last 9 positions, a mixtral to all of them" in caplog.text


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 96}, "has hidden_size 96, the base 80"),
        ({"ffn_size": 48}, "has ffn_size 48, the base 56"),
        ({"num_layers": 3}, "has num_layers 3, the base 2"),
        ({"num_kv_heads": 3}, "has num_kv_heads 3, the base 2"),
        ({"head_dim": 32}, "has head_size 32, the base 16"),
    ],
)
def test_an_expert_of_other_dimensions_is_refused(tmp_path, sizes, message):
    path = write_experts(tmp_path)
    write_dense_checkpoint(tmp_path / "e1", seed=1, **sizes)
    with pytest.raises(MergeError) as caught:
        run(path)
    assert f"expert 1 ({tmp_path / 'e1'}) {message}" in str(caught.value)
    assert leftovers(tmp_path) == []


def test_a_llama_among_mistrals_is_refused_as_mergekit_refuses_it(tmp_path):
    path = write_experts(tmp_path)
    write_dense_checkpoint(tmp_path / "e1", seed=1, family="llama")
    with pytest.raises(MergeError) as caught:
        run(path)
    assert (
        f"expert 1 ({tmp_path / 'e1'}) is of family llama, the base of mistral; a mixtral is merged from models of one "
        "family"
    ) in str(caught.value)


def test_an_architecture_that_is_not_made_of_the_base_is_refused(tmp_path):
    write_experts(tmp_path)
    with pytest.raises(MergeError, match="architecture is phixtral, and the base is of family mistral, from which moe"):
        run(write_yaml(tmp_path, architecture="phixtral"))
    assert run(write_yaml(tmp_path, architecture="Mixtral")).architecture.family == "mixtral"


def test_the_command_names_the_mixture(tmp_path, capsys):
    path = write_experts(tmp_path, 3, "llama", num_heads=4)
    assert main(["merge", str(path), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: mixtral of 3 experts, 2 per token, 2 layers")
