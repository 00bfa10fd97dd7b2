"""Dense Qwen3 (Qwen3ForCausalLM): Llama's layers with RMSNorms of each head's queries and keys.

  config.json                        in the network
  head_dim                           D; 128 where it is absent, whatever the width
  use_sliding_window and its like    as in `export.families.dense.qwen2`

  self_attn.q_norm, .k_norm          [D], before the rotary embedding

Models with attention_bias are refused. Everything else is as in `export.families.shared.llama_stack`. Several of these
models are merged into a qwen3_moe (export/merge).
Source: transformers, models/qwen3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.architecture import Architecture, ConfigReader, QueryKeyValue
from export.config_keys.rules import transformers_keys
from export.families import Family
from export.families.shared.llama_stack import (
    BASE_MODULES,
    dense_tensors,
    layer_name,
    read_stack_config,
    stack_graph,
    stack_head,
    stack_network,
)
from export.families.shared.network import Network
from export.families.shared.transformers_config import read_windows, windows_of

_HEAD_SIZE = 128  # of Qwen3Config, for a config.json without the key


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "qwen3"


def read_config(raw: Mapping[str, Any]) -> Architecture:
    """Read the Architecture from a Qwen3 config.json. Missing keys have the defaults of transformers' Qwen3Config.
    Raises ConfigError."""
    reader = ConfigReader({"head_dim": _HEAD_SIZE, **raw}, "qwen3", transformers_keys("Qwen3Config"))
    return read_stack_config(
        reader,
        "qwen3",
        rope_base=1e4,
        norm_epsilon=1e-6,
        num_kv_heads=32,
        dense=True,
        qkv=QueryKeyValue(norm="head"),
        **read_windows(reader),
    )


def network(raw: Mapping[str, Any]) -> Network:
    """What the network computes; missing keys have the defaults of transformers' Qwen3Config."""
    return stack_network(
        {"head_dim": _HEAD_SIZE, **raw},
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        num_key_value_heads=32,
        dense=True,
        normed=True,
        **windows_of(raw),
    )


FAMILY = Family(
    name="qwen3",
    matches=matches,
    read_config=read_config,
    tensors=dense_tensors,
    decoder=stack_graph,
    head=stack_head,
    layer=layer_name,
    network=network,
    tokenizers={"qwen3": "Qwen2Tokenizer"},
    base_modules=BASE_MODULES,
)
