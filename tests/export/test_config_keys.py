"""Whatever key of config.json changes transformers' logits changes ours, or is refused by name.

Every key that transformers' class has or looks up, the keys that transformers 4.57 writes, and what tools add are set
to many values. Where moeship accepts the value, transformers must compute the reference's logits from the same folder,
scored and with a cache.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re

import numpy as np
import pytest
import torch
import transformers
from checkpoints import Dimensions, phi_msft_config, write_phi_checkpoint, write_phixtral_checkpoint
from dense_checkpoints import write_dense_checkpoint
from flex_olmo_checkpoints import write_flex_olmo_checkpoint
from gpt_oss_checkpoints import write_gpt_oss_checkpoint
from granitemoe_checkpoints import write_granitemoe_checkpoint
from mixtral_checkpoints import write_mixtral_checkpoint
from olmoe_checkpoints import write_olmoe_checkpoint
from phimoe_checkpoints import write_phimoe_checkpoint
from qwen_checkpoints import write_qwen_checkpoint
from transformers import AutoModelForCausalLM, DynamicCache

from export.checkpoint.folder import open_checkpoint
from export.config_keys import rules
from export.config_keys.rules import PHI_MSFT, transformers_keys
from export.config_keys.transformers_keys import FIELDS
from export.errors import CheckpointError, ConfigError
from export.families import detect, read_model
from export.reference.model import Reference

TOKENS = np.random.default_rng(3).integers(0, 256, 24).tolist()
WRITERS = {
    "phi": lambda folder: write_phi_checkpoint(folder, seed=1, num_layers=2),
    "mixtral": lambda folder: write_mixtral_checkpoint(folder, seed=1, num_experts=5),
    "granitemoe": lambda folder: write_granitemoe_checkpoint(folder, seed=1),
    "olmoe": lambda folder: write_olmoe_checkpoint(folder, seed=1),
    "flex_olmo": lambda folder: write_flex_olmo_checkpoint(folder, seed=1),
    "gpt_oss": lambda folder: write_gpt_oss_checkpoint(folder, seed=1),
    "qwen3_moe": lambda folder: write_qwen_checkpoint(folder, "qwen3_moe", seed=1),
    "qwen2_moe": lambda folder: write_qwen_checkpoint(folder, "qwen2_moe", seed=1),
    "phimoe": lambda folder: write_phimoe_checkpoint(folder, seed=1, config={"attention_bias": False}),
    "mistral": lambda folder: write_dense_checkpoint(folder, seed=1, family="mistral"),
    "llama": lambda folder: write_dense_checkpoint(folder, seed=1, family="llama", hidden_size=96),
    "qwen2": lambda folder: write_dense_checkpoint(folder, seed=1, family="qwen2"),
    "qwen3": lambda folder: write_dense_checkpoint(folder, seed=1, family="qwen3"),
}
CLASSES = {
    "phi": "PhiConfig",
    "mixtral": "MixtralConfig",
    "granitemoe": "GraniteMoeConfig",
    "olmoe": "OlmoeConfig",
    "flex_olmo": "FlexOlmoConfig",
    "gpt_oss": "GptOssConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "qwen2_moe": "Qwen2MoeConfig",
    "phimoe": "PhimoeConfig",
    "mistral": "MistralConfig",
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
}
VALUES = [
    None, False, True, 3, 0.5, "nope", {}, {"0": {"rms_norm_eps": 1.0}}, ["sliding_attention"] * 2,
    ["full_attention"] * 2,
]  # fmt: skip
# Value -> keys that transformers refused with it, alone, for the families before. They are asked one by one: among
# others each would have to be looked for, by loading a model for every half of them.
REFUSED: dict[str, set[str]] = {}
# PretrainedConfig().to_dict() and what PhiConfig, MixtralConfig and GraniteMoeConfig add, in transformers 4.57.1.
DUMP = {
    "return_dict": True, "output_hidden_states": False, "torchscript": False, "dtype": "float32", "pruned_heads": {},
    "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None,
    "add_cross_attention": False, "tie_encoder_decoder": False, "architectures": None, "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "prefix": None,
    "task_specific_params": None, "problem_type": None, "tokenizer_class": None, "bos_token_id": None,
    "pad_token_id": None, "eos_token_id": None, "sep_token_id": None, "decoder_start_token_id": None, "max_length": 20,
    "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1, "temperature": 1.0, "top_k": 50,
    "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1, "output_scores": False,
    "return_dict_in_generate": False, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "remove_invalid_values": False, "exponential_decay_length_penalty": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "num_beam_groups": 1, "diversity_penalty": 0.0, "_name_or_path": "",
    "transformers_version": "4.57.1", "tf_legacy_loss": False, "use_bfloat16": False, "output_attentions": False,
    "use_cache": True, "attention_dropout": 0.0, "initializer_range": 0.02, "rope_scaling": None,
}  # fmt: skip
OWN = {
    "phi": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "qk_layernorm": False},
    "mixtral": {"sliding_window": None, "router_jitter_noise": 0.0, "router_aux_loss_coef": 0.001},
    "phimoe": {"sliding_window": None, "input_jitter_noise": 0.0, "router_aux_loss_coef": 0.0},
    "mistral": {"sliding_window": None},
    "llama": {"pretraining_tp": 1, "mlp_bias": False},
    "qwen2": {"use_sliding_window": False, "max_window_layers": 28, "sliding_window": None, "layer_types": None},
    "qwen3": {"use_sliding_window": False, "max_window_layers": 36, "sliding_window": None, "attention_bias": False},
    "olmoe": {"clip_qkv": None, "norm_topk_prob": False, "router_aux_loss_coef": 0.01, "attention_bias": False},
    "flex_olmo": {"norm_topk_prob": False, "router_aux_loss_coef": 0.01, "attention_bias": False},
    "gpt_oss": {"attention_bias": True, "output_router_logits": False, "router_aux_loss_coef": 0.9},
    "qwen3_moe": {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "max_window_layers": 2,
        "sliding_window": None,
        "attention_bias": False,
        "output_router_logits": False,
    },
    "qwen2_moe": {"decoder_sparse_step": 1, "qkv_bias": True, "max_window_layers": 28, "layer_types": None},
    "granitemoe": {"position_embedding_type": "rope", "attention_bias": False, "output_router_logits": False},
}
TOOLS = {
    "unsloth_version": "2024.9", "unsloth_fixed": True, "_attn_implementation_autoset": True, "is_decoder": True,
    "quantization_config": None, "model_name": "mine", "base_model": "a/b", "merged_with": ["a", "b"],
    "pretraining_tp": 1,
    "_flash_attn_2_enabled": True, "mlp_bias": False, "use_sliding_window": False, "attention_bias": False,
    "hidden_dropout_prob": 0.1, "train_batch_size": 4, "hf_device_map": {"": 0}, "gradient_checkpointing": True,
    "max_sequence_length": 2048, "torchscript": True, "_commit_hash": "abc", "tokenizer_name": "a/b",
}  # fmt: skip


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def write_config(folder, raw):
    (folder / "config.json").write_text(json.dumps(raw))


def ours(folder):
    """The reference's logits; None if the folder is refused."""
    try:
        source = read_model(open_checkpoint(folder))
    except (ConfigError, CheckpointError):
        return None
    return next(Reference(source).run([TOKENS]))[0]


