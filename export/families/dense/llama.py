"""Dense Llama: `export.families.shared.llama_stack` with an MLP, under the names of transformers' LlamaForCausalLM.

Models with biases (attention_bias, mlp_bias) are refused. Several of these models are merged into a Mixtral
(export/merge).
Source: transformers, models/llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.architecture import Architecture, ConfigReader
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


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "llama"


def read_config(raw: Mapping[str, Any]) -> Architecture:
    """Read the Architecture from a Llama config.json. Missing keys have the defaults of transformers' LlamaConfig.
    Raises ConfigError."""
    reader = ConfigReader(raw, "llama", transformers_keys("LlamaConfig"))
    reader.require("mlp_bias", [False], absent=False)
    return read_stack_config(reader, "llama", rope_base=1e4, norm_epsilon=1e-6, dense=True)


def network(raw: Mapping[str, Any]) -> Network:
    """What the network computes; missing keys have the defaults of transformers' LlamaConfig."""
    return stack_network(raw, rope_theta=1e4, rms_norm_eps=1e-6, dense=True)


FAMILY = Family(
    name="llama",
    matches=matches,
    read_config=read_config,
    tensors=dense_tensors,
    decoder=stack_graph,
    head=stack_head,
    layer=layer_name,
    network=network,
    base_modules=BASE_MODULES,
)
