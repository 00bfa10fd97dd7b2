"""The reference against transformers' own models of the same checkpoints: logits, router logits and hidden states."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from dense_checkpoints import write_dense_checkpoint
from flex_olmo_checkpoints import write_flex_olmo_checkpoint
from gpt_oss_checkpoints import write_gpt_oss_checkpoint
from granitemoe_checkpoints import tell_mixtral_as_granitemoe, write_granitemoe_checkpoint
from mixtral_checkpoints import write_mixtral_checkpoint
from olmoe_checkpoints import write_olmoe_checkpoint
from phimoe_checkpoints import write_phimoe_checkpoint
from qwen_checkpoints import write_qwen_checkpoint
from safetensors.numpy import load_file, save_file
from torch_reference import load_reference, run_model
from transformers import (
    AutoModelForCausalLM,
    FlexOlmoForCausalLM,
    GptOssForCausalLM,
    GraniteMoeForCausalLM,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    PhiForCausalLM,
    Qwen2ForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from export.checkpoint.folder import open_checkpoint
from export.errors import CheckpointError, ConfigError
from export.families import families, read_model
from export.reference import attention, mixture, model
from export.reference.model import Reference

EXAMPLES = Path(__file__).parents[3] / "examples"
TOKENS = np.random.default_rng(3).integers(0, 256, 700).tolist()
LIMIT = 1e-5  # of the largest logit


def phi(folder, spelling="transformers", **sizes):
    return write_phi_checkpoint(folder, seed=1, spelling=spelling, **sizes)


def phixtral(folder, num_experts=5, experts_per_token=2, **sizes):
    return write_phixtral_checkpoint(
        folder, seed=1, num_experts=num_experts, experts_per_token=experts_per_token, **sizes
    )


def mixtral(folder, **sizes):
    return write_mixtral_checkpoint(folder, seed=1, **sizes)


def granitemoe(folder, **sizes):
    return write_granitemoe_checkpoint(folder, seed=1, **sizes)


def olmoe(folder, **sizes):
    return write_olmoe_checkpoint(folder, seed=1, **sizes)


def flex_olmo(folder, **sizes):
    return write_flex_olmo_checkpoint(folder, seed=1, **sizes)


def gpt_oss(folder, **sizes):
    return write_gpt_oss_checkpoint(folder, seed=1, **sizes)


def qwen3_moe(folder, **sizes):
    return write_qwen_checkpoint(folder, "qwen3_moe", seed=1, **sizes)


def qwen2_moe(folder, **sizes):
    return write_qwen_checkpoint(folder, "qwen2_moe", seed=1, **sizes)


def phimoe(folder, **sizes):
    return write_phimoe_checkpoint(folder, seed=1, **sizes)


def mistral(folder, **sizes):
    return write_dense_checkpoint(folder, seed=1, **sizes)


def llama(folder, **sizes):
    return write_dense_checkpoint(folder, seed=1, family="llama", **sizes)


def qwen2(folder, **sizes):
    return write_dense_checkpoint(folder, seed=1, family="qwen2", **sizes)


def qwen3(folder, **sizes):
    return write_dense_checkpoint(folder, seed=1, family="qwen3", **sizes)


WRITERS = {
    "phi": phi, "phixtral": phixtral, "mixtral": mixtral, "granitemoe": granitemoe, "olmoe": olmoe,
    "gpt_oss": gpt_oss, "qwen3_moe": qwen3_moe, "qwen2_moe": qwen2_moe, "phimoe": phimoe, "mistral": mistral,
    "llama": llama, "flex_olmo": flex_olmo, "qwen2": qwen2, "qwen3": qwen3,
}  # fmt: skip
WINDOWS = {"sliding_window": 7, "max_window_layers": 1}
CASES = [
    (phi, {}),
    (phi, {"spelling": "phi-msft", "rotary_dim": 2, "ffn_size": 33}),
    (phi, {"hidden_size": 96, "num_heads": 6, "num_kv_heads": 2, "rotary_dim": 10, "dtype": "float16"}),
    (phi, {"spelling": "phi-msft", "num_layers": 1, "num_heads": 1, "rotary_dim": 40}),
    (phixtral, {}),
    (phixtral, {"num_experts": 3, "experts_per_token": 1, "num_heads": 4, "num_kv_heads": 1, "dtype": "bfloat16"}),
    (phixtral, {"num_experts": 2, "experts_per_token": 2, "dtype": "float16"}),
    (mixtral, {}),
    (mixtral, {"spelling": "packed", "num_experts": 3, "experts_per_token": 1, "ffn_size": 37}),
    (mixtral, {"config": {"sliding_window": 7}, "num_kv_heads": 1, "experts_per_token": 3}),
    (mixtral, {"num_heads": 5, "num_kv_heads": 5, "head_dim": None, "tied": True, "dtype": "float16"}),
    (mixtral, {"hidden_size": 53, "head_dim": 24, "num_experts": 8, "experts_per_token": 8}),
    (granitemoe, {}),
    (granitemoe, {"spelling": "packed", "num_experts": 3, "experts_per_token": 1, "ffn_size": 37}),
    (granitemoe, {"num_heads": 5, "num_kv_heads": 1, "head_dim": None, "tied": True, "dtype": "bfloat16"}),
    (olmoe, {}),
    (olmoe, {"spelling": "packed", "num_experts": 9, "experts_per_token": 8, "config": {"clip_qkv": 0.5}}),
    (olmoe, {"num_heads": 3, "num_kv_heads": 1, "config": {"norm_topk_prob": True}, "tied": True, "dtype": "bfloat16"}),
    (flex_olmo, {}),
    (flex_olmo, {"spelling": "packed", "num_experts": 7, "experts_per_token": 5, "hidden_size": 53, "head_dim": 24}),
    (flex_olmo, {"num_heads": 3, "config": {"norm_topk_prob": True}, "num_kv_heads": 1, "tied": True}),
    (gpt_oss, {}),
    (gpt_oss, {"spelling": "mxfp4", "num_experts": 3, "experts_per_token": 1, "config": {"swiglu_limit": 0.4}}),
    (gpt_oss, {"num_heads": 5, "num_kv_heads": 1, "ffn_size": 37, "tied": True, "dtype": "bfloat16", "num_layers": 3}),
    (qwen3_moe, {}),
    (qwen3_moe, {"spelling": "packed", "num_layers": 3, "config": {"mlp_only_layers": [1]}, "num_kv_heads": 1}),
    (qwen3_moe, {"num_layers": 4, "config": {"decoder_sparse_step": 2, "norm_topk_prob": False}, "dtype": "bfloat16"}),
    (qwen2_moe, {"spelling": "packed", "num_layers": 3, "config": {"mlp_only_layers": [1]}, "num_kv_heads": 1}),
    (qwen2_moe, {"config": {"norm_topk_prob": True}, "dtype": "float16", "tied": True}),
    (phimoe, {}),
    (phimoe, {"spelling": "packed", "num_experts": 9, "config": {"attention_bias": False, "sliding_window": 7}}),
    (phimoe, {"num_heads": 3, "num_kv_heads": 1, "config": {"lm_head_bias": False}, "tied": True, "dtype": "bfloat16"}),
    (mistral, {}),
    (mistral, {"config": {"sliding_window": 7}, "num_kv_heads": 1, "ffn_size": 37}),
    (mistral, {"num_heads": 5, "num_kv_heads": 5, "head_dim": None, "tied": True, "dtype": "float16"}),
    (llama, {"num_heads": 4}),
    (llama, {"hidden_size": 54, "head_dim": 24, "dtype": "bfloat16"}),
    (llama, {"num_heads": 5, "num_kv_heads": 1, "head_dim": None, "tied": True}),
    (qwen2, {"dtype": "bfloat16", "tied": True}),
    (qwen2, {"num_heads": 3, "num_kv_heads": 1, "ffn_size": 37, "config": {"use_sliding_window": True, **WINDOWS}}),
    (qwen3, {"num_layers": 3, "config": {"use_sliding_window": True, **WINDOWS}}),
    (qwen3, {"hidden_size": 53, "head_dim": 24, "num_kv_heads": 1, "tied": True, "dtype": "float16"}),
]


def expect_equal(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= LIMIT * np.abs(expected).max()


def expect_equal_to_transformers(folder, windows):
    source = read_model(open_checkpoint(folder))
    theirs = load_reference(source)
    found = list(Reference(source).run(windows))
    assert len(found) == len(windows)
    for window, (logits, routed) in zip(windows, found, strict=True):
        expected, expected_routed = run_model(theirs, window)
        expect_equal(logits, expected)
        assert (routed is None) == (expected_routed is None) == (not source.architecture.is_moe)
        if routed is not None:
            expect_equal(routed, expected_routed)


@pytest.mark.parametrize(
    ("write", "sizes"), CASES, ids=[f"{write.__name__} {' '.join(map(str, sizes.values()))}" for write, sizes in CASES]
)
def test_every_family_gives_transformers_logits_at_odd_sizes(tmp_path, write, sizes):
    expect_equal_to_transformers(write(tmp_path / "c", **sizes), [TOKENS[:60], TOKENS[60:61], TOKENS[61:101]])


def test_a_mistrals_layers_of_full_attention_have_no_window(tmp_path):
    """transformers' AutoConfig takes a Mistral that has layer_types for a Ministral."""
    config = {"sliding_window": 7, "layer_types": ["full_attention"] * 2}
    folder = mistral(tmp_path / "c", config=config)
    source = read_model(open_checkpoint(folder))
    assert source.architecture.sliding_window is None
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([TOKENS[:60]])).logits
    expect_equal(next(Reference(source).run([TOKENS[:60]]))[0], theirs[0].numpy())


