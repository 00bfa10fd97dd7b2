"""gpt_oss (GptOssForCausalLM, openai/gpt-oss-20b): biases everywhere, sinks in attention, windows in every other layer.

  config.json              in the network
  layer_types              the layers of "sliding_attention" attend to sliding_window positions, those of
                           "full_attention" to all; where it is absent, the first layer slides and every other one
  swiglu_alpha, _limit     an expert is down((up + 1) * gate * sigmoid(alpha * gate)), gate held at most at the limit,
                           and up within -limit and limit

  ours                         openai's files, MXFP4                     transformers' own, floats
  mlp.gate [E, H] and bias     mlp.router.weight and .bias               the same
  mlp.experts.gate_up          mlp.experts.gate_up_proj_blocks           mlp.experts.gate_up_proj [E, H, 2F]
    [E, 2F, H], rows alternate   and _scales, rows alternate too           columns alternate
  mlp.experts.down [E, H, F]   mlp.experts.down_proj_blocks, _scales     mlp.experts.down_proj [E, F, H]
  biases of both               mlp.experts.gate_up_proj_bias [E, 2F]     the same
                                 and down_proj_bias [E, H]
  self_attn.sinks [N]          self_attn.sinks                           the same
all under model.layers.{i}. The four matrices of attention and the router have biases. A sink is a logit of its head's
softmax that gives nothing to the output. The router takes the K largest logits, then the softmax over those K.
Everything else is as in `export.families.shared.llama_stack`.
Source: transformers, models/gpt_oss and integrations/mxfp4.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from export.architecture import MAX_LAYERS, Architecture, ConfigReader, SwiGlu
from export.checkpoint.tensor_table import Part, Role, TensorSpec, single, stacked
from export.config_keys.rules import transformers_keys
from export.errors import shown
from export.families import Family
from export.families.shared.llama_stack import (
    BASE_MODULES,
    layer_name,
    read_stack_config,
    stack_graph,
    stack_head,
    stack_network,
    stack_tensors,
)
from export.families.shared.network import Network

_WINDOW, _ALPHA, _LIMIT = 128, 1.702, 7.0
_SLIDING, _FULL = "sliding_attention", "full_attention"
_BASE, _EPSILON = 150000.0, 1e-5
_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "gpt_oss"


def _with_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the values of transformers' GptOssConfig for a missing head size and rotary embedding. An empty
    rope_parameters is not missing: the class takes it for an embedding without scaling."""
    is_stated = raw.get("rope_scaling") or raw.get("rope_parameters") is not None
    return {"head_dim": 64, **raw, **({} if is_stated else {"rope_parameters": dict(_ROPE)})}


def _full_layers(types: Sequence[str] | None, num_layers: int) -> tuple[int, ...]:
    return tuple(layer for layer in range(num_layers) if (layer % 2 if types is None else types[layer] == _FULL))


def read_config(raw: Mapping[str, Any]) -> Architecture:
    """Read the Architecture from a gpt_oss config.json. Missing keys have the defaults of transformers' GptOssConfig.
    Raises ConfigError."""
    reader = ConfigReader(_with_defaults(raw), "gpt_oss", transformers_keys("GptOssConfig"))
    layers, types = reader.integer("num_hidden_layers", maximum=MAX_LAYERS), raw.get("layer_types")
    reader.harmless("layer_types", "initial_context_length", "experts_per_token")  # the latter two are OpenAI's own
    is_list = isinstance(types, list) and len(types) == layers
    if types is not None and not (is_list and all(one in (_SLIDING, _FULL) for one in types)):
        reader.problem(f"layer_types is {shown(types, 80)}, expected {_SLIDING} or {_FULL} for each of {layers} layers")
        types = None
    return read_stack_config(
        reader,
        "gpt_oss",
        rope_base=_BASE,
        norm_epsilon=_EPSILON,
        num_kv_heads=8,
        sliding_window=reader.integer("sliding_window", absent=_WINDOW),
        full_layers=_full_layers(types, layers),
        num_experts=128,
        experts_per_token=4,
        attention_bias=True,
        swiglu=SwiGlu(
            alpha=reader.real("swiglu_alpha", absent=_ALPHA), beta=1.0, limit=reader.real("swiglu_limit", absent=_LIMIT)
        ),
    )


def tensors(architecture: Architecture, names: Sequence[str]) -> list[TensorSpec]:
    """The tensor table. Experts are those of OpenAI's files, or transformers' own if the checkpoint has these."""
    floats = frozenset(name for name in names if name.endswith("_proj"))
    return stack_tensors(architecture, names, partial(_mixture, floats=floats), biases="qkvo", sinks=True)


def _mixture(facts: Architecture, layer: str, *, floats: frozenset[str]) -> list[TensorSpec]:
    number, hidden, width = facts.num_experts, facts.hidden_size, facts.ffn_size
    router = f"{layer}.mlp.router"
    rows = [
        single(f"{layer}.mlp.gate.weight", (number, hidden), "E H", Role.ROUTER, stored_name=f"{router}.weight"),
        single(f"{layer}.mlp.gate.bias", (number,), "E", Role.ROUTER, stored_name=f"{router}.bias"),
    ]
    for ours, outputs, inputs, letters in (("gate_up", 2 * width, hidden, "2F H"), ("down", hidden, width, "H F")):
        theirs = f"{layer}.mlp.experts.{ours}_proj"
        turned = theirs in floats
        name, stored = (theirs, (inputs, outputs)) if turned else (f"{theirs}_blocks", (outputs, inputs))
        part = partial(Part, name=name, shape=(outputs, inputs), stored_shape=(number, *stored), transposed=turned)
        bias = partial(Part, name=f"{theirs}_bias", shape=(outputs,), stored_shape=(number, outputs))
        starts = range(0, number * outputs, outputs)
        matrices, vectors = ([one(first_row=start) for start in starts] for one in (part, bias))
        rows += [
            stacked(f"{layer}.mlp.experts.{ours}.weight", matrices, f"E {letters}", Role.EXPERT),
            stacked(f"{layer}.mlp.experts.{ours}.bias", vectors, f"E {letters.split()[0]}", Role.BIAS),
        ]
    return rows


def network(raw: Mapping[str, Any]) -> Network:
    """What the network computes; missing keys have the defaults of transformers' GptOssConfig."""
    return stack_network(
        _with_defaults(raw),
        rope_theta=_BASE,
        rms_norm_eps=_EPSILON,
        num_key_value_heads=8,
        sliding_window=raw.get("sliding_window", _WINDOW),
        full_layers=_full_layers(raw.get("layer_types"), raw["num_hidden_layers"]),
        sinks=True,
        swiglu=SwiGlu(alpha=raw.get("swiglu_alpha", _ALPHA), beta=1.0, limit=raw.get("swiglu_limit", _LIMIT)),
    )


FAMILY = Family(
    name="gpt_oss",
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    decoder=stack_graph,
    head=stack_head,
    layer=layer_name,
    network=network,
    base_modules=BASE_MODULES,
)
