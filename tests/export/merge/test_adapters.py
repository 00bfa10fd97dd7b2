"""LoRA adapters as experts: what is merged, what is refused by its text, and what stays as it was."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from adapters import write_adapter
from checkpoints import write_phi_checkpoint
from dense_checkpoints import write_dense_checkpoint
from merging import leftovers, run, write_yaml
from safetensors.numpy import load_file, save_file

from cli.main import main
from export.checkpoint.folder import open_checkpoint
from export.errors import ConfigError, MergeError
from export.merge import merge as merge_module
from export.merge.adapters import open_adapter, with_adapter


@pytest.fixture
def base(tmp_path):
    return write_dense_checkpoint(tmp_path / "e0", seed=0)


def edit(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def yaml_of(folder, **keys):
    write_dense_checkpoint(folder / "e1", seed=1)
    experts = [
        {"source_model": "./e0+./adapter", "positive_prompts": ["the fox"]},
        {"source_model": "./e1", "positive_prompts": ["def main"]},
    ]
    return write_yaml(folder, experts=experts, **keys)


def test_the_expert_is_the_base_with_the_adapter_in_float64_up_to_rounding(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base, seed=3, rank=4, lora_alpha=6)
    result = run(yaml_of(tmp_path))
    merged, plain = load_file(result.folder / "model.safetensors"), load_file(base / "model.safetensors")
    low = {name: values.astype(np.float64) for name, values in load_file(adapter / "adapter_model.safetensors").items()}
    for layer in range(2):
        for matrix, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            module = f"model.layers.{layer}.mlp.{theirs}"
            found = merged[f"model.layers.{layer}.block_sparse_moe.experts.0.{matrix}.weight"]
            expected = plain[f"{module}.weight"].astype(np.float64)
            if matrix != "w3":  # the adapter leaves it as it is
                stem = f"base_model.model.{module}.lora_"
                expected = expected + 6 / 4 * (low[f"{stem}B.weight"] @ low[f"{stem}A.weight"])
            np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert merged[name].tobytes() == plain[name].tobytes()


def test_a_base_with_an_adapter_has_it_in_attention_too(tmp_path, base):
    write_adapter(tmp_path / "adapter", base, seed=3)
    result = run(yaml_of(tmp_path, base_model="./e0+./adapter", gate_mode="hidden"))
    adapted = with_adapter(open_checkpoint(base), open_adapter(str(tmp_path / "adapter")))
    name = "model.layers.1.self_attn.q_proj.weight"
    merged = load_file(result.folder / "model.safetensors")[name]
    assert merged.tobytes() == adapted.read(name).tobytes()
    assert np.abs(merged - load_file(base / "model.safetensors")[name]).max() > 0.1


def test_rows_are_merged_as_the_whole_is(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base, seed=3)
    adapted = with_adapter(open_checkpoint(base), open_adapter(str(adapter)))
    name = "model.layers.0.mlp.down_proj.weight"
    whole = adapted.read(name)
    pieces = np.concatenate([adapted.read(name, slice(first, first + 7)) for first in range(0, 80, 7)])
    np.testing.assert_allclose(pieces, whole, atol=1e-6)
    assert adapted.identity == f"{base}+{adapter}"


def test_what_the_adapter_learned_in_attention_is_told_as_lost(tmp_path, base, caplog):
    write_adapter(tmp_path / "adapter", base, seed=3)
    run(yaml_of(tmp_path))
    said = [text for text in caplog.messages if text.startswith(f"expert 0 ({base}+{tmp_path / 'adapter'}) differs")]
    assert len(said) == 1
    assert "in 2 of 11 sampled tensors, most in model.layers." in said[0]


def test_another_base_that_fits_is_named_in_a_warning(tmp_path, base, caplog):
    adapter = write_adapter(tmp_path / "adapter", base, seed=3, base_model_name_or_path="mistralai/Mistral-7B-v0.1")
    with caplog.at_level(logging.WARNING):
        with_adapter(open_checkpoint(base), open_adapter(str(adapter)))
    assert caplog.messages == [
        f"the adapter {adapter} fits {base} by its shapes, but its settings name the base 'mistralai/Mistral-7B-v0.1'"
    ]


def test_an_adapter_for_another_base_is_refused(tmp_path, base):
    other = write_dense_checkpoint(tmp_path / "other", seed=1, ffn_size=64)
    write_adapter(tmp_path / "adapter", other, seed=3, base_model_name_or_path="owner/other")
    with pytest.raises(MergeError) as caught:
        run(yaml_of(tmp_path))
    assert str(caught.value).startswith(
        f"merging the adapter {tmp_path / 'adapter'} into {base}: it was made for another base (its settings name "
        "'owner/other'):\n  - model.layers.0.mlp.down_proj is [80, 56] in the base, the adapter is for [80, 64]"
    )
    assert leftovers(tmp_path) == []


def test_an_adapter_of_another_family_is_refused(tmp_path, base):
    phi = write_phi_checkpoint(tmp_path / "phi", seed=1)
    write_adapter(tmp_path / "adapter", phi, seed=3, modules=("mlp.fc1",))
    with pytest.raises(MergeError, match=r"another base .*\n  - model.layers.0.mlp.fc1 is not a module of the base"):
        run(yaml_of(tmp_path))


def test_an_adapter_of_a_phi_2_is_merged_into_a_phixtral(tmp_path):
    for index in range(2):
        write_phi_checkpoint(tmp_path / f"e{index}", seed=index)
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "e0", seed=3, modules=("mlp.fc1",))
    experts = [{"source_model": s, "positive_prompts": [s]} for s in ("e0+adapter", "e1")]
    merged = load_file(run(write_yaml(tmp_path, experts=experts)).folder / "model.safetensors")
    adapted = with_adapter(open_checkpoint(tmp_path / "e0"), open_adapter(str(adapter)))
    expected = adapted.read("model.layers.1.mlp.fc1.weight")
    assert merged["transformer.h.1.moe.mlp.0.fc1.weight"].tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"use_dora": True}, "use_dora is True: a DoRA's magnitudes are not merged"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']: the adapter replaces whole modules"),
        ({"bias": "all"}, "bias is 'all': the adapter changes the base's biases"),
        ({"lora_bias": True}, "lora_bias is True: the adapter has biases of its own"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16': the adapter is for a base"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is [1]: the adapter replaces rows"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is [[0, 1]]: the adapted model has more layers"),
        ({"use_other": 3}, "use_other is 3"),
        ({"r": 5}, "model.layers.0.mlp.down_proj has r 5 in the settings, its matrices are [80, 4] and [4, 56]"),
        ({"rank_pattern": {"q_proj": 9}}, "self_attn.q_proj has r 9 in the settings"),
        ({"lora_alpha": None}, "has lora_alpha None, expected a number"),
        ({"alpha_pattern": {"(a+)+": 1}}, "the pattern '(a+)+' of alpha_pattern is not the name of a module"),
    ],
)
def test_settings_that_are_not_merged_are_refused_by_name(tmp_path, base, settings, message):
    adapter = write_adapter(tmp_path / "adapter", base, seed=3)
    edit(adapter, **settings)
    with pytest.raises(ConfigError) as caught:
        open_adapter(str(adapter))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"base_model.model.x.weight": np.ones((3, 3), np.float32)}), "x.weight: expected matrices"),
        (lambda t: t.pop("base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"), "down_proj has lora_B alone"),
        (lambda t: t.clear(), "it holds no tensors"),
    ],
)  # fmt: skip
def test_tensors_that_are_no_pairs_are_refused(tmp_path, base, change, message):
    adapter = write_adapter(tmp_path / "adapter", base, seed=3)
    edit_tensors(adapter, change)
    with pytest.raises(ConfigError) as caught:
        open_adapter(str(adapter))
    assert message in str(caught.value)


def test_files_that_are_missing_are_named(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base, seed=3)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"no adapter_model.safetensors; only pickled weights are there"):
        open_adapter(str(adapter))
    with pytest.raises(ConfigError, match=r"no adapter_config.json; PEFT's save_pretrained writes it"):
        open_adapter(str(base))


def test_the_command_refuses_an_adapter_in_one_line_and_writes_nothing(tmp_path, base, capsys):
    write_adapter(tmp_path / "adapter", base, seed=3, use_dora=True)
    assert main(["merge", str(yaml_of(tmp_path)), str(tmp_path / "out")]) == 2
    assert "use_dora is True" in capsys.readouterr().err
    assert leftovers(tmp_path) == []


def test_an_adapter_that_changes_while_it_is_read_leaves_nothing(tmp_path, base, monkeypatch):
    adapter, write_sharded = write_adapter(tmp_path / "adapter", base, seed=3), merge_module.write_sharded

    def rewriting(*arguments, **options):
        write_sharded(*arguments, **options)
        edit_tensors(adapter, lambda tensors: tensors.update({k: v * 2 for k, v in tensors.items()}))

    monkeypatch.setattr(merge_module, "write_sharded", rewriting)
    with pytest.raises(Exception, match=r"adapter_model.safetensors changed while it was read"):
        run(yaml_of(tmp_path))
    assert leftovers(tmp_path) == []