def test_a_mistrals_layers_of_sliding_attention_all_have_the_window(tmp_path):
    plain = mistral(tmp_path / "plain", config={"sliding_window": 7})
    folder = mistral(tmp_path / "c", config={"sliding_window": 7, "layer_types": ["sliding_attention"] * 2})
    source = read_model(open_checkpoint(folder))
    assert source.architecture == read_model(open_checkpoint(plain)).architecture
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([TOKENS[:60]])).logits
    expect_equal(next(Reference(source).run([TOKENS[:60]]))[0], theirs[0].numpy())


@pytest.mark.parametrize("types", [["sliding_attention"], ["full_attention", "sliding_attention"]])
def test_types_of_layers_that_are_not_one_a_layer_or_not_all_equal_are_refused(tmp_path, types):
    folder = mistral(tmp_path / "c", config={"sliding_window": 7, "layer_types": types})
    with pytest.raises(ConfigError, match="layer_types = .* is a key that moeship does not support"):
        read_model(open_checkpoint(folder))


def test_every_family_is_among_the_cases():
    assert {write.__name__ for write, _ in CASES} == set(WRITERS) == {family.name for family in families()}


@pytest.mark.parametrize("family", ["phi", "phixtral", "mixtral", "granitemoe"])
def test_trained_examples_give_transformers_logits_over_512_tokens(tmp_path, family, trained_phixtral):
    mixtral = EXAMPLES / "tiny-mixtral" / "checkpoint"
    folder = {"phi": EXAMPLES / "tiny-phixtral/experts/prose", "phixtral": trained_phixtral, "mixtral": mixtral}.get(
        family
    ) or tell_mixtral_as_granitemoe(mixtral, tmp_path / "granitemoe")
    tokens = np.random.default_rng(5).integers(0, 1024, 700).tolist()
    expect_equal_to_transformers(folder, [tokens[:512], tokens[512:]])


