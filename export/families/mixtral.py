"""Mixtral: Llama's attention with grouped key/value heads and E SwiGLU experts, in either of its two spellings.

  ours                          transformers 4 and the published files        transformers 5, packed
  mlp.gate [E, H]               block_sparse_moe.gate                         mlp.gate
  mlp.experts.gate_up           block_sparse_moe.experts.{e}.w1 [F, H] and    mlp.experts.gate_up_proj [E, 2F, H]:
    [E, 2F, H], rows alternate    .w3 [F, H]                                    F rows of w1, then F of w3
  mlp.experts.down [E, H, F]    block_sparse_moe.experts.{e}.w2               mlp.experts.down_proj
  self_attn.qkv_proj            self_attn.{q,k,v}_proj                        the same
all under model.layers.{i}; embedding, norms, o_proj and head have the checkpoint's own names. Nothing has a bias.

An expert is w2(silu(w1 x) * w3 x). The router takes the softmax over all experts, and divides the K largest values by
their sum, which equals the softmax over the K largest logits. Everything else is as in
`export.families.shared.llama_stack`.
Source: transformers, models/mixtral and conversion_mapping.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from export.architecture import Architecture, ConfigReader
from export.checkpoint.tensor_table import TensorSpec
from export.config_keys.rules import transformers_keys
from export.families import Family
from export.families.shared.llama_stack import (
    BASE_MODULES,
    layer_name,
    packed_experts,
    read_stack_config,
    single_experts,
    stack_graph,
    stack_head,
    stack_network,
    stack_tensors,
)
from export.families.shared.llama_trtllm import llama_class
from export.families.shared.network import Network
from export.families.shared.trtllm_network import LlmApiModel


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "mixtral"


def read_config(raw: Mapping[str, Any]) -> Architecture:
    """Read the Architecture from a Mixtral config.json. Missing keys have the defaults of transformers' MixtralConfig.
    Raises ConfigError."""
    reader = ConfigReader(raw, "mixtral", transformers_keys("MixtralConfig"))
    reader.harmless("sliding_window")
    return read_stack_config(
        reader,
        "mixtral",
        rope_base=1e6,
        norm_epsilon=1e-5,
        num_kv_heads=8,
        sliding_window=None if raw.get("sliding_window") is None else reader.integer("sliding_window"),
    )


def tensors(architecture: Architecture, names: Sequence[str]) -> list[TensorSpec]:
    """The tensor table. The parts have the names that the checkpoint uses; if `names` is empty, those of the published
    files."""
    return stack_tensors(architecture, names, _packed_experts if _is_packed(names) else _single_experts)


def _is_packed(names: Iterable[str]) -> bool:
    return any(name.endswith(".mlp.experts.gate_up_proj") for name in names)


def _single_experts(architecture: Architecture, layer: str) -> list[TensorSpec]:
    """The rows of one layer's mixture, for a checkpoint in which each expert has three tensors."""
    return single_experts(architecture, layer, f"{layer}.block_sparse_moe", ("w1", "w3", "w2"))


def _packed_experts(architecture: Architecture, layer: str) -> list[TensorSpec]:
    """The rows of one layer's mixture, for a checkpoint that keeps all experts in two tensors."""
    experts = f"{layer}.mlp.experts"
    return packed_experts(
        architecture, layer, f"{layer}.mlp.gate.weight", f"{experts}.gate_up_proj", f"{experts}.down_proj"
    )


def network(raw: Mapping[str, Any]) -> Network:
    """What the network computes; missing keys have the defaults of transformers' MixtralConfig."""
    return stack_network(
        raw, rope_theta=1e6, rms_norm_eps=1e-5, num_key_value_heads=8, sliding_window=raw.get("sliding_window")
    )


FAMILY = Family(
    name="mixtral",
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    decoder=stack_graph,
    head=stack_head,
    layer=layer_name,
    network=network,
    tokenizers={"mixtral": "TokenizersBackend"},
    base_modules=BASE_MODULES,
    # Source: tensorrt_llm/_torch/models/modeling_mixtral.py.
    llm_api=LlmApiModel(architecture="MixtralForCausalLM", experts="block_sparse_moe.experts"),
    trtllm=llama_class("MixtralForCausalLM"),
)
