"""Opening and reading checkpoints: values against the safetensors library, and one clear error for each damage."""

from __future__ import annotations

import json

import numpy as np
import pytest
from checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from safetensors.numpy import load_file, save_file

from export.checkpoint.file_table import INDEX_FILE
from export.checkpoint.folder import open_checkpoint
from export.errors import CheckpointError, ConfigError
from export.families import read_model
from export.tokenizer.loading import load_tokenizer


@pytest.fixture
def phixtral(tmp_path):
    return write_phixtral_checkpoint(tmp_path / "phixtral", seed=1, num_experts=3, experts_per_token=2)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def read(folder):
    return read_model(open_checkpoint(folder))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_and_row_slices_equal_those_of_the_safetensors_library(tmp_path, dtype):
    folder = write_phi_checkpoint(tmp_path / "phi", seed=3, dtype=dtype)
    checkpoint, outside = open_checkpoint(folder), load_file(folder / "model.safetensors")
    assert set(checkpoint.tensors) == set(outside)
    for name, expected in outside.items():
        assert (checkpoint.read_float32(name) == expected.astype(np.float32)).all()
        assert (checkpoint.read(name, slice(1, 3)) == expected[1:3]).all()


def test_both_spellings_are_the_same_model(tmp_path):
    ours = read(write_phi_checkpoint(tmp_path / "a", seed=4, spelling="phi-msft")).weights
    theirs = read(write_phi_checkpoint(tmp_path / "b", seed=4, spelling="transformers")).weights
    assert set(ours.table) == set(theirs.table)
    for name in ours.table:
        assert (ours.load(name) == theirs.load(name)).all()


def test_experts_are_stacked_in_their_order_and_chunks_follow_the_order_asked(phixtral):
    weights, outside = read(phixtral).weights, load_file(phixtral / "model.safetensors")
    name = "transformer.h.1.moe.mlp.fc1.weight"
    expected = [outside[f"transformer.h.1.moe.mlp.{e}.fc1.weight"] for e in range(3)]
    assert (weights.load(name) == np.stack(expected)).all()
    assert (
        np.concatenate(list(weights.chunks(name, (2, 0, 1)))) == np.concatenate([expected[e] for e in (2, 0, 1)])
    ).all()


def test_missing_extra_and_misshapen_tensors_are_all_listed_in_one_error(phixtral):
    def damage(tensors):
        del tensors["transformer.h.0.moe.mlp.2.fc2.bias"]
        tensors["transformer.h.9.ln.weight"] = np.zeros(4, np.float32)
        tensors["transformer.h.1.moe.gate.weight"] = np.zeros((3, 39), np.float32)

    edit_tensors(phixtral, damage)
    with pytest.raises(CheckpointError) as caught:
        read(phixtral)
    text = str(caught.value)
    assert "transformer.h.0.moe.mlp.2.fc2.bias is missing, expected [40]" in text
    assert "transformer.h.9.ln.weight [4] is not a tensor of this family" in text
    assert "transformer.h.1.moe.gate.weight (model.safetensors): found [3, 39], config.json says [3, 40] [E H]" in text


def test_integer_weights_are_refused(phixtral):
    edit_tensors(phixtral, lambda tensors: tensors.update({"lm_head.linear.bias": np.zeros(263, np.int32)}))
    with pytest.raises(CheckpointError, match=r"lm_head.linear.bias has dtype I32, expected one of F16, BF16, F32"):
        read(phixtral)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(phixtral, bad):
    def damage(tensors):
        tensors["transformer.h.0.ln.weight"][7] = bad

    edit_tensors(phixtral, damage)
    weights = read(phixtral).weights
    with pytest.raises(CheckpointError, match=r"transformer.h.0.ln.weight .*: 1 of 40 values are NaN or infinite"):
        weights.load("transformer.h.0.ln.weight")


def test_a_truncated_file_is_refused_when_it_is_opened(phixtral):
    path = phixtral / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"download it again, it is damaged:\n.* truncated"):
        open_checkpoint(phixtral)


def test_a_file_that_is_cut_while_it_is_open_is_refused_when_its_missing_bytes_are_read(phixtral):
    checkpoint, shard = open_checkpoint(phixtral), phixtral / "model.safetensors"
    last = max(checkpoint.tensors.values(), key=lambda stored: stored.offset)
    assert last.offset + last.num_bytes == shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(last.offset + 3)
    missing = last.num_bytes - 3
    with pytest.raises(CheckpointError, match=f"reading {last.name} from .*: the file ended {missing} bytes early"):
        checkpoint.read(last.name)


def test_a_file_cut_inside_its_header_is_refused(phixtral):
    path = phixtral / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"its header should take \d+ bytes, the file has 50; it is truncated"):
        open_checkpoint(phixtral)


def write_header(folder, header, num_bytes=64):
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))


@pytest.mark.parametrize("header", [[1], "abc", None])
def test_a_header_that_is_no_object_is_refused(phixtral, header):
    write_header(phixtral, header)
    with pytest.raises(CheckpointError, match=r"its header holds .+, expected an object; download it again"):
        open_checkpoint(phixtral)


