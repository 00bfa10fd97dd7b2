"""Mixtral checkpoints read: both spellings, the published facts, and one error for what is not built."""

from __future__ import annotations

import json

import numpy as np
import pytest
from checkpoints import write_phi_checkpoint
from mixtral_checkpoints import SPELLINGS, MixtralSizes, published_config, write_mixtral_checkpoint
from safetensors.numpy import load_file, save_file

from export.checkpoint import tensor_table
from export.checkpoint.folder import open_checkpoint
from export.errors import CheckpointError, ConfigError, MergeError
from export.families import mixtral, read_model
from export.inspection import describe
from export.merge.config import read_merge_config
from export.merge.merge import merge

# config.json of mistralai/Mixtral-8x7B-v0.1.
PUBLISHED = MixtralSizes(
    hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_size=14336, vocab_size=32000, num_experts=8,
    experts_per_token=2, max_positions=32768, dtype="bfloat16",
)  # fmt: skip


@pytest.fixture(params=SPELLINGS)
def folder(request, tmp_path):
    return write_mixtral_checkpoint(tmp_path / "mixture", seed=4, spelling=request.param)


def read(folder):
    return read_model(open_checkpoint(folder))


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_the_published_configuration_gives_the_published_number_of_parameters():
    config = published_config(PUBLISHED)
    del config["head_dim"]  # as in the published file
    facts = mixtral.read_config(config)
    assert (facts.head_size, facts.rotary_dim, facts.rope_base, facts.norm_epsilon) == (128, 128, 1e6, 1e-5)
    assert (facts.sliding_window, facts.tied_head) == (None, False)
    specs = mixtral.FAMILY.tensors(facts, ())
    # The published index counts 93 405 585 408 bytes in bfloat16, in 995 tensors.
    assert 2 * sum(spec.num_elements for spec in specs) == 93_405_585_408
    assert sum(len(spec.parts) for spec in specs) == 995


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_both_spellings_are_the_same_model(tmp_path, dtype):
    published, packed = (
        read(write_mixtral_checkpoint(tmp_path / spelling, seed=4, spelling=spelling, dtype=dtype)).weights
        for spelling in SPELLINGS
    )
    assert set(published.table) == set(packed.table)
    for name in published.table:
        assert (published.load(name) == packed.load(name)).all()