@pytest.mark.parametrize("window", [None, 19, 64])
def test_blocks_of_queries_experts_and_logits_of_any_size_give_the_same(tmp_path, monkeypatch, window):
    folder = mixtral(tmp_path / "c", config={"sliding_window": window})
    whole = [logits for logits, _ in Reference(read_model(open_checkpoint(folder))).run([TOKENS[:200], TOKENS[:31]])]
    monkeypatch.setattr(attention, "_MOST_QUERIES", 17)
    monkeypatch.setattr(attention, "_SCORE_VALUES", 9 * 3 * 200)
    monkeypatch.setattr(mixture, "BLOCK_TOKENS", 5)
    monkeypatch.setattr(model, "_HEAD_VALUES", 80 * 11)
    monkeypatch.setattr(model, "_LOGITS_VALUES", 371 * 40)
    blocks = [logits for logits, _ in Reference(read_model(open_checkpoint(folder))).run([TOKENS[:200], TOKENS[:31]])]
    for found, expected in zip(blocks, whole, strict=True):
        expect_equal(found, expected)
    expect_equal_to_transformers(folder, [TOKENS[:200], TOKENS[:31]])


def test_late_positions_are_turned_as_transformers_turns_them(tmp_path):
    sizes = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "ffn_size": 8, "max_positions": 4096, "rotary_dim": 16}
    tokens = np.random.default_rng(1).integers(0, 256, 3000).tolist()
    expect_equal_to_transformers(phi(tmp_path / "c", **sizes), [tokens])


