"""olmoe (OlmoeForCausalLM, allenai/OLMoE-1B-7B-0924): Llama's layers with norms of queries and keys, and many experts.

  config.json        in the network
  clip_qkv           queries, keys and values are held within -clip_qkv and clip_qkv; null: they stay
  norm_topk_prob     whether the weights of the K chosen experts are divided by their sum; false in the published model

  ours                            published                             transformers 5's own, in memory
  mlp.gate [E, H]                 mlp.gate                              the same
  mlp.experts.gate_up             mlp.experts.{e}.gate_proj [F, H]      mlp.experts.gate_up_proj [E, 2F, H]:
    [E, 2F, H], rows alternate      and .up_proj [F, H]                   F rows of gate, then F of up
  mlp.experts.down [E, H, F]      mlp.experts.{e}.down_proj             mlp.experts.down_proj
  self_attn.q_norm [N*D]          self_attn.q_norm                      the same
  self_attn.k_norm [G*D]          self_attn.k_norm                      the same
all under model.layers.{i}. Queries and keys are each normalised over their whole width, before the rotary embedding,
and then clipped. The router takes the softmax over all experts, and the K largest values are the weights as they are.
Everything else is as in `export.families.shared.llama_stack`.
Source: transformers, models/olmoe and conversion_mapping.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from export.architecture import Architecture, ConfigReader, QueryKeyValue, Router
from export.checkpoint.tensor_table import TensorSpec
from export.config_keys.rules import transformers_keys
from export.families import Family
from export.families.shared.llama_stack import (
    BASE_MODULES,
    layer_name,
    module_experts,
    read_stack_config,
    stack_graph,
    stack_head,
    stack_network,
    stack_tensors,
)
from export.families.shared.network import Network


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "olmoe"


def read_config(raw: Mapping[str, Any]) -> Architecture:
    """Read the Architecture from an olmoe config.json. Missing keys have the defaults of transformers' OlmoeConfig.
    Raises ConfigError."""
    reader = ConfigReader(raw, "olmoe", transformers_keys("OlmoeConfig"))
    reader.require("norm_topk_prob", [False, True], absent=False)
    reader.harmless("clip_qkv")
    return read_stack_config(
        reader,
        "olmoe",
        rope_base=1e4,
        norm_epsilon=1e-5,
        experts_key="num_experts",
        num_experts=64,
        experts_per_token=8,
        router=Router(normalise=bool(raw.get("norm_topk_prob"))),
        qkv=QueryKeyValue(norm="width", clip=None if raw.get("clip_qkv") is None else reader.real("clip_qkv")),
    )


def tensors(architecture: Architecture, names: Sequence[str]) -> list[TensorSpec]:
    """The tensor table. The parts have the names of the published files, or those of transformers 5's modules if the
    checkpoint has these."""
    return stack_tensors(architecture, names, module_experts(names))


def network(raw: Mapping[str, Any]) -> Network:
    """What the network computes; missing keys have the defaults of transformers' OlmoeConfig."""
    return stack_network(
        raw,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        router=Router(normalise=raw.get("norm_topk_prob") or False),
        normed=True,
        clip=raw.get("clip_qkv"),
    )


FAMILY = Family(
    name="olmoe",
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    decoder=stack_graph,
    head=stack_head,
    layer=layer_name,
    network=network,
    tokenizers={"olmoe": "GPTNeoXTokenizer"},
    base_modules=BASE_MODULES,
)
