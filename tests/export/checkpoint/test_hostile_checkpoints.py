"""Checkpoints that ask for more than their files hold, and folders with more or less than a model in them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import time

import pytest
from checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from flex_olmo_checkpoints import write_flex_olmo_checkpoint
from gpt_oss_checkpoints import write_gpt_oss_checkpoint
from granitemoe_checkpoints import write_granitemoe_checkpoint
from mixtral_checkpoints import write_mixtral_checkpoint
from olmoe_checkpoints import write_olmoe_checkpoint
from phimoe_checkpoints import write_phimoe_checkpoint
from qwen_checkpoints import write_qwen_checkpoint
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from export.architecture import MAX_EXPERTS, MAX_LAYERS, Architecture
from export.checkpoint.folder import INDEX_FILE, open_checkpoint
from export.errors import CheckpointError, ConfigError, MoeshipError
from export.families import read_model
from export.files.typed_json import read_typed
from export.tokenizer.settings import read_settings


@pytest.fixture
def phixtral(tmp_path):
    return write_phixtral_checkpoint(tmp_path / "phixtral", seed=1, num_experts=3, experts_per_token=2)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def one_of_each(tmp_path, phixtral):
    mixtral = write_mixtral_checkpoint(tmp_path / "mixtral", seed=1)
    granitemoe = write_granitemoe_checkpoint(tmp_path / "granitemoe", seed=1)
    olmoe = write_olmoe_checkpoint(tmp_path / "olmoe", seed=1)
    flex_olmo = write_flex_olmo_checkpoint(tmp_path / "flex_olmo", seed=1)
    gpt_oss = write_gpt_oss_checkpoint(tmp_path / "gpt_oss", seed=1)
    qwens = [write_qwen_checkpoint(tmp_path / name, name, seed=1) for name in ("qwen2_moe", "qwen3_moe")]
    phimoe = write_phimoe_checkpoint(tmp_path / "phimoe", seed=1)
    phi = write_phi_checkpoint(tmp_path / "phi", seed=1)
    return phixtral, mixtral, granitemoe, olmoe, flex_olmo, gpt_oss, *qwens, phimoe, phi


def refusal(folder):
    started = time.process_time()
    with pytest.raises(MoeshipError) as caught:
        read_model(open_checkpoint(folder))
    assert time.process_time() - started < 2
    text = str(caught.value)
    assert len(text.encode()) <= 2000
    return text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_layer": 10_000}, "config.json says 10000 layers of 3 experts, but the files hold 62 tensors"),
        ({"n_layer": 20_000}, f"n_layer is 20000, expected a whole number of 1 to {MAX_LAYERS}"),
        ({"n_layer": 1_000_000}, "n_layer is 1000000, expected a whole number"),
        ({"num_local_experts": 4000}, "config.json says 3 layers of 4000 experts, but the files hold 62 tensors"),
        ({"num_local_experts": 100_000}, f"num_local_experts is 100000, expected a whole number of 0 to {MAX_EXPERTS}"),
        ({"layer_norm_epsilon": 10**400}, "layer_norm_epsilon is a whole number of 1329 bits, expected a positive"),
        ({"layer_norm_epsilon": 1e-60}, "layer_norm_epsilon is 1e-60, expected a positive"),
        ({"layer_norm_epsilon": 1e300}, "layer_norm_epsilon is 1e+300, expected a positive"),
        ({"rotary_dim": 0}, "rotary_dim is 0, expected"),
        ({"n_head": 4096}, "n_embd 40 is not a multiple of n_head 4096"),
        ({"eos_token_id": list(range(-300_000, 0))}, "eos_token_id is [-300000, -299999, -299998, -299997, ...]"),
        ({"activation_function": "\x1b[31m" + "x" * 10**6}, r"activation_function is '\x1b[31mxxx"),
        ({"img_processor": [[["\u202e"] * 9] * 9] * 9}, "img_processor is [["),
        ({f"key_{index}": index for index in range(20_000)}, "keys that no reader knows; is this the config.json of"),
        ({f"rope_{index}": 1 for index in range(900)}, "and 888 more such keys"),
        ({"n_layr" * 50_000: 1}, "is a key that moeship does not support"),
        ({"model_type": "m" * 10**6}, "is not among those that moeship builds"),
        ({"model_type": ["phi-msft"]}, "is not among those that moeship builds"),
    ],
)  # fmt: skip
def test_a_config_beyond_what_the_files_hold_is_refused_at_once(phixtral, changes, reason):
    edit_config(phixtral, **changes)
    assert reason in refusal(phixtral)


@pytest.mark.parametrize("spelling", ["published", "packed"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_local_experts": 4000}, "config.json says 2 layers of 4000 experts"),
        ({"num_hidden_layers": 9999}, "config.json says 9999 layers of 5 experts"),
        ({"rope_theta": 1e300, "rope_parameters": None}, "rope_theta is 1e+300, expected a positive"),
    ],
)
def test_a_mixtral_is_bounded_by_its_files_in_both_spellings(tmp_path, spelling, changes, reason):
    folder = write_mixtral_checkpoint(tmp_path / "mixtral", seed=1, spelling=spelling)
    edit_config(folder, **changes)
    assert reason in refusal(folder)


def test_a_rotary_factor_beyond_the_head_is_refused(tmp_path):
    folder = write_phi_checkpoint(tmp_path / "phi", seed=1)
    edit_config(folder, rope_parameters={"partial_rotary_factor": 1e308, "rope_theta": 1e4, "rope_type": "default"})
    assert "partial_rotary_factor is 1e+308, expected a positive, finite number of at most 1" in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 10**9),
        ("num_experts", 10**9),
        ("hidden_size", 0),
        ("norm_epsilon", float("nan")),
        ("rope_base", 0),
    ],
)
def test_facts_from_any_file_are_of_sizes_that_models_have(phixtral, field, value):
    facts = json.loads(json.dumps(dataclasses.asdict(read_model(open_checkpoint(phixtral)).architecture)))
    raw = {**facts, field: value}
    with pytest.raises(ValueError, match=field):
        read_typed(Architecture, raw)


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_a_rotary_embedding_that_cannot_be_scaled_is_not_to_be_taken_out(tmp_path, phixtral, kind):
    for folder in one_of_each(tmp_path, phixtral):
        edit_config(folder, rope_scaling={kind: "dynamic", "factor": 4.0})
        text = refusal(folder)
        assert "'dynamic'" in text
        assert "remove" not in text


@pytest.mark.parametrize("value", [None, {}])
def test_rotary_scaling_and_quantisation_that_say_nothing_are_fine(tmp_path, phixtral, value):
    for folder in one_of_each(tmp_path, phixtral):
        silent = read_model(open_checkpoint(folder)).architecture
        edit_config(folder, rope_scaling=value, quantization_config=value)
        assert read_model(open_checkpoint(folder)).architecture == silent


@pytest.mark.parametrize(
    ("value", "method"),
    [
        ({"quant_method": "aqlm", "nbits_per_codebook": 16}, "aqlm"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"bits": 4}, "an unnamed method"),
        ("awq", "an unnamed method"),
    ],
)
def test_quantised_weights_are_refused_by_the_name_of_their_method(tmp_path, phixtral, value, method):
    for folder in one_of_each(tmp_path, phixtral):
        edit_config(folder, quantization_config=value)
        assert f"the weights are quantised by {method}, which moeship does not read; it reads" in refusal(folder)


def write_adapter(folder):
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "mistralai/Mixtral-8x7B-v0.1", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(load_file_of(folder.parent / "phixtral", 1), folder / "adapter_model.safetensors")


def load_file_of(folder, number):
    return dict(list(load_file(folder / "model.safetensors").items())[:number])


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_is_named_with_its_base(tmp_path, phixtral, with_config):
    write_adapter(tmp_path / "adapter")
    if with_config:
        (tmp_path / "adapter" / "config.json").write_bytes((phixtral / "config.json").read_bytes())
    text = refusal(tmp_path / "adapter")
    assert "it is not a model but an adapter of type 'LORA' for the base model 'mistralai/Mixtral-8x7B-v0.1'" in text
    assert "merge it into that model" in text


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_model_and_an_adapter_in_one_folder_are_refused_as_either_may_be_meant(tmp_path, phixtral, weights):
    """Where PEFT is installed, transformers takes the adapter's base model from elsewhere, and else this model."""
    write_adapter(tmp_path / "adapter")
    (phixtral / "adapter_config.json").write_bytes((tmp_path / "adapter" / "adapter_config.json").read_bytes())
    (phixtral / weights).write_bytes((tmp_path / "adapter" / "adapter_model.safetensors").read_bytes())
    text = refusal(phixtral)
    assert f"it holds a whole model and an adapter ({weights}), and which of them is meant is not said; if the " in text
    assert "as model+adapter in the YAML of `moeship merge`" in text