def theirs(folder):
    """transformers' logits, scored and computed with a cache; None if transformers does not load or run it."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        (model, info) = model
        if info["missing_keys"] or info["mismatched_keys"]:
            return None
        model.eval()
        tokens = torch.tensor([TOKENS])
        with torch.no_grad():
            scored = model(tokens, return_dict=True).logits[0]
            cache = DynamicCache(config=model.config)
            parts = [model(part, cache=cache, use_cache=True, return_dict=True) for part in tokens.split(15, dim=1)]
    except Exception:
        return None
    return scored.numpy(), torch.cat([part.logits[0] for part in parts]).numpy()


def expect_equal(found, expected, what):
    for logits in expected:
        assert np.abs(found - logits).max() <= 1e-4 * np.abs(logits).max(), what


def expect_unchanged(folder, raw, pairs, logits):
    """All pairs of key and value together leave transformers' logits as they are. Where transformers refuses them, each
    half is asked alone. Returns the keys that transformers refuses alone."""
    if not pairs:
        return set()
    write_config(folder, {**raw, **dict(pairs)})
    found = theirs(folder)
    if found is not None:
        expect_equal(logits, found, pairs)
        return set()
    if len(pairs) == 1:
        return {name for name, _ in pairs}
    half = len(pairs) // 2
    return expect_unchanged(folder, raw, pairs[:half], logits) | expect_unchanged(folder, raw, pairs[half:], logits)


@pytest.mark.parametrize("family", WRITERS)
def test_a_key_that_changes_transformers_logits_changes_ours_or_is_refused(tmp_path, family):
    folder = WRITERS[family](tmp_path / "c")
    raw = config_of(folder)
    plain = ours(folder)
    expect_equal(plain, theirs(folder), "as written")
    record = read_model(open_checkpoint(folder))
    network = record.family.network(raw)
    keys = rules.transformers_keys(CLASSES[family])
    names = {
        *keys.fields,
        *keys.looked_up,
        *keys.aliases,
        *rules.ANY_VALUE,
        *rules._ONLY,
        *rules._FORMERLY,
        *DUMP,
        *TOOLS,
    }
    names -= {"model_type", "rope_parameters", "rope_scaling", "quantization_config"}
    for value in VALUES:
        harmless = []
        for name in sorted(names):
            changed = {**raw, name: value}
            try:
                facts = record.family.read_config(changed)
            except ConfigError:
                continue
            if facts == record.family.read_config(raw) and record.family.network(changed) == network:
                harmless.append((name, value))
                continue
            write_config(folder, changed)
            found, expected = ours(folder), theirs(folder)
            if found is not None and expected is not None:
                expect_equal(found, expected, (name, value))
        suspects = REFUSED.get(repr(value), set().union(*REFUSED.values()))
        groups = [[pair] for pair in harmless if pair[0] in suspects]
        groups.append([pair for pair in harmless if pair[0] not in suspects])
        refused = {name for group in groups for name in expect_unchanged(folder, raw, group, plain)}
        REFUSED.setdefault(repr(value), set()).update(refused)


@pytest.mark.parametrize("family", WRITERS)
def test_what_transformers_457_and_tools_write_is_accepted(tmp_path, family, caplog):
    folder = WRITERS[family](tmp_path / "c")
    raw = config_of(folder)
    plain = ours(folder)
    for key, value in {**DUMP, **TOOLS, **OWN[family]}.items():
        write_config(folder, {**raw, key: value})
        read_model(open_checkpoint(folder))
    write_config(folder, {**DUMP, **TOOLS, **OWN[family], **raw})
    caplog.clear()
    assert np.array_equal(ours(folder), plain)
    expect_equal(plain, theirs(folder), "all of them")
    [warning] = {record.getMessage() for record in caplog.records if record.name == "export.architecture"}
    assert "config.json has keys that transformers 5.24.0 and moeship ignore: base_model, hf_device_map" in warning
    assert "is_decoder" not in warning


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("is_causal", False, "it can change what transformers 5.24.0 computes; only True is supported"),
        ("is_causal", None, "it can change what transformers 5.24.0 computes; only True is supported"),
        ("attention_chunk_size", 4, "it can change what transformers 5.24.0 computes"),
        ("layer_types", ["sliding_attention"] * 2, "it can change what transformers 5.24.0 computes"),
        ("per_layer_config", {"0": {"rms_norm_eps": 1.0}}, "it can change what"),
        ("transformers_weights", "other.safetensors", "it can change what"),
        ("configuration_files", ["config.4.0.json"], "it can change what"),
        ("text_config", {"hidden_size": 3}, "it can change what"),
        ("attribute_map", {"rms_norm_eps": "initializer_range"}, "it can change what"),
        ("pruned_heads", {"0": [1]}, "it can change what"),
        ("position_embedding_type", "nope", "only 'rope' is supported"),
        ("is_encoder_decoder", True, "only False is supported"),
        ("num_hidden_layer", 3, "(did you mean num_hidden_layers?)"),
        ("max_position_embedding", 3, "(did you mean max_position_embeddings?)"),
        ("final_logit_softcapping", 30.0, "by the word 'logit' in its name it may change numbers elsewhere"),
        ("rope_interleaved", True, "by the word 'rope' in its name"),
        ("x" * 65, 1, "its name is too long to be one"),
        ("__class__", "x", "it can change what"),
    ],
)
@pytest.mark.parametrize("family", WRITERS)
def test_a_key_that_may_change_numbers_is_refused_by_name(tmp_path, family, key, value, problem):
    if (family, key) == ("gpt_oss", "layer_types"):
        pytest.skip("gpt_oss has layers of both types")
    raw = config_of(WRITERS[family](tmp_path / "c"))
    with pytest.raises(ConfigError) as caught:
        detect(raw, "c").read_config({**raw, key: value})
    assert f"{key[:20]}" in str(caught.value)
    assert problem in str(caught.value)


def test_the_window_of_a_family_without_windows_is_refused(tmp_path):
    """transformers keeps so many positions in the cache, and attends to all where there is none."""
    for family in ("phi", "granitemoe", "olmoe", "llama"):
        raw = config_of(WRITERS[family](tmp_path / family))
        with pytest.raises(ConfigError, match="sliding_window = 3 is a key that moeship does not support"):
            detect(raw, "c").read_config({**raw, "sliding_window": 3})


def test_a_mixtrals_experts_may_have_transformers_other_name(tmp_path):
    folder = WRITERS["mixtral"](tmp_path / "c")
    raw = config_of(folder)
    plain = ours(folder)
    del raw["num_local_experts"]
    write_config(folder, {**raw, "num_experts": 5})
    assert np.array_equal(ours(folder), plain)
    expect_equal(plain, theirs(folder), "num_experts")
    with pytest.raises(ConfigError, match="num_experts is 4 and num_local_experts is 5, but transformers"):
        detect(raw, "c").read_config({**raw, "num_experts": 4, "num_local_experts": 5})


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("mixtral", {"num_experts": 0}, "num_experts is 0, expected a whole number"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0, expected a whole number"),
        ("mixtral", {"num_experts": None}, "num_experts is null, and transformers has no default"),
        (
            "gpt_oss",
            {"num_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok is 3, expected 1 to num_experts = 2",
        ),
        ("flex_olmo", {"num_local_experts": "5"}, "num_local_experts is '5', expected a whole number"),
        ("olmoe", {"num_local_experts": 1}, "num_experts_per_tok is 2, expected 1 to num_local_experts = 1"),
        ("qwen3_moe", {"num_experts": -1}, "num_experts is -1, expected a whole number"),
        ("phi-msft", {"hidden_size": 41}, "hidden_size 41 is not a multiple of n_head 5"),
        ("phi-msft", {"num_attention_heads": 3}, "n_embd 40 is not a multiple of num_attention_heads 3"),
        ("phi-msft", {"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number"),
        ("phi-msft", {"n_layer": 0}, "n_layer is 0, expected a whole number"),
    ],
)
def test_an_error_names_the_key_that_stands_in_the_file(tmp_path, family, changes, problem):
    raw = phi_msft_config(Dimensions()) if family == "phi-msft" else config_of(WRITERS[family](tmp_path / "c"))
    reader = detect(raw, "c").read_config
    keys = (PHI_MSFT if family == "phi-msft" else transformers_keys(CLASSES[family])).aliases
    names = {name: group for alias, target in keys.items() for group in [{alias, target}] for name in group}
    others = {other for key in changes for other in names.get(key, ()) if other != key}
    told = {key: value for key, value in raw.items() if key not in others}
    with pytest.raises(ConfigError) as caught:
        reader({**told, **changes})
    assert f"- {problem}" in str(caught.value)
    assert not any(re.search(rf"\b{other}\b", str(caught.value)) for other in others)


def test_a_phixtrals_keys_follow_its_published_class(tmp_path):
    folder = write_phixtral_checkpoint(tmp_path / "c", seed=1, num_experts=3, experts_per_token=2)
    raw = config_of(folder)
    plain = ours(folder)
    write_config(folder, {**DUMP, **TOOLS, **raw, "hidden_size": raw["n_embd"], "num_hidden_layers": raw["n_layer"]})
    assert np.array_equal(ours(folder), plain)
    write_config(folder, {**raw, "rope_theta": 10000, "head_dim": 8, "rope_scaling": None})
    assert np.array_equal(ours(folder), plain)
    for key, value, problem in (
        ("hidden_size", 41, "hidden_size is 41 and n_embd is 40, but the published configuration_phi.py takes both"),
        ("max_position_embeddings", 7, "max_position_embeddings is 7 and n_positions is 64"),
        ("n_layers", 3, r"did you mean n_layer\?"),
        ("rope_theta", 1e6, "rope_theta is 1000000.0; moeship builds only 10000.0"),
        ("head_dim", 4, "head_dim is 4; moeship builds only 8"),
        ("embd_layer", "mixed", "it can change what the published"),
        ("is_causal", False, "only True is supported"),
    ):
        with pytest.raises(ConfigError, match=problem):
            detect(raw, "c").read_config({**raw, key: value})


def test_the_table_has_each_field_of_the_classes():
    """ci/transformers_keys.py --check compares the whole table."""
    for name, fields in FIELDS.items():
        assert {field.name: field.default for field in dataclasses.fields(getattr(transformers, name))} == fields


def test_messages_name_no_key_twice(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    raw = phi_msft_config(Dimensions())
    detect(raw, "c").read_config({**raw, "zzz": 1, "yyy": 2})
    assert [record.getMessage() for record in caplog.records] == [
        "config.json has keys that the published configuration_phi.py and moeship ignore: yyy, zzz"
    ]