@pytest.mark.parametrize("spelling", ["transformers", "phi-msft"])
def test_the_hidden_states_that_enter_layers_are_those_of_transformers(tmp_path, spelling):
    source = read_model(open_checkpoint(phi(tmp_path / "c", spelling)))
    theirs = load_reference(source)
    windows = [TOKENS[:9], [], TOKENS[9:40]]
    layers = list(Reference(source).layer_inputs(windows))
    assert len(layers) == 3
    for index, window in enumerate(windows):
        if not window:
            assert {states[index].shape for states in layers} == {(0, 40)}
            continue
        with torch.no_grad():
            expected = theirs(torch.tensor([window]), output_hidden_states=True).hidden_states
        for states, theirs_states in zip(layers, expected[:-1], strict=True):
            expect_equal(states[index], theirs_states[0].numpy())


@pytest.mark.parametrize(
    ("write", "outside"),
    [
        (phi, PhiForCausalLM),
        (mixtral, MixtralForCausalLM),
        (granitemoe, GraniteMoeForCausalLM),
        (olmoe, OlmoeForCausalLM),
        (flex_olmo, FlexOlmoForCausalLM),
        (gpt_oss, GptOssForCausalLM),
        (qwen2_moe, Qwen2MoeForCausalLM),
        (qwen3_moe, Qwen3MoeForCausalLM),
        (qwen2, Qwen2ForCausalLM),
        (qwen3, Qwen3ForCausalLM),
    ],
)
def test_keys_that_a_config_leaves_out_are_what_transformers_makes_of_them(tmp_path, write, outside):
    """The weights have shapes that fit the defaults, so that each key can go."""
    sizes = {"hidden_size": 64, "num_heads": 8, "max_positions": 64}
    sizes |= {"rotary_dim": 4} if write is phi else {"head_dim": 8, "num_kv_heads": 8, "num_experts": 8, "ffn_size": 24}
    sizes |= {"config": {"clip_qkv": 0.5, "norm_topk_prob": True}} if write is olmoe else {}
    sizes |= {"experts_per_token": 5, "config": {"norm_topk_prob": True}} if write is flex_olmo else {}
    if write is gpt_oss:  # the class's own head size, experts for each token, window and constants
        sizes |= {"head_dim": 64, "experts_per_token": 4, "config": {"sliding_window": 128}}
    sizes |= {
        qwen3_moe: {"num_kv_heads": 4}, qwen2_moe: {"num_heads": 16, "num_kv_heads": 16, "head_dim": 4},
        qwen2: {"num_heads": 32, "num_kv_heads": 32, "head_dim": 2}, qwen3: {"num_heads": 32, "num_kv_heads": 32},
    }.get(write, {})  # fmt: skip
    if write in (qwen2, qwen3):
        del sizes["num_experts"]
    if write is qwen3:
        sizes["head_dim"] = 128
    folder = write(tmp_path / "c", **sizes)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    facts = {
        "rope_parameters", "rope_theta", "partial_rotary_factor", "layer_norm_eps", "rms_norm_eps",
        "num_key_value_heads", "head_dim", "sliding_window", "embedding_multiplier", "attention_multiplier",
        "residual_multiplier", "logits_scaling", "clip_qkv", "norm_topk_prob", "swiglu_limit", "swiglu_alpha",
        "layer_types", "rope_scaling", "attention_bias", "experts_per_token",
    }  # fmt: skip
    for key in facts & written.keys():
        path.write_text(json.dumps({name: value for name, value in written.items() if name != key}))
        theirs = outside.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        [(found, _)] = Reference(read_model(open_checkpoint(folder))).run([TOKENS[:40]])
        expect_equal(found, run_model(theirs, TOKENS[:40])[0])