def test_settings_of_an_adapter_without_its_weights_are_left_aside(tmp_path, phixtral, caplog):
    (phixtral / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    read_model(open_checkpoint(phixtral))
    assert "adapter_config.json beside the model is left aside, since the weights of that adapter are not there" in (
        caplog.text
    )


@pytest.mark.parametrize(
    "stray", ["consolidated.safetensors", "adapter_model.safetensors", "model-00001-of-00002.safetensors"]
)
def test_what_transformers_would_read_is_read_and_the_rest_is_mentioned(tmp_path, caplog, stray):
    folder = write_mixtral_checkpoint(tmp_path / "mixtral", seed=1)
    save_file(load_file_of(folder, 3), folder / f"{stray}.safetensors")
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(folder)
    assert [path.name for path in checkpoint.shards] == ["model.safetensors"]
    assert f"{stray}.safetensors beside it is not part of the model" in caplog.text
    read_model(checkpoint)
    AutoModelForCausalLM.from_pretrained(folder)  # takes the same folder


def test_a_sharded_checkpoint_is_read_by_its_index_beside_a_stray(tmp_path, caplog):
    folder = write_mixtral_checkpoint(tmp_path / "mixtral", seed=1)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file(tensors, folder / "consolidated.safetensors")
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in open_checkpoint(folder).shards] == ["model-00001-of-00001.safetensors"]
    assert "consolidated.safetensors beside it" in caplog.text


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_a_file_of_another_format_alone_is_no_checkpoint(phixtral, name):
    (phixtral / "model.safetensors").rename(phixtral / name)
    assert re.search(rf"neither model.safetensors nor {INDEX_FILE}, only {name}; download", refusal(phixtral))


