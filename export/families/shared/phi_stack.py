"""Code for Phi-2 and phixtral: the phi-msft configuration, the layers without their MLPs, and the head.

  transformer.embd.wte.weight                      [V, H]
  transformer.h.{i}.ln.{weight,bias}               [H]
  transformer.h.{i}.mixer.Wqkv.{weight,bias}       [(N+2G)*D, H]   query | key | value
  transformer.h.{i}.mixer.out_proj.{weight,bias}   [H, N*D]
  lm_head.ln.{weight,bias}                         [H]
  lm_head.linear.{weight,bias}                     [V, H]

Attention and MLP of a layer have the same normed input: the layer computes x + attention(ln(x)) + mlp(ln(x)). The
rotary embedding covers the first rotary_dim of each head's D, in half-split order, with base 10000.
Source: the modeling_phi.py published with microsoft/phi-2 before its move into transformers, and mlx-lm's phixtral.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from export import rotary
from export.architecture import (
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_POSITIONS,
    Architecture,
    ConfigReader,
)
from export.checkpoint.tensor_table import Role, TensorSpec, single
from export.config_keys.rules import PHI_MSFT, resolved
from export.families.shared.network import Activation, Attention, Layer, Mlp, Network, Norm
from export.families.shared.transformers_config import check_heads, refuse_quantized
from export.families.shared.trtllm_network import TrtllmNetwork

if TYPE_CHECKING:
    from export.onnx_graph.graph import GraphBuilder

EMBEDDING = "transformer.embd.wte.weight"
FINAL_NORM = "lm_head.ln"
HEAD = "lm_head.linear"
ROPE_BASE = 10000.0
# Names of one function in transformers' ACT2FN (activations.py): GELU in its tanh form.
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
# Our module names -> those of transformers' Phi, at the top of the model and inside a layer.
TRANSFORMERS_TOP = {
    EMBEDDING.rpartition(".")[0]: "model.embed_tokens",
    FINAL_NORM: "model.final_layernorm",
    HEAD: "lm_head",
}
TRANSFORMERS_MODULES = {
    "ln": "input_layernorm",
    "mixer.out_proj": "self_attn.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# Buffers that some exports keep; every engine recomputes them.
BASE_MODULES = {
    "embd": "transformer",
    "h": "transformer",
    "embed_tokens": "model",
    "layers": "model",
    "final_layernorm": "model",
}
HARMLESS_TENSORS = ("causal_mask", "mask")


def layer_name(layer: int) -> str:
    return f"transformer.h.{layer}"


def transformers_name(name: str) -> str | None:
    """The name of a row in transformers' Phi; None for a row of a mixture. "{}" in it stands for q, k and v, which are
    one row of the table and three tensors there."""
    stem, _, kind = name.rpartition(".")
    if stem in TRANSFORMERS_TOP:
        return f"{TRANSFORMERS_TOP[stem]}.{kind}"
    layer, module = stem.removeprefix(layer_name(0)[:-1]).split(".", 1)
    theirs = "self_attn.{}_proj" if module == "mixer.Wqkv" else TRANSFORMERS_MODULES.get(module)
    return f"model.layers.{layer}.{theirs}.{kind}" if theirs else None


def transformers_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert the keys of a phi-msft config.json to those of transformers' PhiConfig, from the JSON alone. Missing keys
    have the defaults of the published configuration_phi.py. A config.json of transformers is returned as it is."""
    if raw["model_type"] == "phi":
        return raw
    raw = resolved(raw, PHI_MSFT)
    hidden, heads = raw["n_embd"], raw["n_head"]
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": raw.get("n_inner") or 4 * hidden,
        "num_hidden_layers": raw["n_layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("n_head_kv") or heads,
        "max_position_embeddings": raw["n_positions"],
        "layer_norm_eps": raw["layer_norm_epsilon"],
        "hidden_act": raw["activation_function"],
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_id": raw.get("eos_token_id"),
        "rope_theta": 10000.0,
        # transformers takes int(D * factor); adding 0.25 keeps rounding from losing a dimension.
        "partial_rotary_factor": (raw["rotary_dim"] + 0.25) / (hidden // heads),
    }


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a raw config has more than one expert. False for a value that is not a number, which `read_msft_config`
    refuses."""
    number = config.get("num_local_experts")
    return isinstance(number, int) and number > 1


def read_msft_config(raw: Mapping[str, Any], family: str) -> Architecture:
    """Read the Architecture from a phi-msft config.json, dense or with experts. Raises ConfigError."""
    reader = ConfigReader(raw, family, PHI_MSFT)
    reader.explain("rope_scaling", "the published modeling_phi.py does not scale the rotary embedding")
    refuse_quantized(reader)
    hidden, heads = reader.integer("n_embd"), reader.integer("n_head")
    experts = reader.integer("num_local_experts", absent=0, minimum=0, maximum=MAX_EXPERTS)
    reader.require("activation_function", GELU_TANH)
    reader.require("tie_word_embeddings", [False], absent=False)
    reader.require("img_processor", [None])
    # The published code does not read these; other values belong to another model.
    reader.require("rope_theta", [ROPE_BASE], absent=ROPE_BASE)
    reader.require("head_dim", [hidden // heads], absent=hidden // heads)
    if hidden % heads:
        reader.problem(f"{reader.spelled('n_embd')} {hidden} is not a multiple of {reader.spelled('n_head')} {heads}")
    # 2 is the default of the published configuration_phi.py. A dense config may have the key too.
    per_token = reader.integer("num_experts_per_tok", absent=2, minimum=1 if experts > 1 else 0)
    if experts > 1 and per_token > experts:
        reader.problem(f"num_experts_per_tok is {per_token}, expected 1 to num_local_experts = {experts}")
    architecture = Architecture(
        family=family,
        hidden_size=hidden,
        num_layers=reader.integer("n_layer", maximum=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=reader.integer("n_head_kv", absent=heads, null=heads),
        head_size=max(1, hidden // heads),
        ffn_size=reader.integer("n_inner", absent=4 * hidden, null=4 * hidden),
        vocab_size=reader.integer("vocab_size"),
        num_experts=experts if experts > 1 else 0,
        experts_per_token=per_token if experts > 1 else 0,
        rotary_dim=reader.integer("rotary_dim"),
        rope_base=ROPE_BASE,
        norm_epsilon=reader.real("layer_norm_epsilon"),
        max_positions=reader.integer("n_positions", maximum=MAX_POSITIONS),
        source_dtype=reader.text("torch_dtype") or reader.text("dtype"),
    )
    reader.harmless("torch_dtype", "dtype")
    check_heads(reader, architecture)
    reader.finish()
    return architecture


def stack_tensors(architecture: Architecture, mlp: Callable[[Architecture, int], list[TensorSpec]]) -> list[TensorSpec]:
    """The tensor table with phi-msft names; `mlp(architecture, layer)` returns the rows that differ between families:
    those of a layer's MLP or mixture."""
    hidden = architecture.hidden_size
    queries = architecture.num_heads * architecture.head_size
    packed = queries + 2 * architecture.num_kv_heads * architecture.head_size
    specs = [single(EMBEDDING, (architecture.vocab_size, hidden), "V H", Role.EMBEDDING)]
    for layer in range(architecture.num_layers):
        name = layer_name(layer)
        specs += [
            single(f"{name}.ln.weight", (hidden,), "H", Role.NORM),
            single(f"{name}.ln.bias", (hidden,), "H", Role.NORM),
            single(f"{name}.mixer.Wqkv.weight", (packed, hidden), "(N+2G)D H", Role.ATTENTION),
            single(f"{name}.mixer.Wqkv.bias", (packed,), "(N+2G)D", Role.BIAS),
            single(f"{name}.mixer.out_proj.weight", (hidden, queries), "H ND", Role.ATTENTION),
            single(f"{name}.mixer.out_proj.bias", (hidden,), "H", Role.BIAS),
            *mlp(architecture, layer),
        ]
    return [
        *specs,
        single(f"{FINAL_NORM}.weight", (hidden,), "H", Role.NORM),
        single(f"{FINAL_NORM}.bias", (hidden,), "H", Role.NORM),
        single(f"{HEAD}.weight", (architecture.vocab_size, hidden), "V H", Role.HEAD),
        single(f"{HEAD}.bias", (architecture.vocab_size,), "V", Role.BIAS),
    ]


def stack_network(raw: Mapping[str, Any], mlp: str, gate: str | None = None) -> Network:
    """What the network computes, from a config.json of phi-msft or of transformers. Missing keys have the defaults of
    transformers' PhiConfig. `mlp` is the path of the modules fc1 and fc2 in a layer, `gate` the path of the router."""
    config = transformers_config(raw)
    turned = rotary.parameters(config, 10000.0, 0.5)
    heads = config["num_attention_heads"]
    epsilon = config.get("layer_norm_eps", 1e-5)
    scaling = rotary.scaling_of(turned, config["max_position_embeddings"])

    def norm(name: str) -> Norm:
        return Norm(name=name, centred=True, epsilon=epsilon)

    def layer(name: str) -> Layer:
        return Layer(
            parallel=True,
            norm=norm(f"{name}.ln"),
            attention=Attention(
                inputs=(f"{name}.mixer.Wqkv",),
                output=f"{name}.mixer.out_proj",
                num_heads=heads,
                num_kv_heads=config.get("num_key_value_heads") or heads,
                rotary_dim=int(config["hidden_size"] // heads * turned["partial_rotary_factor"]),
                rotary_base=turned["rope_theta"],
                rotary_scaling=scaling,
            ),
            mlp=Mlp(
                first=f"{name}.{mlp}.fc1",
                second=f"{name}.{mlp}.fc2",
                activation=Activation.GELU_TANH,
                gate=gate and f"{name}.{gate}",
            ),
        )

    return Network(
        embedding=EMBEDDING.rpartition(".")[0],
        layers=tuple(layer(layer_name(index)) for index in range(config["num_hidden_layers"])),
        norm=norm(FINAL_NORM),
        head=HEAD,
    )


def stack_graph(graph: GraphBuilder, architecture: Architecture, mlp: Callable[[GraphBuilder, int, str], str]) -> str:
    """Add the network from token ids to the last layer; returns its output [B, S, H]. `mlp(graph, layer, normed)` adds
    a layer's MLP or mixture."""
    x = graph.embedding(EMBEDDING)  # [B, S, H]
    for layer in range(architecture.num_layers):
        name = layer_name(layer)
        normed = graph.layer_norm(x, f"{name}.ln", architecture.norm_epsilon)
        qkv = graph.query_key_value(normed, f"{name}.mixer.Wqkv")  # [B, S, (N+2G)*D]
        heads = graph.attention(qkv, f"{name}.mixer", layer, window=architecture.window(layer))  # [B, S, N*D]
        attended = graph.linear(heads, f"{name}.mixer.out_proj")
        x = graph.add(graph.add(x, attended, f"{name}.attention_residual"), mlp(graph, layer, normed), name)
    return x


def stack_head(graph: GraphBuilder, architecture: Architecture, x: str) -> str:
    """Add the final norm and the head: hidden state [B, S, H] to logits [B, S, V]."""
    return graph.linear(graph.layer_norm(x, FINAL_NORM, architecture.norm_epsilon), HEAD)


def stack_trtllm(architecture: str, mlp: Mapping[str, str], module: str | None = None) -> TrtllmNetwork:
    """The record of TensorRT-LLM's Phi network (tensorrt_llm/models/phi/model.py), or of our own in the file `module`.
    `mlp` names the modules that differ between families.

    The network does not send activations between ranks, so it has no pipeline parallelism. The library's network
    ignores the norms' epsilon and the number of key/value heads of config.json and uses the defaults of its layers.
    """
    return TrtllmNetwork(
        architecture=architecture,
        module=module,
        hidden_act="gelu_new",
        pipeline=False,
        gated=False,
        layer=layer_name,
        top=MappingProxyType(
            {
                EMBEDDING.rpartition(".")[0]: "transformer.vocab_embedding",
                FINAL_NORM: "transformer.ln_f",
                HEAD: "lm_head",
            }
        ),
        modules=MappingProxyType(
            {"ln": "input_layernorm", "mixer.Wqkv": "attention.qkv", "mixer.out_proj": "attention.dense", **mlp}
        ),
        norm_epsilon=1e-5 if module is None else None,
        grouped_heads=module is not None,
        takes_lone_expert=module is not None,
    )
