"""A key that config.json leaves out has the value of transformers' own configuration class."""

from __future__ import annotations

import pytest

from export.families import family_named

REQUIRED = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 16, "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "name", "optional"),
    [
        ("phi", "PhiConfig", {"layer_norm_eps": 1e-3, "partial_rotary_factor": 0.25, "rope_theta": 5e5}),
        ("mixtral", "MixtralConfig", {"rms_norm_eps": 1e-3, "num_key_value_heads": 4, "rope_theta": 5e5}),
        (
            "mistral", "MistralConfig",
            {"rms_norm_eps": 1e-3, "num_key_value_heads": 4, "rope_theta": 5e5, "sliding_window": 7},
        ),
        ("llama", "LlamaConfig", {"rms_norm_eps": 1e-3, "num_key_value_heads": 4, "rope_theta": 5e5}),
        ("qwen2", "Qwen2Config", {"rms_norm_eps": 1e-3, "num_key_value_heads": 4, "rope_theta": 5e5}),
        (
            "qwen3", "Qwen3Config",
            {"rms_norm_eps": 1e-3, "num_key_value_heads": 4, "rope_theta": 5e5, "head_dim": 16},
        ),
        (
            "qwen3_moe", "Qwen3MoeConfig",
            {
                "rms_norm_eps": 1e-3, "num_key_value_heads": 2, "rope_theta": 5e5, "norm_topk_prob": True,
                "decoder_sparse_step": 2, "mlp_only_layers": [1], "use_sliding_window": True,
            },
        ),
        (
            "qwen2_moe", "Qwen2MoeConfig",
            {
                "rms_norm_eps": 1e-3, "num_key_value_heads": 2, "rope_theta": 5e5, "norm_topk_prob": True,
                "decoder_sparse_step": 2, "mlp_only_layers": [1],
            },
        ),
        (
            "phimoe", "PhimoeConfig",
            {
                "rms_norm_eps": 1e-3, "num_key_value_heads": 4, "rope_theta": 5e5, "sliding_window": 7,
                "router_jitter_noise": 0.3,
            },
        ),
        (
            "olmoe", "OlmoeConfig",
            {
                "rms_norm_eps": 1e-3, "num_key_value_heads": 4, "rope_theta": 5e5, "clip_qkv": 0.5,
                "norm_topk_prob": True,
            },
        ),
        (
            "flex_olmo", "FlexOlmoConfig",
            {"rms_norm_eps": 1e-3, "num_key_value_heads": 4, "rope_theta": 1e4, "norm_topk_prob": True},
        ),
        (
            "gpt_oss", "GptOssConfig",
            {
                "rms_norm_eps": 1e-3, "num_key_value_heads": 4, "rope_theta": 5e5, "swiglu_alpha": 2.0,
                "swiglu_limit": 3.0, "sliding_window": 7, "head_dim": 32, "layer_types": ["full_attention"] * 2,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
        ),
        (
            "granitemoe", "GraniteMoeConfig",
            {
                "rms_norm_eps": 1e-3, "num_key_value_heads": 4, "rope_theta": 5e5, "embedding_multiplier": 2.0,
                "attention_multiplier": 0.5, "residual_multiplier": 0.25, "logits_scaling": 4.0,
            },
        ),
    ],
)  # fmt: skip
def test_missing_keys_have_the_values_of_transformers_class(family, name, optional):
    import transformers

    network = family_named(family).network
    whole = getattr(transformers, name)(**REQUIRED).to_dict()
    model = {"model_type": whole["model_type"]}
    assert network({**model, **REQUIRED}) == network(whole)
    for key, value in optional.items():  # each of these keys is read
        assert network({**model, **REQUIRED, key: value}) != network(whole), key
