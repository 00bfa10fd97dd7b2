"""qwen3_moe (Qwen3MoeForCausalLM, Qwen/Qwen3-30B-A3B): Llama's layers with norms of each head's queries and keys, many
experts, and layers that may be dense.

  config.json             in the network
  head_dim                D, apart from hidden_size / num_attention_heads
  moe_intermediate_size   F of an expert
  intermediate_size       F of the MLP of layers without experts
  decoder_sparse_step     layer i has experts if i + 1 is a multiple of it ...
  mlp_only_layers         ... and i is not in this list
  norm_topk_prob          whether the weights of the K chosen experts are divided by their sum; true in published models
  use_sliding_window      whether all layers look back on sliding_window positions; max_window_layers is then refused,
                          since the class ignores it and other programs do not

  ours                            published                             transformers 5's own, in memory
  mlp.gate [E, H]                 mlp.gate                              the same
  mlp.experts.gate_up             mlp.experts.{e}.gate_proj [F, H]      mlp.experts.gate_up_proj [E, 2F, H]:
    [E, 2F, H], rows alternate      and .up_proj [F, H]                   F rows of gate, then F of up
  mlp.experts.down [E, H, F]      mlp.experts.{e}.down_proj             mlp.experts.down_proj
  self_attn.q_norm, .k_norm [D]   the same                              the same
all under model.layers.{i}. Each head's queries and keys are normalised before the rotary embedding. The router takes
the softmax over all experts. Everything else is as in `export.families.shared.llama_stack`.
Source: transformers, models/qwen3_moe and conversion_mapping.py.
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
    dense_between,
    layer_name,
    module_experts,
    read_stack_config,
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
    return config.get("model_type") == "qwen3_moe"


def read_config(raw: Mapping[str, Any]) -> Architecture:
    """Read the Architecture from a qwen3_moe config.json. Missing keys have the defaults of transformers'
    Qwen3MoeConfig. Raises ConfigError."""
    reader = ConfigReader(raw, "qwen3_moe", transformers_keys("Qwen3MoeConfig"))
    reader.require("norm_topk_prob", [False, True], absent=False)
    reader.require("use_sliding_window", [False, True], absent=False)
    windowed = raw.get("use_sliding_window") and ("sliding_window" not in raw or raw["sliding_window"] is not None)
    reader.harmless("sliding_window", *([] if windowed else ["max_window_layers"]))
    return read_stack_config(
        reader,
        "qwen3_moe",
        rope_base=1e4,
        norm_epsilon=1e-6,
        num_kv_heads=4,
        sliding_window=reader.integer("sliding_window", absent=4096) if windowed else None,
        experts_key="num_local_experts",
        num_experts=128,
        experts_per_token=8,
        width_key="moe_intermediate_size",
        router=Router(normalise=bool(raw.get("norm_topk_prob"))),
        qkv=QueryKeyValue(norm="head"),
        **read_dense_layers(reader),
    )


def tensors(architecture: Architecture, names: Sequence[str]) -> list[TensorSpec]:
    """The tensor table. The parts have the names of the published files, or those of transformers 5's modules if the
    checkpoint has these."""
    return stack_tensors(architecture, names, module_experts(names))


def network(raw: Mapping[str, Any]) -> Network:
    """What the network computes; missing keys have the defaults of transformers' Qwen3MoeConfig."""
    windowed = raw.get("use_sliding_window", False)
    return stack_network(
        raw,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        num_key_value_heads=4,
        sliding_window=raw.get("sliding_window", 4096) if windowed else None,
        router=Router(normalise=raw.get("norm_topk_prob") or False),
        dense=dense_between(raw),
        normed=True,
    )


FAMILY = Family(
    name="qwen3_moe",
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    decoder=stack_graph,
    head=stack_head,
    layer=layer_name,
    network=network,
    tokenizers={"qwen3_moe": "Qwen2Tokenizer"},
    base_modules=BASE_MODULES,
    # Source: tensorrt_llm/_torch/models/modeling_qwen3_moe.py, whose router always divides by the sum.
    llm_api=LlmApiModel(architecture="Qwen3MoeForCausalLM", experts="mlp.experts", head_norms=True),
    trtllm=qwen_class("Qwen3MoeForCausalLM", "qwen3_moe", head_norms=True, module="qwen3_moe"),
)