def test_gate_and_up_rows_alternate_and_chunks_follow_the_expert_order(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_table, "CHUNK_ELEMENTS", 700)  # 4 rows of gate and 4 of up, at 80 columns
    outside = load_file(write_mixtral_checkpoint(tmp_path / "outside", seed=4) / "model.safetensors")
    weights, order = read(folder).weights, (3, 0, 4, 2, 1)
    expected = []
    for expert in order:
        stem = f"model.layers.1.block_sparse_moe.experts.{expert}"
        for gate, up in zip(outside[f"{stem}.w1.weight"], outside[f"{stem}.w3.weight"], strict=True):
            expected += [gate, up]
    chunks = list(weights.chunks("model.layers.1.mlp.experts.gate_up.weight", order))
    assert max(chunk.size for chunk in chunks) <= 700
    assert (np.concatenate(chunks) == np.stack(expected)).all()
    down = np.concatenate(list(weights.chunks("model.layers.1.mlp.experts.down.weight", order)))
    stacked = [outside[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"] for expert in order]
    assert (down == np.concatenate(stacked)).all()


def test_the_spellings_are_described_alike(tmp_path):
    reports = [
        describe(open_checkpoint(write_mixtral_checkpoint(tmp_path / spelling, seed=4, spelling=spelling))).to_json()
        for spelling in SPELLINGS
    ]
    assert [report.pop("num_tensors") for report in reports] == [3 + 2 * (7 + 3 * 5), 3 + 2 * 9]
    for report in reports:
        del report["location"], report["shard_bytes"]
    assert reports[0] == reports[1]
    # Experts 2 * 5 * 3 * 80 * 56; K = 2 of 5 are active.
    assert reports[0]["roles"]["expert"] == {"num_parameters": 134_400, "num_bytes": 537_600}
    assert reports[0]["total_parameters"] - reports[0]["active_parameters"] == 134_400 * 3 // 5


def test_a_tied_head_is_the_embedding_and_is_counted_once(tmp_path):
    tied = write_mixtral_checkpoint(tmp_path / "tied", seed=4, tied=True)
    weights = read(tied).weights
    assert (weights.load("lm_head.weight") == weights.load("model.embed_tokens.weight")).all()
    report = describe(open_checkpoint(tied))
    stored = load_file(tied / "model.safetensors")
    assert report.total_parameters == sum(values.size for values in stored.values())
    assert report.num_bytes == sum(values.nbytes for values in stored.values())


def test_equal_gate_rows_are_told(folder):
    def repeat(tensors):
        for name in tensors:
            if name.endswith("gate.weight"):
                tensors[name][3] = tensors[name][1]

    edit_tensors(folder, repeat)
    report = describe(open_checkpoint(folder))
    assert [layer.duplicate_groups for layer in report.routing.layers] == [((1, 3),), ((1, 3),)]
    assert "the gate rows of experts 1 and 3 are equal in all 2 layers" in report.to_json()["warnings"][0]


def test_rotary_base_and_key_heads_are_read_wherever_they_stand():
    config = published_config(PUBLISHED)
    del config["rope_theta"]
    assert mixtral.read_config(config).rope_base == 1e6
    nested = {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert mixtral.read_config(nested).rope_base == 5e5
    # What transformers' MixtralConfig makes of an absent and of a null number of key heads.
    assert mixtral.read_config({**config, "num_key_value_heads": None}).num_kv_heads == 32
    del config["num_key_value_heads"]
    assert mixtral.read_config(config).num_kv_heads == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; moeship builds only 'silu'"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6, expected 1 to num_local_experts = 5"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is null, and transformers has no default for it"),
        ({"num_local_experts": 0}, "num_local_experts is 0, expected a whole number of 1"),
        ({"num_key_value_heads": 4}, "6 query heads are not a multiple of 4 key/value heads"),
        ({"head_dim": None}, "hidden_size 80 is not a multiple of num_attention_heads 6"),
        ({"head_dim": 15}, "rotary dimension 15, expected an even number"),
        ({"sliding_window": 0}, "sliding_window is 0, expected a whole number of 1"),
        ({"sliding_window": "wide"}, "sliding_window is 'wide', expected a whole number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; moeship builds only False or True"),
        ({"attention_bias": True}, "attention_bias is True; moeship builds only False"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a positive"),
        (
            {"rope_parameters": {"rope_type": "dynamic"}},
            "rope_type is 'dynamic': its frequencies change with the length",
        ),
        (
            {"num_experts": 8},
            "num_experts is 8 and num_local_experts is 5, but transformers 5.24.0 takes both for one key",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is a key"),
        ({"intermediate_size": "absent"}, "intermediate_size is None, expected a whole number"),
        ({"max_position_embeddings": 1 << 21}, "max_position_embeddings is 2097152, expected a whole number"),
    ],
)
def test_a_configuration_that_is_not_built_is_refused_by_key(tmp_path, changes, message):
    folder = write_mixtral_checkpoint(tmp_path / "mixture", seed=4)
    edit_config(folder, **changes)
    with pytest.raises(ConfigError) as caught:
        read(folder)
    assert message in str(caught.value)


def test_packed_experts_of_another_width_are_refused_once_each(tmp_path):
    folder = write_mixtral_checkpoint(tmp_path / "mixture", seed=4, spelling="packed")
    edit_config(folder, intermediate_size=48)
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    lines = [line for line in str(caught.value).splitlines() if "layers.1" in line]
    assert len(lines) == 2
    assert "mlp.experts.gate_up_proj (model.safetensors): found [5, 112, 80], config.json says [5, 96, 80]" in lines[0]
    assert "[E 2F H]" in lines[0]


def test_a_checkpoint_of_two_spellings_is_refused(tmp_path):
    folder = write_mixtral_checkpoint(tmp_path / "mixture", seed=4, spelling="packed")

    def respell(tensors):
        tensors["model.layers.1.block_sparse_moe.gate.weight"] = tensors.pop("model.layers.1.mlp.gate.weight")

    edit_tensors(folder, respell)
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert "model.layers.1.mlp.gate.weight is missing, expected [5, 80] [E H]" in str(caught.value)
    assert "model.layers.1.block_sparse_moe.gate.weight [5, 80] is not a tensor of this family" in str(caught.value)


def test_a_value_that_is_no_number_is_found_inside_a_packed_tensor(tmp_path):
    folder = write_mixtral_checkpoint(tmp_path / "mixture", seed=4, spelling="packed")
    edit_tensors(
        folder, lambda tensors: tensors["model.layers.0.mlp.experts.gate_up_proj"].__setitem__((4, 90, 7), np.nan)
    )
    weights = read(folder).weights
    with pytest.raises(CheckpointError, match=r"gate_up_proj from .*: 1 of .* values are NaN or infinite"):
        weights.load("model.layers.0.mlp.experts.gate_up.weight")


def test_a_mixtral_as_a_merges_base_is_refused(tmp_path):
    write_mixtral_checkpoint(tmp_path / "mixture", seed=4)
    write_phi_checkpoint(tmp_path / "dense", seed=1)
    yaml = tmp_path / "merge.yml"
    text = "base_model: ./{}\ngate_mode: random\nexperts:\n  - source_model: ./dense\n  - source_model: ./dense\n"
    yaml.write_text(text.format("mixture"))
    with pytest.raises(
        MergeError, match=r"the base is of family mixtral; moeship merges dense models: phi into phixtral; mistral or"
    ):
        merge(read_merge_config(yaml), tmp_path / "out")
    assert not (tmp_path / "out").exists()
