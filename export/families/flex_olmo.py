"""flex_olmo (FlexOlmoForCausalLM, allenai/FlexOlmo-7x7B-1T): experts trained apart and joined, in OLMo-2's layers.

  config.json        in the network
  norm_topk_prob     whether the weights of the K chosen experts are divided by their sum; false in the published model

  ours                            published                             transformers 5's own, in memory
  mlp.gate [E, H]                 mlp.gate                              the same
  mlp.experts.gate_up             mlp.experts.{e}.gate_proj [F, H]      mlp.experts.gate_up_proj [E, 2F, H]:
    [E, 2F, H], rows alternate      and .up_proj [F, H]                   F rows of gate, then F of up
  mlp.experts.down [E, H, F]      mlp.experts.{e}.down_proj             mlp.experts.down_proj
  self_attn.q_norm [N*D]          self_attn.q_norm                      the same
  self_attn.k_norm [G*D]          self_attn.k_norm                      the same
  post_attention_layernorm [H]    post_attention_layernorm              the same
  post_feedforward_layernorm [H]  post_feedforward_layernorm            the same
all under model.layers.{i}. A layer is y = x + norm(attention(x)), then y + norm(mixture(y)): the two last norms are
those of outputs. Queries, keys and router are olmoe's, without its clip. Everything else is as in
`export.families.shared.llama_stack`.
Source: transformers, models/flex_olmo and conversion_mapping.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
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
    return config.get("model_type") == "flex_olmo"


def read_config(raw: Mapping[str, Any]) -> Architecture:
    """Read the Architecture from a flex_olmo config.json. Missing keys have the defaults of transformers'
    FlexOlmoConfig. Raises ConfigError."""
    reader = ConfigReader(raw, "flex_olmo", transformers_keys("FlexOlmoConfig"))
    reader.require("norm_topk_prob", [False, True], absent=False)
    return read_stack_config(
        reader,
        "flex_olmo",
        rope_base=5e5,
        norm_epsilon=1e-6,
        experts_key="num_experts",
        num_experts=7,
        experts_per_token=5,
        router=Router(normalise=bool(raw.get("norm_topk_prob"))),
        qkv=QueryKeyValue(norm="width"),
    )


def tensors(architecture: Architecture, names: Sequence[str]) -> list[TensorSpec]:
    """The tensor table. The parts have the names of the published files, or those of transformers 5's modules if the
    checkpoint has these."""
    return stack_tensors(architecture, names, module_experts(names), norms_after=True)


def network(raw: Mapping[str, Any]) -> Network:
    """What the network computes; missing keys have the defaults of transformers' FlexOlmoConfig."""
    return stack_network(
        raw,
        rope_theta=5e5,
        rms_norm_eps=1e-6,
        router=Router(normalise=raw.get("norm_topk_prob") or False),
        normed=True,
        norms_after=True,
    )


FAMILY = Family(
    name="flex_olmo",
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    decoder=partial(stack_graph, norms_after=True),
    head=stack_head,
    layer=layer_name,
    network=network,
    tokenizers={"flex_olmo": "TokenizersBackend"},
    base_modules=BASE_MODULES,
)
