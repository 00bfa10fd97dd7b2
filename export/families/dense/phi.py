"""Dense Phi-2, the model that phixtrals are merged from, with either of its two spellings of tensor names.

  phi-msft                              transformers (PhiForCausalLM)
  transformer.h.{i}.mixer.Wqkv          model.layers.{i}.self_attn.{q,k,v}_proj
  transformer.h.{i}.mixer.out_proj      model.layers.{i}.self_attn.dense
  transformer.h.{i}.ln                  model.layers.{i}.input_layernorm
  transformer.h.{i}.mlp.fc1 [F, H]      model.layers.{i}.mlp.fc1
  transformer.h.{i}.mlp.fc2 [H, F]      model.layers.{i}.mlp.fc2
  transformer.embd.wte                  model.embed_tokens
  lm_head.ln, lm_head.linear            model.final_layernorm, lm_head

Dense Phi-2 and phixtral have the same model_type "phi-msft". A phixtral's config.json has num_local_experts > 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from export.architecture import MAX_LAYERS, Architecture, ConfigReader
from export.checkpoint.tensor_table import Part, Role, TensorSpec, concatenated, single
from export.config_keys.rules import transformers_keys
from export.families import Family
from export.families.shared.network import Network
from export.families.shared.phi_stack import (
    BASE_MODULES,
    GELU_TANH,
    HARMLESS_TENSORS,
    has_experts,
    layer_name,
    read_msft_config,
    stack_graph,
    stack_head,
    stack_network,
    stack_tensors,
    stack_trtllm,
    transformers_name,
)
from export.families.shared.transformers_config import check_heads, read_rope, refuse_quantized, tied_names

if TYPE_CHECKING:
    from export.onnx_graph.graph import GraphBuilder


def matches(config: Mapping[str, Any]) -> bool:
    if config.get("model_type") == "phi":
        return True
    return config.get("model_type") == "phi-msft" and not has_experts(config)


def read_config(raw: Mapping[str, Any]) -> Architecture:
    """Read the Architecture from a Phi-2 config.json, of phi-msft or of transformers. Raises ConfigError."""
    return read_msft_config(raw, "phi") if raw["model_type"] == "phi-msft" else _read_transformers_config(raw)


def _read_transformers_config(raw: Mapping[str, Any]) -> Architecture:
    """Read the Architecture from transformers' config.json of a Phi-2. Missing keys have the defaults of transformers'
    PhiConfig (models/phi/configuration_phi.py). Raises ConfigError."""
    reader = ConfigReader(raw, "phi", transformers_keys("PhiConfig"))
    refuse_quantized(reader)
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    reader.require("hidden_act", GELU_TANH, absent="gelu_new")
    reader.require("head_dim", [hidden // heads], absent=hidden // heads)
    reader.require("qk_layernorm", [False], absent=False)
    reader.require("tie_word_embeddings", [False, True], absent=False)
    rope = read_rope(reader, max(1, hidden // heads), base=10000.0, share=0.5)
    if hidden % heads:
        reader.problem(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    architecture = Architecture(
        family="phi",
        hidden_size=hidden,
        num_layers=reader.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=reader.integer("num_key_value_heads", absent=heads, null=heads),
        head_size=max(1, hidden // heads),
        ffn_size=reader.integer("intermediate_size"),
        vocab_size=reader.integer("vocab_size"),
        num_experts=0,
        experts_per_token=0,
        rotary_dim=rope.dim,
        rope_base=rope.base,
        rotary_scaling=rope.scaling,
        norm_epsilon=reader.real("layer_norm_eps", absent=1e-5),
        max_positions=rope.positions,
        source_dtype=reader.text("dtype") or reader.text("torch_dtype"),
        tied_head=raw.get("tie_word_embeddings") is True,
    )
    reader.harmless("torch_dtype", "dtype")
    check_heads(reader, architecture)
    reader.finish()
    return architecture


def mlp_tensors(architecture: Architecture, layer: int) -> list[TensorSpec]:
    width, hidden, name = architecture.ffn_size, architecture.hidden_size, f"{layer_name(layer)}.mlp"
    return [
        single(f"{name}.fc1.weight", (width, hidden), "F H", Role.FFN),
        single(f"{name}.fc1.bias", (width,), "F", Role.BIAS),
        single(f"{name}.fc2.weight", (hidden, width), "H F", Role.FFN),
        single(f"{name}.fc2.bias", (hidden,), "H", Role.BIAS),
    ]


def tensors(architecture: Architecture, names: Sequence[str]) -> list[TensorSpec]:
    """The tensor table. The parts have the names that the checkpoint uses."""
    specs = stack_tensors(architecture, mlp_tensors)
    if not any(name.startswith("transformer.") for name in names):
        specs = [_in_transformers_spelling(spec, architecture) for spec in specs]
    if not architecture.tied_head:
        return specs
    first, second = (next(spec for spec in specs if spec.role is role) for role in (Role.EMBEDDING, Role.HEAD))
    stored = tied_names(True, first.parts[0].name, second.parts[0].name, names)
    theirs = {spec.name: name for spec, name in zip((first, second), stored, strict=True)}
    return [
        replace(spec, parts=(replace(spec.parts[0], name=theirs[spec.name]),)) if spec.name in theirs else spec
        for spec in specs
    ]


def _in_transformers_spelling(spec: TensorSpec, architecture: Architecture) -> TensorSpec:
    name = transformers_name(spec.name)
    assert name is not None  # every row of a dense Phi-2 has a name in transformers
    if "{}" not in name:
        return replace(spec, parts=(Part(name=name, shape=spec.shape),))
    parts = [
        Part(name=name.format(letter), shape=(rows, *spec.shape[1:]))
        for letter, rows in zip("qkv", architecture.qkv_rows, strict=True)
    ]
    return concatenated(spec.name, parts, spec.letters, spec.role)


def _mlp(graph: GraphBuilder, layer: int, normed: str) -> str:
    name = f"{layer_name(layer)}.mlp"
    return graph.linear(graph.gelu_tanh(graph.linear(normed, f"{name}.fc1"), f"{name}.act"), f"{name}.fc2")


def decoder(graph: GraphBuilder, architecture: Architecture) -> str:
    return stack_graph(graph, architecture, _mlp)


def network(raw: Mapping[str, Any]) -> Network:
    return stack_network(raw, "mlp")


FAMILY = Family(
    name="phi",
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    decoder=decoder,
    head=stack_head,
    layer=layer_name,
    network=network,
    tokenizers={"phi": "GPT2Tokenizer"},
    harmless_tensors=HARMLESS_TENSORS,
    base_modules=BASE_MODULES,
    trtllm=stack_trtllm("PhiForCausalLM", {"mlp.fc1": "mlp.fc", "mlp.fc2": "mlp.proj"}),
)
