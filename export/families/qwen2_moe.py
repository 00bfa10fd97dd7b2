"""qwen2_moe (Qwen2MoeForCausalLM, Qwen/Qwen1.5-MoE-A2.7B): Llama's layers with biases of queries, keys and values, and
an MLP that all tokens go through beside the experts.

  config.json                       in the network
  moe_intermediate_size             F of an expert
  shared_expert_intermediate_size   F of the MLP beside the experts
  intermediate_size                 F of the MLP of layers without experts
  decoder_sparse_step               layer i has experts if i + 1 is a multiple of it ...
  mlp_only_layers                   ... and i is not in this list
  norm_topk_prob                    whether the weights of the K chosen experts are divided by their sum
  use_sliding_window                refused: the class and the published code choose other layers for the window

  ours                              published                             transformers 5's own, in memory
  mlp.gate [E, H]                   mlp.gate                              the same
  mlp.experts.gate_up               mlp.experts.{e}.gate_proj [F, H]      mlp.experts.gate_up_proj [E, 2F, H]:
    [E, 2F, H], rows alternate        and .up_proj [F, H]                   F rows of gate, then F of up
  mlp.experts.down [E, H, F]        mlp.experts.{e}.down_proj             mlp.experts.down_proj
  mlp.shared_expert.gate_proj,      the same                              the same
    .up_proj, .down_proj
  mlp.shared_expert_gate [1, H]     the same                              the same
  self_attn.qkv_proj.bias           self_attn.{q,k,v}_proj.bias           the same
all under model.layers.{i}. The mixture's output is that of the chosen experts, plus that of the shared expert times the
sigmoid of its gate. Everything else is as in `export.families.shared.llama_stack`.
Source: transformers, models/qwen2_moe and conversion_mapping.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from export.architecture import Architecture, ConfigReader, Router
from export.checkpoint.tensor_table import TensorSpec
from export.config_keys.rules import transformers_keys
from export.families import Family
from export.families.shared.llama_stack import (
    BASE_MODULES,
    dense_between,
    layer_name,
    module_experts,
    read_stack_config,
    shared_expert,
    stack_graph,
    stack_head,
    stack_network,
    stack_tensors,
)
from export.families.shared.llama_trtllm import qwen_class
from export.families.shared.network import Network
from export.families.shared.transformers_config import read_dense_layers
from export.families.shared.trtllm_network import LlmApiModel


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "qwen2_moe"


def read_config(raw: Mapping[str, Any]) -> Architecture:
    """Read the Architecture from a qwen2_moe config.json. Missing keys have the defaults of transformers'
    Qwen2MoeConfig. Raises ConfigError."""
    reader = ConfigReader(raw, "qwen2_moe", transformers_keys("Qwen2MoeConfig"))
    reader.require("norm_topk_prob", [False, True], absent=False)
    reader.require("qkv_bias", [True], absent=True)
    reader.require("use_sliding_window", [False], absent=False)
    reader.harmless("sliding_window", "max_window_layers")
    return read_stack_config(
        reader,
        "qwen2_moe",
        rope_base=1e4,
        norm_epsilon=1e-6,
        num_kv_heads=16,
        experts_key="num_experts",
        num_experts=60,
        experts_per_token=4,
        width_key="moe_intermediate_size",
        router=Router(normalise=bool(raw.get("norm_topk_prob"))),
        shared_ffn_size=reader.integer("shared_expert_intermediate_size"),
        **read_dense_layers(reader),
    )


def tensors(architecture: Architecture, names: Sequence[str]) -> list[TensorSpec]:
    """The tensor table. The parts have the names of the published files, or those of transformers 5's modules if the
    checkpoint has these."""
    experts = module_experts(names)

    def mixture(facts: Architecture, layer: str) -> list[TensorSpec]:
        return [*experts(facts, layer), *shared_expert(facts, layer)]

    return stack_tensors(architecture, names, mixture, biases="qkv")


def network(raw: Mapping[str, Any]) -> Network:
    """What the network computes; missing keys have the defaults of transformers' Qwen2MoeConfig."""
    return stack_network(
        raw,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        num_key_value_heads=16,
        router=Router(normalise=raw.get("norm_topk_prob") or False),
        dense=dense_between(raw),
        shared=True,
    )


FAMILY = Family(
    name="qwen2_moe",
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    decoder=stack_graph,
    head=stack_head,
    layer=layer_name,
    network=network,
    tokenizers={"qwen2_moe": "Qwen2Tokenizer"},
    base_modules=BASE_MODULES,
    # Source: tensorrt_llm/_torch/models/modeling_qwen_moe.py, whose router never divides by the sum.
    llm_api=LlmApiModel(
        architecture="Qwen2MoeForCausalLM",
        experts="mlp.experts",
        routers=(Router(normalise=False),),
        shared_expert=True,
    ),
    trtllm=qwen_class("Qwen2MoeForCausalLM", "qwen2_moe", shared_expert=True, module=None),
)
