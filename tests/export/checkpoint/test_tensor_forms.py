"""The forms in which transformers reads a checkpoint's tensors: from_pretrained of the same folder gives our logits."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from dense_checkpoints import write_dense_checkpoint
from flex_olmo_checkpoints import write_flex_olmo_checkpoint
from gpt_oss_checkpoints import write_gpt_oss_checkpoint
from granitemoe_checkpoints import write_granitemoe_checkpoint
from mixtral_checkpoints import DTYPES, write_mixtral_checkpoint
from olmoe_checkpoints import write_olmoe_checkpoint
from phimoe_checkpoints import write_phimoe_checkpoint
from qwen_checkpoints import write_qwen_checkpoint
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from export.checkpoint.folder import open_checkpoint
from export.errors import CheckpointError
from export.families import read_model
from export.reference.model import Reference

TOKENS = np.random.default_rng(3).integers(0, 256, 40).tolist()
WRITERS = {
    "phi": lambda folder, **more: write_phi_checkpoint(folder, seed=1, num_layers=2, **more),
    "mixtral": lambda folder, **more: write_mixtral_checkpoint(folder, seed=1, num_experts=3, **more),
    "packed mixtral": lambda folder, **more: write_mixtral_checkpoint(folder, seed=1, spelling="packed", **more),
    "granitemoe": lambda folder, **more: write_granitemoe_checkpoint(folder, seed=1, **more),
    "olmoe": lambda folder, **more: write_olmoe_checkpoint(folder, seed=1, **more),
    "flex_olmo": lambda folder, **more: write_flex_olmo_checkpoint(folder, seed=1, **more),
    "gpt_oss": lambda folder, **more: write_gpt_oss_checkpoint(folder, seed=1, **more),
    "phimoe": lambda folder, **more: write_phimoe_checkpoint(folder, seed=1, **more),
    "qwen3_moe": lambda folder, **more: write_qwen_checkpoint(folder, "qwen3_moe", seed=1, **more),
    "qwen2_moe": lambda folder, **more: write_qwen_checkpoint(folder, "qwen2_moe", seed=1, **more),
    "mistral": lambda folder, **more: write_dense_checkpoint(folder, seed=1, **more),
    "qwen2": lambda folder, **more: write_dense_checkpoint(folder, seed=1, family="qwen2", **more),
    "qwen3": lambda folder, **more: write_dense_checkpoint(folder, seed=1, family="qwen3", **more),
}
FILE = "model.safetensors"


def phixtral(folder):
    return write_phixtral_checkpoint(folder, seed=1, num_experts=3, experts_per_token=2, num_layers=2)


def ours(folder):
    return next(Reference(read_model(open_checkpoint(folder))).run([TOKENS]))[0]


def theirs(folder):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENS])).logits[0].numpy()


def expect_theirs(folder, before=None):
    found = ours(folder)
    expected = theirs(folder)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    if before is not None:
        assert np.array_equal(found, before)


def edit(folder, change, file=FILE):
    tensors = load_file(folder / file)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, folder / file)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        read_model(open_checkpoint(folder))
    return str(caught.value)


def without_prefix(tensors):
    return {name.removeprefix("model."): values for name, values in tensors.items()}


def with_prefix(tensors):
    return {name if name.startswith("model.") else f"model.{name}": values for name, values in tensors.items()}


@pytest.mark.parametrize("spell", [without_prefix, with_prefix])
@pytest.mark.parametrize("family", WRITERS)
def test_names_without_the_base_models_prefix_or_with_it_before_the_head(tmp_path, family, spell):
    folder = WRITERS[family](tmp_path / "c")
    before = ours(folder)
    edit(folder, spell)
    expect_theirs(folder, before)


def test_a_phixtrals_base_model_is_its_transformer(tmp_path):
    folder = phixtral(tmp_path / "c")
    before = ours(folder)
    edit(folder, lambda tensors: {name.removeprefix("transformer."): values for name, values in tensors.items()})
    assert np.array_equal(ours(folder), before)


def test_a_name_in_both_spellings_is_refused(tmp_path):
    folder = WRITERS["mixtral"](tmp_path / "c")
    edit(folder, lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"] + 1}))
    assert "norm.weight [80] is not a tensor of this family" in refusal(folder)


@pytest.mark.parametrize("family", WRITERS)
def test_float64_is_rounded_as_transformers_rounds_it(tmp_path, family):
    folder = WRITERS[family](tmp_path / "c")
    before = ours(folder)
    noise = np.random.default_rng(1)
    edit(folder, lambda tensors: {
        name: values * (1 + 1e-9 * noise.standard_normal(values.shape)) for name, values in tensors.items()
    })  # fmt: skip
    assert load_file(folder / FILE)["lm_head.weight"].dtype == np.float64
    expect_theirs(folder)
    assert np.abs(ours(folder) - before).max() < 1e-3


def test_a_float64_beyond_float32_is_refused_when_it_is_read(tmp_path):
    folder = WRITERS["mixtral"](tmp_path / "c")

    def grow(tensors):
        wide = tensors["model.norm.weight"].astype(np.float64)
        wide[3] = 1e300
        tensors["model.norm.weight"] = wide

    edit(folder, grow)
    with pytest.raises(CheckpointError, match=r"model.norm.weight from .*: 1 of 80 values are NaN or infinite"):
        ours(folder)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_tensors_of_several_dtypes_in_one_file(tmp_path, stored):
    folder = WRITERS["mixtral"](tmp_path / "c")
    edit(folder, lambda tensors: {
        name: values if ".gate." in name or "norm" in name else values.astype(DTYPES[stored])
        for name, values in tensors.items()
    })  # fmt: skip
    expect_theirs(folder)


BUFFERS = [
    "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq",
    "model.layers.1.self_attn.rotary_emb.cos_cached", "model.layers.1.self_attn.rotary_emb._sin_cached",
    "model.layers.0.self_attn.rotary_emb._cos_k_cached", "rotary_emb.inv_freq", "model.rotary_emb.long_inv_freq",
]  # fmt: skip


@pytest.mark.parametrize("family", WRITERS)
def test_buffers_of_rotary_embeddings_are_computed_anew_whatever_they_hold(tmp_path, family):
    folder = WRITERS[family](tmp_path / "c")
    before = ours(folder)
    edit(folder, lambda tensors: tensors.update({name: np.full(8, 3.0, np.float32) for name in BUFFERS}))
    expect_theirs(folder, before)


def test_buffers_of_a_phixtrals_rotary_embedding(tmp_path):
    folder = phixtral(tmp_path / "c")
    before = ours(folder)
    names = ("inv_freq", "scale", "_cos_cached", "_sin_cached", "_cos_k_cached", "_sin_k_cached")
    edit(folder, lambda tensors: tensors.update(
        {f"transformer.h.0.mixer.rotary_emb.{name}": np.zeros(4, np.float32) for name in names}
    ))  # fmt: skip
    assert np.array_equal(ours(folder), before)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_a_weight_that_the_family_does_not_have_is_refused(tmp_path, name):
    folder = WRITERS["mixtral"](tmp_path / "c")
    edit(folder, lambda tensors: tensors.update({name: np.zeros(8, np.float32)}))
    assert f"{name} [8] is not a tensor of this family" in refusal(folder)


def in_shards(folder, twice=(), change=lambda values: values):
    """The tensors in two shards; those of `twice` are in both, changed in the second."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    names = sorted(tensors)
    parts = [set(names[: len(names) // 2]) | set(twice), set(names[len(names) // 2 :]) | set(twice)]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file(
            {name: change(tensors[name]) if number == 2 and name in twice else tensors[name] for name in part},
            folder / shard,
        )
        weight_map |= dict.fromkeys(sorted(part), shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


TWICE = ("lm_head.weight", "model.embed_tokens.weight")


def test_a_tensor_in_two_shards_is_read_if_both_are_equal(tmp_path):
    folder = WRITERS["mixtral"](tmp_path / "c")
    before = ours(folder)
    in_shards(folder, TWICE)
    expect_theirs(folder, before)


def test_tensors_that_an_index_does_not_name_are_read_from_its_shards(tmp_path, caplog):
    folder = WRITERS["mixtral"](tmp_path / "c")
    before = ours(folder)
    in_shards(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for name in TWICE:
        del weight_map[name]
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    expect_theirs(folder, before)
    assert (
        "model.safetensors.index.json does not name lm_head.weight, model.embed_tokens.weight, which its shards hold; "
        "they are read, as transformers reads them" in caplog.text
    )


@pytest.mark.parametrize(
    "change",
    [lambda values: values + 1, lambda values: values.astype(np.float16), lambda values: values[:-1]],
    ids=["values", "dtype", "shape"],
)
def test_a_tensor_that_differs_in_two_shards_is_refused(tmp_path, change):
    folder = WRITERS["mixtral"](tmp_path / "c")
    in_shards(folder, TWICE, change)
    text = refusal(folder)
    assert "lm_head.weight is in model-00001-of-00002.safetensors and, with other values, also in model-00002" in text


@pytest.mark.parametrize("kept", ["both", "equal", "embedding", "head"])
@pytest.mark.parametrize("family", WRITERS)
def test_tied_embeddings_follow_transformers_tie_weights(tmp_path, family, kept):
    """Both in the file: each is itself. One in the file: it serves for both."""
    folder = WRITERS[family](tmp_path / "c")
    edit_config(folder, tie_word_embeddings=True)

    def change(tensors):
        if kept == "equal":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        elif kept != "both":
            del tensors["lm_head.weight" if kept == "embedding" else "model.embed_tokens.weight"]

    edit(folder, change)
    expect_theirs(folder)
    assert read_model(open_checkpoint(folder)).architecture.tied_head is (kept in ("embedding", "head"))


@pytest.mark.parametrize("missing", ["lm_head.weight", "model.embed_tokens.weight"])
def test_without_tying_either_matrix_is_needed(tmp_path, missing):
    folder = WRITERS["mixtral"](tmp_path / "c")
    edit(folder, lambda tensors: {name: values for name, values in tensors.items() if name != missing})
    assert f"{missing} is missing, expected [371, 80] [V H]" in refusal(folder)


STRAYS = {
    "consolidated.safetensors": 1, "consolidated.00.safetensors": 1, "adapter_model.safetensors": 1,
    "lora.safetensors": 1,
    "model-00001-of-00001.safetensors": 1, "training_args.bin": 0, "optimizer.pt": 0, "scheduler.pt": 0,
    "rng_state.pth": 0, "pytorch_model.bin": 0, "trainer_state.json": 0, "tf_model.h5": 0, "flax_model.msgpack": 0,
}  # fmt: skip


@pytest.mark.parametrize("sharded", [False, True])
def test_files_beside_the_weights_that_transformers_does_not_read(tmp_path, sharded, caplog):
    folder = WRITERS["mixtral"](tmp_path / "c")
    before = ours(folder)
    if sharded:
        in_shards(folder)
    for name, is_tensors in STRAYS.items():
        if is_tensors:
            save_file({"model.norm.weight": np.zeros(80, np.float32)}, folder / name)
        else:
            (folder / name).write_bytes(b"\x80\x04N.")
    caplog.set_level(logging.WARNING)
    expect_theirs(folder, before)
    warnings = [record.getMessage() for record in caplog.records if "not part of the model" in record.getMessage()]
    assert warnings
    assert all(name in warnings[0] for name, is_tensors in STRAYS.items() if is_tensors)


def test_an_index_beside_a_whole_model_is_not_read(tmp_path):
    folder = WRITERS["mixtral"](tmp_path / "c")
    before = ours(folder)
    whole = load_file(folder / FILE)
    in_shards(folder, TWICE)
    edit(
        folder,
        lambda tensors: {name: values + 1 for name, values in tensors.items()},
        "model-00001-of-00002.safetensors",
    )
    save_file(whole, folder / FILE)
    expect_theirs(folder, before)
