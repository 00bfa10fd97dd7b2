"""granitemoe (GraniteMoeForCausalLM, ibm-granite/granite-3.0-1b-a400m): Mixtral's network with four scalars.

  config.json             in the network
  embedding_multiplier    factor of the embedding's rows
  attention_multiplier    factor of the products of query and key, instead of 1/sqrt(D)
  residual_multiplier     factor of the outputs of attention and of the mixture, before they are added to the residual
  logits_scaling          divisor of the logits

  ours                            published                                     transformers 5's own, in memory
  mlp.gate [E, H]                 block_sparse_moe.router.layer.weight          block_sparse_moe.router.weight
  mlp.experts.gate_up             block_sparse_moe.input_linear.weight          block_sparse_moe.experts.gate_up_proj
    [E, 2F, H], rows alternate      [E, 2F, H]: F rows of gate, then F of up
  mlp.experts.down [E, H, F]      block_sparse_moe.output_linear.weight         block_sparse_moe.experts.down_proj
all under model.layers.{i}. The router takes the K largest logits, then the softmax over those K. Everything else is as
in `export.families.shared.llama_stack`.
Source: transformers, models/granitemoe and conversion_mapping.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from export.architecture import Architecture, ConfigReader, Scales
from export.checkpoint.tensor_table import TensorSpec
from export.config_keys.rules import transformers_keys
from export.families import Family
from export.families.shared.llama_stack import (
    BASE_MODULES,
    layer_name,
    packed_experts,
    read_stack_config,
    stack_graph,
    stack_head,
    stack_network,
    stack_tensors,
)
from export.families.shared.network import Network

_SCALARS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "granitemoe"


def read_config(raw: Mapping[str, Any]) -> Architecture:
    """Read the Architecture from a granitemoe config.json. Raises ConfigError.

    Missing keys have the defaults of transformers' GraniteMoeConfig, where attention_multiplier is 1 and not 1/sqrt(D).
    """
    reader = ConfigReader(raw, "granitemoe", transformers_keys("GraniteMoeConfig"))
    embedding, residual, attention, logits = (reader.real(key, absent=1.0) for key in _SCALARS)
    return read_stack_config(
        reader,
        "granitemoe",
        rope_base=1e4,
        norm_epsilon=1e-6,
        scales=Scales(embedding=embedding, residual=residual, attention=attention, logits=logits),
    )


def tensors(architecture: Architecture, names: Sequence[str]) -> list[TensorSpec]:
    """The tensor table. The parts have the names of the published files, or those of transformers 5's modules if the
    checkpoint has these."""
    packed = any(name.endswith(".block_sparse_moe.experts.gate_up_proj") for name in names)
    gate, gate_up, down = (
        ("router.weight", "experts.gate_up_proj", "experts.down_proj")
        if packed
        else ("router.layer.weight", "input_linear.weight", "output_linear.weight")
    )

    def mixture(facts: Architecture, layer: str) -> list[TensorSpec]:
        name = f"{layer}.block_sparse_moe"
        return packed_experts(facts, layer, f"{name}.{gate}", f"{name}.{gate_up}", f"{name}.{down}")

    return stack_tensors(architecture, names, mixture)


def network(raw: Mapping[str, Any]) -> Network:
    """What the network computes; missing keys have the defaults of transformers' GraniteMoeConfig."""
    return stack_network(
        raw,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        embedding=raw.get("embedding_multiplier", 1.0),
        attention=raw.get("attention_multiplier", 1.0),
        residual=raw.get("residual_multiplier", 1.0),
        logits=raw.get("logits_scaling", 1.0),
    )


FAMILY = Family(
    name="granitemoe",
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    decoder=stack_graph,
    head=stack_head,
    layer=layer_name,
    network=network,
    tokenizers={"granitemoe": "TokenizersBackend"},
    base_modules=BASE_MODULES,
)
