"""A key that config.json leaves out is worth what the model's configuration class makes of it."""

from __future__ import annotations

import pytest
from checkpoints import Dimensions, phi_msft_config, transformers_config
from dense_checkpoints import dense_config
from flex_olmo_checkpoints import flex_olmo_config
from gpt_oss_checkpoints import gpt_oss_config
from granitemoe_checkpoints import SCALARS
from mixtral_checkpoints import MixtralSizes, published_config
from olmoe_checkpoints import olmoe_config
from phimoe_checkpoints import phimoe_config
from qwen_checkpoints import qwen_config
from transformers import AutoConfig

from export.architecture import QueryKeyValue, Router, SwiGlu
from export.errors import ConfigError
from export.families import family_named

# Their defaults in transformers are those of one published model, so they must be stated.
SIZES = {
    "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "vocab_size",
}  # fmt: skip
LAYERS_DIFFER = ("gpt_oss", "qwen2", "qwen3")
NORMS = {"olmoe": "width", "flex_olmo": "width", "qwen3_moe": "head", "qwen3": "head"}
SHAPES = MixtralSizes(hidden_size=128, num_heads=8, num_kv_heads=4, num_experts=3)
WRITTEN = {
    "phi": {**transformers_config(Dimensions(num_kv_heads=1)), "qk_layernorm": False},
    "mixtral": {**published_config(SHAPES), "tie_word_embeddings": True},
    "granitemoe": {**published_config(SHAPES), **SCALARS, "model_type": "granitemoe", "attention_bias": False},
    "olmoe": {**olmoe_config(published_config(SHAPES)), "norm_topk_prob": True, "clip_qkv": 3.5, "num_experts": 9},
    "flex_olmo": {**flex_olmo_config(published_config(SHAPES)), "norm_topk_prob": True, "num_experts": 9},
    "gpt_oss": {
        **gpt_oss_config(published_config(SHAPES)),
        "num_local_experts": 9,
        "swiglu_alpha": 2.0,
        "swiglu_limit": 3.0,
    },
    "qwen3_moe": {
        **qwen_config(published_config(SHAPES), "qwen3_moe"),
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
        "mlp_only_layers": [1],
        "num_experts": 9,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": None,
    },
    "qwen2_moe": {
        **qwen_config(published_config(SHAPES), "qwen2_moe"),
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
        "mlp_only_layers": [1],
        "num_experts": 9,
        "num_attention_heads": 16,
        "norm_topk_prob": True,
    },
    "phimoe": {**phimoe_config(published_config(SHAPES)), "tie_word_embeddings": True, "sliding_window": 7},
    "mistral": {**dense_config(SHAPES, "mistral"), "tie_word_embeddings": True, "sliding_window": 7},
    "llama": {**dense_config(SHAPES, "llama"), "tie_word_embeddings": True},
    **{
        family: {
            **dense_config(SHAPES, family),
            "num_hidden_layers": 30,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 5,
            "num_attention_heads": 32,
        }
        for family in ("qwen2", "qwen3")
    },
}
for no_key in ("sliding_window", "head_dim"):
    del WRITTEN["granitemoe"][no_key]


def of_transformers(family, raw):
    """The facts that transformers reads in a config.json, in our names."""
    config = AutoConfig.for_model(family, **{key: value for key, value in raw.items() if key != "model_type"})
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "num_kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_size": head_size,
        "rope_base": config.rope_parameters["rope_theta"],
        "rotary_dim": int(head_size * config.rope_parameters.get("partial_rotary_factor", 1.0)),
        "norm_epsilon": config.layer_norm_eps if family == "phi" else config.rms_norm_eps,
        "num_experts": getattr(config, "num_local_experts", getattr(config, "num_experts", 0)),
        "experts_per_token": getattr(config, "num_experts_per_tok", 0),
        "tied_head": config.tie_word_embeddings,
        "sliding_window": getattr(config, "sliding_window", None) or None,
        "router": (
            Router(score="sparse_mixer", normalise=False, jitter=config.router_jitter_noise)
            if family == "phimoe"
            else Router(normalise=getattr(config, "norm_topk_prob", True))
        ),
        "attention_bias": getattr(config, "attention_bias", False),
        "head_bias": getattr(config, "lm_head_bias", False),
        "qkv": QueryKeyValue(norm=NORMS.get(family), clip=getattr(config, "clip_qkv", None)),
        "dense_layers": tuple(
            layer
            for layer in range(config.num_hidden_layers)
            if (layer + 1) % getattr(config, "decoder_sparse_step", 1)
            or layer in getattr(config, "mlp_only_layers", [])
        ),
        "swiglu": SwiGlu(alpha=config.swiglu_alpha, beta=1.0, limit=config.swiglu_limit)
        if family == "gpt_oss"
        else SwiGlu(),
        "full_layers": tuple(
            layer
            for layer, kind in enumerate(config.layer_types if family in LAYERS_DIFFER else ())
            if kind == "full_attention" and config.sliding_window
        ),
    }


@pytest.mark.parametrize("family", WRITTEN)
def test_each_key_left_out_alone_is_what_transformers_makes_of_it(family):
    for key in WRITTEN[family].keys() - {"model_type"}:
        raw = {name: value for name, value in WRITTEN[family].items() if name != key}
        if key in SIZES:
            with pytest.raises(ConfigError, match=f"{key} is None, expected a whole number"):
                family_named(family).read_config(raw)
        else:
            found, expected = family_named(family).read_config(raw), of_transformers(family, raw)
            assert {name: getattr(found, name) for name in expected} == expected, key


def test_a_phixtrals_keys_have_the_defaults_of_its_published_configuration_class():
    """configuration_phi.py of mlabonne/phixtral-4x2_8: n_inner and n_head_kv None, tie_word_embeddings False."""
    written = {**phi_msft_config(Dimensions()), "num_local_experts": 5, "num_experts_per_tok": 3, "n_head_kv": 1}
    raw = {key: value for key, value in written.items() if key not in ("n_inner", "n_head_kv", "tie_word_embeddings")}
    found = family_named("phixtral").read_config(raw)
    assert (found.ffn_size, found.num_kv_heads, found.tied_head) == (4 * 40, 5, False)
    assert (found.num_experts, found.experts_per_token) == (5, 3)


def test_a_rotary_factor_of_1_turns_the_whole_head():
    raw = transformers_config(Dimensions())
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    assert family_named("phi").read_config(raw).rotary_dim == 40 // 5
