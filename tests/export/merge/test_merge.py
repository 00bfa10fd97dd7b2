"""Merging: tensors byte for byte against the safetensors library, configuration and warnings."""

from __future__ import annotations

import json
import logging

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import Dimensions, write_phi_checkpoint
from merging import run, write_five_experts, write_yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.merge import merge as merge_module
from export.merge.config import read_merge_config
from export.merge.merge import merge

CONFIG_KEYS = {  # of mlabonne/phixtral-4x2_8's config.json, auto_map aside, and the token ids beside them
    "activation_function", "architectures", "attn_pdrop", "bos_token_id", "embd_pdrop", "eos_token_id", "flash_attn",
    "flash_rotary", "fused_dense", "img_processor", "initializer_range", "layer_norm_epsilon", "model_type", "n_embd",
    "n_head", "n_head_kv", "n_inner", "n_layer", "n_positions", "num_experts_per_tok", "num_local_experts",
    "resid_pdrop", "rotary_dim", "tie_word_embeddings", "torch_dtype", "vocab_size",
}  # fmt: skip


@pytest.fixture
def five(tmp_path):
    """The YAML of a merge of five experts."""
    return write_five_experts(tmp_path)


def phi_msft_tensors(folder, seed, **dims):
    """The tensors of the checkpoint made with `seed`, in phi-msft spelling, by the safetensors library."""
    return load_file(write_phi_checkpoint(folder, seed=seed, spelling="phi-msft", **dims) / "model.safetensors")


def test_every_merged_tensor_is_byte_for_byte_an_experts_or_the_bases(five, tmp_path):
    result = run(five)
    merged = load_file(result.folder / "model.safetensors")
    dense = [phi_msft_tensors(tmp_path / f"again{seed}", seed) for seed in range(5)]
    expected = {name: values for name, values in dense[0].items() if ".mlp." not in name}
    for layer in range(3):
        for expert in range(5):
            for module in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                name = f"transformer.h.{layer}.moe.mlp.{expert}.{module}"
                expected[name] = dense[expert][f"transformer.h.{layer}.mlp.{module}"]
    gates = {f"transformer.h.{layer}.moe.gate.weight" for layer in range(3)}
    assert set(merged) == set(expected) | gates
    for name, values in expected.items():
        assert merged[name].tobytes() == values.tobytes(), name
        assert merged[name].shape == values.shape, name
    assert all(merged[name].shape == (5, 40) for name in gates)


def test_phi_2_gives_phixtrals_count_of_tensors_and_parameters():
    from export.architecture import Architecture
    from export.merge.outputs import OUTPUTS

    phixtral = Architecture(
        family="phixtral", hidden_size=2560, num_layers=32, num_heads=32, num_kv_heads=32, head_size=80,
        ffn_size=10240, vocab_size=51200, num_experts=4, experts_per_token=2, rotary_dim=32, rope_base=10000.0,
        norm_epsilon=1e-5, max_positions=2048, bos_token_id=None, eos_token_ids=(), source_dtype=None,
    )  # fmt: skip
    tensors = OUTPUTS[0].tensors(phixtral, "F16")
    assert len(tensors) == 741
    assert sum(np.prod(tensor.planned.shape) for tensor in tensors) == pytest.approx(7.81e9, rel=1e-3)