def test_shards_without_their_index_ask_for_it(phixtral):
    for index in (1, 2):
        save_file(load_file_of(phixtral, index), phixtral / f"model-0000{index}-of-00002.safetensors")
    (phixtral / "model.safetensors").unlink()
    assert f"2 safetensors files but no {INDEX_FILE}; download the index too" in refusal(phixtral)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_shard_that_is_no_file_is_refused(phixtral, kind):
    names = load_file(phixtral / "model.safetensors")
    (phixtral / "model.safetensors").unlink()
    path = phixtral / "model-00001-of-00001.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    assert "is a folder, a pipe or a device, expected a regular file" in refusal(phixtral)
    (phixtral / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, path.name)}))
    assert "is a folder, a pipe or a device, expected a regular file" in refusal(phixtral)


def test_a_shard_that_becomes_a_pipe_after_it_was_opened_is_refused(phixtral):
    checkpoint = open_checkpoint(phixtral)
    (phixtral / "model.safetensors").unlink()
    os.mkfifo(phixtral / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        checkpoint.read("lm_head.ln.bias")


@pytest.mark.parametrize("name", ["a\0b", "n" * 300, "..", "", "../config.json", "sub/x.safetensors"])
def test_names_in_an_index_that_are_no_files_of_the_folder_are_refused(phixtral, name):
    (phixtral / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    text = refusal(phixtral)
    assert "names shards that do not exist" in text or "names files outside the folder" in text
    assert "\0" not in text


def test_names_of_tensors_are_shown_without_what_a_terminal_obeys(phixtral):
    tensors = load_file(phixtral / "model.safetensors")
    name = "\x1b[2J\n  - all is well\u202e" + "y" * 5000
    save_file({**tensors, name: tensors["lm_head.ln.bias"]}, phixtral / "model.safetensors")
    text = refusal(phixtral)
    assert "\\x1b[2J\\n  - all is well\\u202eyyy" in text


def test_many_tensors_that_do_not_fit_are_told_in_seconds(tmp_path):
    folder = write_phixtral_checkpoint(tmp_path / "c", seed=1, num_experts=3, experts_per_token=2)
    tensors = {
        f"t{index}": {"dtype": "U8", "shape": [1], "data_offsets": [index, index + 1]} for index in range(20_000)
    }
    header = json.dumps(tensors).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(len(tensors))
    (folder / "model.safetensors").write_bytes(data)
    edit_config(folder, n_layer=1500)
    started = time.process_time()
    with pytest.raises(CheckpointError, match="its tensors do not fit its config") as caught:
        read_model(open_checkpoint(folder))
    assert time.process_time() - started < 5
    assert len(str(caught.value).encode()) <= 2000


def test_an_unreadable_config_is_our_error(phixtral):
    (phixtral / "config.json").write_bytes(json.dumps({"model_type": "phi"}).encode("utf-16"))
    with pytest.raises(ConfigError, match="config.json is not UTF-8"):
        open_checkpoint(phixtral)


@pytest.mark.parametrize("target", ["nowhere", "itself"])
@pytest.mark.parametrize(
    "name",
    [
        "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "chat_template.jinja", "additional_chat_templates", "additional_chat_templates/tool.jinja", "vocab.json",
        "tokenizer.model", "merges.txt",
    ],
)  # fmt: skip
def test_settings_that_are_links_to_nothing_are_refused_and_not_left_out(phixtral, name, target):
    """As in a hub's cache whose blobs were cleared: to do without the file would lose its end tokens, say."""
    path = phixtral / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(path.name if target == "itself" else "nowhere")
    checkpoint = open_checkpoint(phixtral)
    with pytest.raises(MoeshipError, match=name.rpartition("/")[2]):
        read_settings(phixtral, checkpoint.config)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.model", "additional_chat_templates"])
def test_files_that_travel_are_regular_ones(phixtral, name):
    if name == "vocab.json":
        os.mkfifo(phixtral / name)
    elif name == "tokenizer.model":
        (phixtral / name).mkdir()
    else:
        (phixtral / name).write_text("{{ messages }}")
    with pytest.raises(ConfigError, match=f"{name} there is no"):
        open_checkpoint(phixtral).tokenizer_files()


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing"])
def test_an_index_that_is_no_file_is_refused_also_beside_the_weights(phixtral, kind):
    path = phixtral / INDEX_FILE
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    assert INDEX_FILE in refusal(phixtral)


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rotary_scaling_of_the_default_kind_scales_nothing(tmp_path, key):
    folder = write_mixtral_checkpoint(tmp_path / "c", seed=1)
    plain = read_model(open_checkpoint(folder)).architecture
    edit_config(folder, rope_scaling={key: "default"})
    assert read_model(open_checkpoint(folder)).architecture == plain
    stated = AutoConfig.from_pretrained(folder).rope_parameters
    assert (stated["rope_type"], stated["rope_theta"]) == ("default", plain.rope_base)
    edit_config(folder, rope_scaling={key: "default", "rope_theta": 5.0})
    assert AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"] == 5.0
    assert read_model(open_checkpoint(folder)).architecture == dataclasses.replace(plain, rope_base=5.0)
    edit_config(folder, rope_scaling={key: "default"}, rope_parameters={"rope_theta": 5.0})
    assert "both set the rotary embedding" in refusal(folder)


@pytest.mark.parametrize("kind", ["device", "pipe", "nothing"])
def test_settings_that_are_no_files_by_the_time_they_are_copied_are_refused(phixtral, tmp_path, kind):
    settings = read_settings(phixtral, open_checkpoint(phixtral).config)
    path = phixtral / "tokenizer_config.json"
    path.unlink()
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    (tmp_path / "out").mkdir()
    with pytest.raises(
        ConfigError, match="tokenizer_config.json changed into something else than regular files since they"
    ):
        settings.write(tmp_path / "out")
