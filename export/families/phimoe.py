"""phimoe (PhimoeForCausalLM, microsoft/Phi-3.5-MoE-instruct): Mixtral's layers with LayerNorms, biases, and the sparse
mixer of two experts.

  config.json             in the network
  rms_norm_eps            the epsilon of the LayerNorms, which have biases
  attention_bias          whether q, k, v and o have biases; true in the published model
  lm_head_bias            whether the head has one; true in the published model
  router_jitter_noise     by which the sparse mixer says which logits are near the largest (export.architecture.Router)
  input_jitter_noise      of training alone
  short_mscale            of rope_scaling: cos and sin are multiplied by it, in place of longrope's own factor, in texts
  long_mscale               of at most original_max_position_embeddings tokens, and by the other in longer ones

  ours                            published                                     transformers 5's own, in memory
  mlp.gate [E, H]                 block_sparse_moe.gate                         mlp.router
  mlp.experts.gate_up             block_sparse_moe.experts.{e}.w1 [F, H]        mlp.experts.gate_up_proj [E, 2F, H]:
    [E, 2F, H], rows alternate      and .w3 [F, H]                                F rows of w1, then F of w3
  mlp.experts.down [E, H, F]      block_sparse_moe.experts.{e}.w2               mlp.experts.down_proj
all under model.layers.{i}. Everything else is as in `export.families.shared.llama_stack`.
Source: transformers, models/phimoe and conversion_mapping.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from export import rotary
from export.architecture import Architecture, ConfigReader, Router
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
from export.families.shared.network import Network

_ROTARY = ("rope_scaling", "rope_parameters")
_FACTORS = ("short_mscale", "long_mscale")


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "phimoe"


def read_config(raw: Mapping[str, Any]) -> Architecture:
    """Read the Architecture from a phimoe config.json. Missing keys have the defaults of transformers' PhimoeConfig.
    Raises ConfigError."""
    reader = ConfigReader(_with_attention_factor(raw), "phimoe", transformers_keys("PhimoeConfig"))
    for key in _ROTARY:
        _check_rotary(reader, raw.get(key))
    for key in ("attention_bias", "lm_head_bias"):
        reader.require(key, [False, True], absent=False)
    reader.require("num_experts_per_tok", [2], absent=2)  # the sparse mixer chooses two, whatever this key says
    reader.harmless("sliding_window", "input_jitter_noise")
    return read_stack_config(
        reader,
        "phimoe",
        rope_base=1e6,
        norm_epsilon=1e-5,
        num_kv_heads=8,
        num_experts=16,
        sliding_window=None if raw.get("sliding_window") is None else reader.integer("sliding_window"),
        router=Router(score="sparse_mixer", normalise=False, jitter=reader.real("router_jitter_noise", absent=0.01)),
        attention_bias=raw.get("attention_bias") is True,
        head_bias=raw.get("lm_head_bias") is True,
    )


def _with_attention_factor(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with short_mscale under the name that longrope's factor has in other families."""
    told = dict(raw)
    for key in _ROTARY:
        values = raw.get(key)
        if isinstance(values, dict) and "short_mscale" in values:
            told[key] = {name: value for name, value in values.items() if name not in _FACTORS}
            told[key]["attention_factor"] = values["short_mscale"]
    return told


def _check_rotary(reader: ConfigReader, values: object) -> None:
    key = rotary.kind_key(values if isinstance(values, dict) else {})
    kind = values.get(key, "default") if isinstance(values, dict) else "default"
    if kind == "default":
        return
    if kind != "longrope":
        reader.problem(f"{key} is {kind!r}; moeship builds longrope and none for this family")
    short, long = (values.get(name) for name in _FACTORS) if isinstance(values, dict) else (None, None)
    if short is None or short != long:
        reader.problem(f"short_mscale is {short!r} and long_mscale is {long!r}; moeship builds equal numbers")


def tensors(architecture: Architecture, names: Sequence[str]) -> list[TensorSpec]:
    """The tensor table. The parts have the names of the published files, or those of transformers 5's modules if the
    checkpoint has these."""
    packed = any(name.endswith(".mlp.experts.gate_up_proj") for name in names)

    def mixture(facts: Architecture, layer: str) -> list[TensorSpec]:
        if not packed:
            return single_experts(facts, layer, f"{layer}.block_sparse_moe", ("w1", "w3", "w2"))
        experts = f"{layer}.mlp.experts"
        gate = f"{layer}.mlp.router.weight"
        return packed_experts(facts, layer, gate, f"{experts}.gate_up_proj", f"{experts}.down_proj")

    biases = "qkvo" if architecture.attention_bias else ""
    return stack_tensors(architecture, names, mixture, biases=biases, centred_norms=True)


def network(raw: Mapping[str, Any]) -> Network:
    """What the network computes; missing keys have the defaults of transformers' PhimoeConfig."""
    return stack_network(
        _with_attention_factor(raw),
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        num_key_value_heads=8,
        sliding_window=raw.get("sliding_window"),
        router=Router(score="sparse_mixer", normalise=False, jitter=raw.get("router_jitter_noise", 0.01)),
        centred_norms=True,
    )


FAMILY = Family(
    name="phimoe",
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    decoder=partial(stack_graph, centred_norms=True),
    head=partial(stack_head, centred_norms=True),
    layer=layer_name,
    network=network,
    tokenizers={"phimoe": "TokenizersBackend"},
    base_modules=BASE_MODULES,
)