def test_config_json_has_the_published_keys_and_the_models_values(five):
    result = run(five)
    config = json.loads((result.folder / "config.json").read_text())
    assert set(config) == CONFIG_KEYS
    sizes = Dimensions()
    expected = {
        "model_type": "phi-msft", "architectures": ["PhiForCausalLM"], "activation_function": "gelu_new",
        "num_local_experts": 5, "num_experts_per_tok": 2, "n_embd": sizes.hidden_size, "n_head": sizes.num_heads,
        "n_head_kv": None, "n_inner": sizes.ffn_size, "n_layer": sizes.num_layers, "n_positions": sizes.max_positions,
        "rotary_dim": sizes.rotary_dim, "vocab_size": sizes.vocab_size, "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 256, "eos_token_id": 256,
        "img_processor": None,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected


def test_n_inner_is_null_when_the_expert_width_is_four_times_the_hidden_size(tmp_path):
    for index in range(2):
        write_phi_checkpoint(tmp_path / f"e{index}", seed=index, ffn_size=160)
    config = json.loads((run(write_yaml(tmp_path)).folder / "config.json").read_text())
    assert config["n_inner"] is None


def test_our_own_reader_understands_the_merged_checkpoint(five):
    model = read_model(open_checkpoint(run(five).folder))
    facts = model.architecture
    assert (facts.family, facts.num_experts, facts.experts_per_token, facts.ffn_size) == ("phixtral", 5, 2, 56)
    assert facts.rotary_dim == 4
    assert facts.eos_token_ids == (256,)


def test_merging_one_model_five_times_keeps_its_mlp_in_every_expert(tmp_path, caplog):
    write_phi_checkpoint(tmp_path / "e0", seed=0)
    experts = [{"source_model": "e0", "positive_prompts": [f"{i}"]} for i in range(5)]
    model = read_model(open_checkpoint(run(write_yaml(tmp_path, experts=experts)).folder))
    dense = phi_msft_tensors(tmp_path / "again", 0)
    stack = model.weights.load("transformer.h.1.moe.mlp.fc1.weight")
    assert stack.shape == (5, 56, 40)
    for expert in range(5):
        np.testing.assert_array_equal(stack[expert], dense["transformer.h.1.mlp.fc1.weight"])
    assert "5 of the 5 experts are the same model" in caplog.text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_asked_dtype_is_written_with_rounding_to_nearest(five, dtype):
    path = write_yaml(five.parent, 5, dtype=dtype)
    result = run(path)
    source = load_file(five.parent / "e3" / "model.safetensors")["transformer.h.2.mlp.fc2.weight"]
    with safe_open(result.folder / "model.safetensors", framework="pt") as file:
        merged = file.get_tensor("transformer.h.2.moe.mlp.3.fc2.weight")
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {f"torch.{dtype}"}  # noqa: SIM118
    assert torch.equal(merged, torch.from_numpy(source).to(getattr(torch, dtype)))
    assert json.loads((result.folder / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_is_the_bases_when_none_is_asked(tmp_path, dtype):
    for index in range(2):
        write_phi_checkpoint(tmp_path / f"e{index}", seed=index, dtype=dtype)
    assert run(write_yaml(tmp_path)).dtype == {"float16": "F16", "bfloat16": "BF16"}[dtype]


def test_shards_hold_the_same_tensors_as_one_file(five):
    whole = load_file(run(five).folder / "model.safetensors")
    split = merge(read_merge_config(five), five.parent / "split", max_shard_bytes=60_000)
    assert len(split.shards) > 3
    assert all(sum(v.nbytes for v in load_file(path).values()) <= 60_000 for path in split.shards)
    together = {name: values for path in split.shards for name, values in load_file(path).items()}
    assert set(together) == set(whole)
    assert all(together[name].tobytes() == whole[name].tobytes() for name in whole)
    assert set(open_checkpoint(split.folder).tensors) == set(whole)


def test_the_tokenizer_and_the_yaml_travel_along(five):
    folder = run(five).folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (five.parent / "e0" / name).read_bytes()
    assert (folder / "mergekit_moe_config.yml").read_text() == five.read_text()


def test_the_same_merge_twice_gives_the_same_bytes(five):
    path = write_yaml(five.parent, 5, gate_mode="random")
    config = read_merge_config(path)
    first = merge(config, path.parent / "a", seed=4).shards[0].read_bytes()
    assert merge(config, path.parent / "b", seed=4).shards[0].read_bytes() == first
    assert merge(config, path.parent / "c", seed=5).shards[0].read_bytes() != first


def test_residual_scale_scales_what_leaves_the_expert_and_nothing_else(five):
    experts = [{"source_model": f"e{i}", "positive_prompts": [str(i)]} for i in range(2)]
    experts[1]["residual_scale"] = -0.5
    merged = load_file(run(write_yaml(five.parent, experts=experts)).folder / "model.safetensors")
    source = load_file(five.parent / "e1" / "model.safetensors")
    for kind in ("weight", "bias"):
        merged_fc2 = merged[f"transformer.h.0.moe.mlp.1.fc2.{kind}"]
        np.testing.assert_array_equal(merged_fc2, source[f"transformer.h.0.mlp.fc2.{kind}"] * np.float32(-0.5))
        merged_fc1 = merged[f"transformer.h.0.moe.mlp.1.fc1.{kind}"]
        np.testing.assert_array_equal(merged_fc1, source[f"transformer.h.0.mlp.fc1.{kind}"])


def test_noise_has_the_asked_deviation_differs_between_tensors_and_is_scaled_with_the_residual(five):
    experts = [{"source_model": f"e{i}", "positive_prompts": [str(i)]} for i in range(2)]
    experts[1] |= {"noise_scale": 0.25, "residual_scale": 2.0}
    merged = load_file(run(write_yaml(five.parent, experts=experts)).folder / "model.safetensors")
    source = load_file(five.parent / "e1" / "model.safetensors")

    def noise(layer, module, scale):
        name = f"transformer.h.{layer}.moe.mlp.1.{module}.weight"
        return merged[name] / np.float32(scale) - source[f"transformer.h.{layer}.mlp.{module}.weight"]

    assert noise(0, "fc1", 1).std() == pytest.approx(0.25, rel=0.05)
    assert noise(0, "fc2", 2).std() == pytest.approx(0.25, rel=0.05)
    assert abs(np.corrcoef(noise(0, "fc1", 1).ravel(), noise(1, "fc1", 1).ravel())[0, 1]) < 0.1
    untouched = merged["transformer.h.0.moe.mlp.0.fc1.weight"]
    e0 = load_file(five.parent / "e0" / "model.safetensors")
    np.testing.assert_array_equal(untouched, e0["model.layers.0.mlp.fc1.weight"])


def test_phixtrals_own_empty_prompts_are_accepted_and_warn_of_the_dead_experts(five, caplog):
    experts = [{"source_model": f"e{i}", "positive_prompts": [""]} for i in range(4)]
    result = run(write_yaml(five.parent, experts=experts))
    assert result.routing.never_chosen == (2, 3)
    assert "the gate rows of experts 0, 1, 2 and 3 are equal in all 3 layers" in caplog.text
    assert "with 2 experts per token experts 2 and 3 can never be chosen" in caplog.text
    assert "expert(s) 0, 1, 2, 3 have only empty prompts" in caplog.text
    gate = load_file(result.folder / "model.safetensors")["transformer.h.1.moe.gate.weight"]
    assert (gate == gate[0]).all()


def test_rows_that_rounding_makes_equal_are_found(five, caplog, monkeypatch):
    gate = np.ones((5, 40), dtype=np.float32) + np.arange(5, dtype=np.float32)[:, None] * np.float32(1e-5)
    monkeypatch.setattr(merge_module, "gate_matrices", lambda *_, **__: dict.fromkeys(range(3), gate))
    assert run(write_yaml(five.parent, 5, dtype="float16")).routing.never_chosen == (2, 3, 4)


def test_training_lost_outside_the_mlps_is_told_with_its_measure(tmp_path, caplog):
    write_phi_checkpoint(tmp_path / "e0", seed=0)
    for name in ("e1", "e2"):
        write_phi_checkpoint(tmp_path / name, seed=0, spelling="phi-msft")
    tensors = load_file(tmp_path / "e2" / "model.safetensors")
    tensors["transformer.h.1.mixer.Wqkv.weight"] *= np.float32(1.25)
    save_file(tensors, tmp_path / "e2" / "model.safetensors")
    run(write_yaml(tmp_path, 3))
    (record,) = [r for r in caplog.records if "outside its MLPs" in r.getMessage()]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        f"expert 2 ({tmp_path / 'e2'}) differs from the base outside its MLPs in 1 of"
    )
    assert "most in transformer.h.1.mixer.Wqkv.weight by 0.25 of its size" in record.getMessage()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_to_another_dtype_is_not_called_lost_training(tmp_path, caplog, dtype):
    write_phi_checkpoint(tmp_path / "e0", seed=0)
    write_phi_checkpoint(tmp_path / "e1", seed=0, dtype=dtype)
    run(write_yaml(tmp_path))
    assert "outside its MLPs" not in caplog.text


def test_experts_with_gates_of_bfloat16_are_diagnosed(five):
    result = run(write_yaml(five.parent, 5, dtype="bfloat16", gate_mode="uniform_random"))
    gate = open_checkpoint(result.folder).read("transformer.h.0.moe.gate.weight")
    assert gate.dtype == ml_dtypes.bfloat16
    assert result.routing.layers[0].condition_number == pytest.approx(np.linalg.cond(gate.astype(np.float64)))