@pytest.mark.parametrize("family", WRITERS)
def test_facts_that_were_read_wrongly_do_not_reach_the_reference(tmp_path, family):
    source = read_model(open_checkpoint(WRITERS[family](tmp_path / "c")))
    wrong = replace(source.architecture, rope_base=50.0, norm_epsilon=0.5, max_positions=48, sliding_window=3)
    [(expected, _)] = Reference(source).run([TOKENS[:40]])
    [(found, _)] = Reference(replace(source, architecture=wrong)).run([TOKENS[:40]])
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("family", ["phixtral", "mixtral", "granitemoe", "olmoe", "flex_olmo", "gpt_oss"])
def test_the_number_of_experts_a_token_is_the_one_asked_for(tmp_path, family):
    folder = WRITERS[family](tmp_path / "c")
    [(asked, _)] = Reference(read_model(open_checkpoint(folder), 1)).run([TOKENS[:40]])
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts_per_tok": 1}))
    [(stated, _)] = Reference(read_model(open_checkpoint(folder))).run([TOKENS[:40]])
    assert np.array_equal(asked, stated)


@pytest.mark.parametrize("gate", ["random", "equal"])
def test_a_phixtral_of_equal_experts_is_the_dense_model(tmp_path, gate):
    dense = phi(tmp_path / "dense", "phi-msft")
    outside = PhiForCausalLM.from_pretrained(phi(tmp_path / "outside"), dtype=torch.float32).eval()
    folder = phixtral(tmp_path / "mixture")
    tensors, mixture_tensors = load_file(dense / "model.safetensors"), load_file(folder / "model.safetensors")
    for name in mixture_tensors:
        stem, moe, rest = name.partition(".moe.mlp.")
        if moe:
            mixture_tensors[name] = tensors[f"{stem}.mlp.{rest.partition('.')[2]}"]
        elif not name.endswith("gate.weight"):
            mixture_tensors[name] = tensors[name]
        elif gate == "equal":
            mixture_tensors[name][:] = mixture_tensors[name][0]
    save_file(mixture_tensors, folder / "model.safetensors")
    [(found, _)] = Reference(read_model(open_checkpoint(folder))).run([TOKENS[:60]])
    expect_equal(found, run_model(outside, TOKENS[:60])[0])


@pytest.mark.parametrize("token", [263, -1])
def test_a_token_that_the_embedding_lacks_is_refused(tmp_path, token):
    source = read_model(open_checkpoint(phi(tmp_path / "c")))
    with pytest.raises(CheckpointError, match=r"the text holds token (263|5), the embedding has 263 rows"):
        next(Reference(source).run([[5, token]]))


def test_progress_tells_of_each_layer(tmp_path):
    told = []
    list(Reference(read_model(open_checkpoint(phi(tmp_path / "c")))).run([TOKENS[:5]], told.append))
    assert told == [f"computing the reference: {layer} of 3 layers" for layer in range(3)]
