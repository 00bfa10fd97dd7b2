"""What mergekit-moe writes of dense Qwens, Llamas and Mistrals as qwen2_moe and qwen3_moe is read: its config.json is
the base's with the keys of the mixture set (mergekit/moe/qwen.py, qwen3.py), saved by transformers."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from export.architecture import QueryKeyValue, Router
from export.families import detect

SIZES = {
    "vocab_size": 371, "hidden_size": 96, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 400,
}  # fmt: skip


def saved(tmp_path, made, **more):
    for key, value in {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, **more}.items():
        setattr(made, key, value)
    made.decoder_sparse_step, made.moe_intermediate_size = 1, made.intermediate_size
    made.save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("base", [Qwen2Config, LlamaConfig, MistralConfig])
def test_a_qwen2_moe(tmp_path, base):
    made = Qwen2MoeConfig(**base(**SIZES).to_dict())
    more = {"sliding_window": None, "use_sliding_window": False, "shared_expert_intermediate_size": 72}
    raw = saved(tmp_path, made, architectures=["Qwen2MoeForCausalLM"], **more)
    facts = detect(raw, "here").read_config(raw)
    assert (facts.family, facts.num_experts, facts.experts_per_token) == ("qwen2_moe", 4, 2)
    assert (facts.ffn_size, facts.shared_ffn_size, facts.sliding_window) == (72, 72, None)
    assert facts.router == Router(normalise=True)


def test_a_qwen3_moe(tmp_path):
    made = Qwen3MoeConfig(**Qwen3Config(**SIZES, head_dim=32).to_dict())
    raw = saved(tmp_path, made, architectures=["Qwen3MoeForCausalLM"])
    facts = detect(raw, "here").read_config(raw)
    assert (facts.family, facts.num_experts, facts.experts_per_token) == ("qwen3_moe", 4, 2)
    assert (facts.ffn_size, facts.head_size, facts.dense_layers) == (72, 32, ())
    assert (facts.router, facts.qkv) == (Router(normalise=True), QueryKeyValue(norm="head"))