@pytest.mark.parametrize(
    "entry",
    [
        5,
        {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
    ],
)
def test_a_malformed_header_entry_is_refused(phixtral, entry):
    write_header(phixtral, {"a": entry})
    with pytest.raises(CheckpointError, match="the header entry of a is malformed"):
        open_checkpoint(phixtral)


def test_tensors_that_overlap_are_refused(phixtral):
    entry = {"dtype": "F32", "shape": [4]}
    write_header(phixtral, {"a": {**entry, "data_offsets": [0, 16]}, "b": {**entry, "data_offsets": [8, 24]}})
    with pytest.raises(CheckpointError, match="a and b overlap"):
        open_checkpoint(phixtral)


def test_a_file_in_place_of_the_folder_is_told(phixtral):
    with pytest.raises(CheckpointError, match="it is a file of weights; name the folder of the checkpoint"):
        open_checkpoint(phixtral / "model.safetensors")


@pytest.mark.parametrize("key", ["rope_theta", "partial_rotary_factor"])
@pytest.mark.parametrize("value", ["10000", -5, "abc", float("inf")])
@pytest.mark.parametrize("nested", [True, False])
def test_rotary_facts_that_are_no_positive_numbers_are_refused(tmp_path, key, value, nested):
    folder = write_phi_checkpoint(tmp_path / "phi", seed=1)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    edit_config(
        folder, **({"rope_parameters": {**rope, key: value}} if nested else {"rope_parameters": "absent", key: value})
    )
    with pytest.raises(ConfigError, match=f"{key} is .*, expected a positive, finite number"):
        read(folder)


@pytest.mark.parametrize("key", ["rope_theta", "partial_rotary_factor"])
@pytest.mark.parametrize("nested", [True, False])
def test_rotary_facts_that_are_null_are_refused_as_transformers_does_not_take_its_defaults_for_them(
    tmp_path, key, nested
):
    folder = write_phi_checkpoint(tmp_path / "phi", seed=1)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    edit_config(
        folder, **({"rope_parameters": {**rope, key: None}} if nested else {"rope_parameters": "absent", key: None})
    )
    with pytest.raises(ConfigError, match=f"{key} is null, and transformers has no default for it"):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_local_experts": "5"}, "num_local_experts is '5', expected a whole number"),
        ({"n_positions": 10**13}, "n_positions is 10000000000000, expected a whole number of 1 to 1048576"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon is inf, expected a positive, finite number"),
        ({"eos_token_id": True}, "eos_token_id is True, expected a token id"),
    ],
)
def test_config_values_of_the_wrong_kind_are_refused(phixtral, changes, text):
    edit_config(phixtral, **changes)
    with pytest.raises((ConfigError, CheckpointError), match=text):
        read(phixtral)


def test_deeply_nested_json_is_refused(phixtral):
    (phixtral / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="config.json is not readable JSON"):
        open_checkpoint(phixtral)


def test_an_empty_vocabulary_is_refused(phixtral):
    path = phixtral / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"], tokenizer["added_tokens"] = {}, []
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="tokenizer.json has an empty vocabulary"):
        load_tokenizer(phixtral)


def test_an_index_that_names_an_absent_shard_is_refused(phixtral):
    weight_map = dict.fromkeys(load_file(phixtral / "model.safetensors"), "model-00001-of-00002.safetensors")
    (phixtral / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        CheckpointError, match=r"names shards that do not exist: \['model-00001-of-00002.safetensors'\]"
    ):
        open_checkpoint(phixtral)


def test_an_index_that_disagrees_with_its_shards_is_refused(phixtral):
    weight_map = dict.fromkeys(load_file(phixtral / "model.safetensors"), "model.safetensors")
    weight_map["ghost"] = "model.safetensors"
    (phixtral / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(phixtral)
    assert "the index puts ghost in model.safetensors, absent" in str(caught.value)


def test_an_index_may_not_point_outside_the_folder(phixtral):
    (phixtral / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(CheckpointError, match="names files outside the folder"):
        open_checkpoint(phixtral)


def test_pickled_weights_are_never_opened(phixtral):
    (phixtral / "model.safetensors").rename(phixtral / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model.bin\), which can execute code"):
        open_checkpoint(phixtral)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        CheckpointError, match="no such folder, and not a hub id like owner/name or owner/name@revision; check the path"
    ):
        open_checkpoint(tmp_path / "nowhere" / "deep")


def test_an_unknown_model_type_lists_what_exists(phixtral):
    edit_config(phixtral, model_type="mamba")
    with pytest.raises(
        ConfigError,
        match=r"model_type 'mamba' is not among those that moeship builds "
        r"\(flex_olmo, gpt_oss, granitemoe, llama, mistral, mixtral, olmoe, phi, phimoe, phixtral, qwen2, qwen2_moe, "
        r"qwen3, qwen3_moe\)",
    ):
        read(phixtral)


def test_config_keys_that_are_not_honoured_are_refused_by_name(phixtral):
    edit_config(phixtral, rope_scaling={"type": "yarn"}, n_layerz=3, activation_function="relu", num_experts_per_tok=4)
    with pytest.raises(ConfigError) as caught:
        read(phixtral)
    text = str(caught.value)
    assert "rope_scaling = {'type': 'yarn'} is a key that moeship does not support" in text
    assert "n_layerz = 3 is a key that moeship does not support for this family (did you mean n_layer?)" in text
    assert "activation_function is 'relu'; moeship builds only 'gelu_new'" in text
    assert "num_experts_per_tok is 4, expected 1 to num_local_experts = 3" in text


def test_a_missing_dimension_is_not_guessed(phixtral):
    edit_config(phixtral, n_head="absent")
    with pytest.raises(ConfigError, match="n_head is None, expected a whole number of 1 to 16777216"):
        read(phixtral)


def test_experts_per_token_can_be_overridden_within_the_number_of_experts(phixtral, tmp_path):
    assert read_model(open_checkpoint(phixtral), 3).architecture.experts_per_token == 3
    with pytest.raises(ConfigError, match="found 4, expected 1 to 3, the number of experts"):
        read_model(open_checkpoint(phixtral), 4)
    dense = write_phi_checkpoint(tmp_path / "dense", seed=1)
    with pytest.raises(ConfigError, match="phi is dense and has no experts to choose"):
        read_model(open_checkpoint(dense), 1)
