"""Dense Qwen2 and Qwen2.5 (Qwen2ForCausalLM): Llama's layers with biases of queries, keys and values.

  config.json            in the network
  use_sliding_window     whether layers have a window at all
  sliding_window         positions that a token of such a layer attends to
  max_window_layers      the first layer that has the window, where layer_types does not say which have it

The smaller models have one matrix for embedding and head. Everything else is as in
`export.families.shared.llama_stack`. Several of these models are merged into a qwen2_moe (export/merge).
Source: transformers, models/qwen2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from export.architecture import Architecture, ConfigReader
from export.checkpoint.tensor_table import TensorSpec
from export.config_keys.rules import transformers_keys
from export.families import Family
from export.families.shared.llama_stack import (
    BASE_MODULES,
    dense_mlp,
    layer_name,
    read_stack_config,
    stack_graph,
    stack_head,
    stack_network,
    stack_tensors,
)
from export.families.shared.network import Network
from export.families.shared.transformers_config import read_windows, windows_of


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "qwen2"


def read_config(raw: Mapping[str, Any]) -> Architecture:
    """Read the Architecture from a Qwen2 config.json. Missing keys have the defaults of transformers' Qwen2Config.
    Raises ConfigError."""
    reader = ConfigReader(raw, "qwen2", transformers_keys("Qwen2Config"))
    return read_stack_config(
        reader, "qwen2", rope_base=1e4, norm_epsilon=1e-6, num_kv_heads=32, dense=True, **read_windows(reader)
    )


def tensors(architecture: Architecture, names: Sequence[str]) -> list[TensorSpec]:
    """The tensor table. Tensors have the same names in every checkpoint."""
    return stack_tensors(architecture, names, dense_mlp, biases="qkv")


def network(raw: Mapping[str, Any]) -> Network:
    """What the network computes; missing keys have the defaults of transformers' Qwen2Config."""
    return stack_network(raw, rope_theta=1e4, rms_norm_eps=1e-6, num_key_value_heads=32, dense=True, **windows_of(raw))


FAMILY = Family(
    name="qwen2",
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    decoder=stack_graph,
    head=stack_head,
    layer=layer_name,
    network=network,
    tokenizers={"qwen2": "Qwen2Tokenizer"},
    tokenizer_holds=True,
    base_modules=BASE_MODULES,
)
