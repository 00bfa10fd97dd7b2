"""Mixtral: Llama's attention with grouped key/value heads and E SwiGLU experts, in either of its two spellings.

  ours                          transformers 4 and the published files        transformers 5, packed
  mlp.gate [E, H]               block_sparse_moe.gate                         mlp.gate
  mlp.experts.gate_up           block_sparse_moe.experts.{e}.w1 [F, H] and    mlp.experts.gate_up_proj [E, 2F, H]:
    [E, 2F, H], rows in turn      .w3 [F, H]                                    F rows of w1, then F of w3
  mlp.experts.down [E, H, F]    block_sparse_moe.experts.{e}.w2               mlp.experts.down_proj
  self_attn.qkv_proj            self_attn.{q,k,v}_proj                        the same
all under model.layers.{i}; embedding, norms, o_proj and head bear the checkpoint's own names. Nothing has a bias.

An expert is w2(silu(w1 x) * w3 x). Router: softmax over all experts, the K largest, divided by their sum, which is the
softmax over the K largest logits. RMSNorm before attention and before the experts, each added to the residual; rotary
embedding turns the whole of each head, in half-split order.
Source: transformers, models/mixtral and conversion_mapping.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from export.architecture import MAX_EXPERTS, MAX_LAYERS, MAX_POSITIONS, Architecture, ConfigReader
from export.families import Family
from export.families.transformers_config import HARMLESS_KEYS, check_heads, read_rope, refuse_quantized
from export.tensor_table import Part, Role, TensorSpec, concatenated, interleaved, single, stacked
from export.trtllm.network import TrtllmNetwork

if TYPE_CHECKING:
    from export.onnx_graph.graph import GraphBuilder

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
HEAD = "lm_head"
# What only training reads.
_TRAINING_KEYS = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")


def layer_name(layer: int) -> str:
    return f"model.layers.{layer}"


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "mixtral"


def read_config(raw: Mapping[str, Any]) -> Architecture:
    """Facts of a Mixtral config.json; `absent` values are those of transformers' MixtralConfig. Raises ConfigError."""
    reader = ConfigReader(raw, "mixtral")
    reader.harmless(*HARMLESS_KEYS, *_TRAINING_KEYS)
    refuse_quantized(reader)
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    reader.require("hidden_act", ["silu"], absent="silu")
    reader.require("attention_bias", [False], absent=False)
    reader.require("tie_word_embeddings", [False, True], absent=False)
    head_size = reader.integer("head_dim", absent=hidden // heads)
    if raw.get("head_dim") is None and hidden % heads:
        reader.problem(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    experts = reader.integer("num_local_experts", absent=8, maximum=MAX_EXPERTS)
    per_token = reader.integer("num_experts_per_tok", absent=2)
    if per_token > experts:
        reader.problem(f"num_experts_per_tok is {per_token}, expected 1 to num_local_experts = {experts}")
    rope = read_rope(reader, "rope_theta")
    architecture = Architecture(
        family="mixtral",
        hidden_size=hidden,
        num_layers=reader.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=heads,
        # A null says as many as query heads, an absent key Mixtral-8x7B's number.
        num_kv_heads=reader.integer("num_key_value_heads", absent=heads if "num_key_value_heads" in raw else 8),
        head_size=head_size,
        ffn_size=reader.integer("intermediate_size"),
        vocab_size=reader.integer("vocab_size"),
        num_experts=experts,
        experts_per_token=per_token,
        rotary_dim=head_size,
        rope_base=rope.real("rope_theta", absent=1e6),
        norm_epsilon=reader.real("rms_norm_eps", absent=1e-5),
        max_positions=reader.integer("max_position_embeddings", maximum=MAX_POSITIONS),
        source_dtype=reader.text("dtype") or reader.text("torch_dtype"),
        sliding_window=None if raw.get("sliding_window") is None else reader.integer("sliding_window"),
        tied_head=bool(raw.get("tie_word_embeddings")),
    )
    reader.harmless("torch_dtype", "dtype", "sliding_window")
    check_heads(reader, architecture)
    reader.finish()
    return architecture


def tensors(architecture: Architecture, names: Sequence[str]) -> list[TensorSpec]:
    """The table, with the checkpoint's own names as parts; without names in the spelling of the published files."""
    hidden, vocab = architecture.hidden_size, architecture.vocab_size
    packed = any(name.endswith(".mlp.experts.gate_up_proj") for name in names)
    specs = [single(f"{EMBEDDING}.weight", (vocab, hidden), "V H", Role.EMBEDDING)]
    for layer in range(architecture.num_layers):
        name = layer_name(layer)
        specs += [
            single(f"{name}.input_layernorm.weight", (hidden,), "H", Role.NORM),
            *_attention_tensors(architecture, f"{name}.self_attn"),
            single(f"{name}.post_attention_layernorm.weight", (hidden,), "H", Role.NORM),
            *(_packed_experts(architecture, name) if packed else _single_experts(architecture, name)),
        ]
    head = EMBEDDING if architecture.tied_head else HEAD
    return [
        *specs,
        single(f"{FINAL_NORM}.weight", (hidden,), "H", Role.NORM),
        single(f"{HEAD}.weight", (vocab, hidden), "V H", Role.HEAD, stored_name=f"{head}.weight"),
    ]


def _attention_tensors(architecture: Architecture, name: str) -> list[TensorSpec]:
    hidden, size = architecture.hidden_size, architecture.head_size
    queries, keys = architecture.num_heads * size, architecture.num_kv_heads * size
    parts = [
        Part(name=f"{name}.{letter}_proj.weight", shape=(rows, hidden))
        for letter, rows in (("q", queries), ("k", keys), ("v", keys))
    ]
    return [
        concatenated(f"{name}.qkv_proj.weight", parts, "(N+2G)D H", Role.ATTENTION),
        single(f"{name}.o_proj.weight", (hidden, queries), "H ND", Role.ATTENTION),
    ]


def _single_experts(architecture: Architecture, layer: str) -> list[TensorSpec]:
    """The mixture of one layer where each expert has three tensors of its own."""
    width, hidden, name = architecture.ffn_size, architecture.hidden_size, f"{layer}.block_sparse_moe"

    def parts(matrix: str, *shape: int) -> list[Part]:
        return [Part(name=f"{name}.experts.{e}.{matrix}.weight", shape=shape) for e in range(architecture.num_experts)]

    pairs = list(zip(parts("w1", width, hidden), parts("w3", width, hidden), strict=True))
    return _experts(architecture, layer, f"{name}.gate.weight", pairs, parts("w2", hidden, width))


def _packed_experts(architecture: Architecture, layer: str) -> list[TensorSpec]:
    """The mixture of one layer where all experts lie in two tensors."""
    width, hidden, number = architecture.ffn_size, architecture.hidden_size, architecture.num_experts

    def part(module: str, shape: tuple[int, ...], stored_shape: tuple[int, ...], row: int) -> Part:
        return Part(name=f"{layer}.mlp.experts.{module}", shape=shape, stored_shape=stored_shape, first_row=row)

    def half(row: int) -> Part:
        return part("gate_up_proj", (width, hidden), (number, 2 * width, hidden), row)

    pairs = [(half(2 * e * width), half((2 * e + 1) * width)) for e in range(number)]
    down = [part("down_proj", (hidden, width), (number, hidden, width), e * hidden) for e in range(number)]
    return _experts(architecture, layer, f"{layer}.mlp.gate.weight", pairs, down)


def _experts(
    architecture: Architecture, layer: str, gate: str, pairs: Sequence[tuple[Part, Part]], down: Sequence[Part]
) -> list[TensorSpec]:
    shape = (architecture.num_experts, architecture.hidden_size)
    return [
        single(f"{layer}.mlp.gate.weight", shape, "E H", Role.ROUTER, stored_name=gate),
        interleaved(f"{layer}.mlp.experts.gate_up.weight", pairs, "E 2F H", Role.EXPERT),
        stacked(f"{layer}.mlp.experts.down.weight", down, "E H F", Role.EXPERT),
    ]


def decoder(graph: GraphBuilder, architecture: Architecture) -> str:
    """Token ids to the last layer's output [B, S, H]."""
    epsilon = architecture.norm_epsilon
    x = graph.embedding(f"{EMBEDDING}.weight")  # [B, S, H]
    for layer in range(architecture.num_layers):
        name = layer_name(layer)
        normed = graph.rms_norm(x, f"{name}.input_layernorm", epsilon)
        qkv = graph.query_key_value(normed, f"{name}.self_attn.qkv_proj")  # [B, S, (N+2G)*D]
        heads = graph.attention(qkv, f"{name}.self_attn", layer)  # [B, S, N*D]
        x = graph.add(x, graph.linear(heads, f"{name}.self_attn.o_proj"), f"{name}.attention_residual")
        normed = graph.rms_norm(x, f"{name}.post_attention_layernorm", epsilon)
        mixed = graph.experts(
            normed, gate=f"{name}.mlp.gate.weight", fc1=f"{name}.mlp.experts.gate_up", fc2=f"{name}.mlp.experts.down",
            name=f"{name}.mlp", activation="swiglu",
        )  # fmt: skip
        x = graph.add(x, mixed, name)
    return x


def head(graph: GraphBuilder, architecture: Architecture, x: str) -> str:
    """Hidden state [B, S, H] to logits [B, S, V]."""
    return graph.linear(graph.rms_norm(x, FINAL_NORM, architecture.norm_epsilon), HEAD)


FAMILY = Family(
    name="mixtral",
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    decoder=decoder,
    head=head,
    harmless_tensors=("rotary_emb.inv_freq",),
    # Source: tensorrt_llm/models/llama/{model,convert}.py, whose class MODEL_MAP has under Mixtral's name.
    trtllm=TrtllmNetwork(
        architecture="MixtralForCausalLM",
        in_library=True,
        hidden_act="swiglu",
        pipeline=True,
        gated=True,
        layer=layer_name,
        top=MappingProxyType(
            {EMBEDDING: "transformer.vocab_embedding", FINAL_NORM: "transformer.ln_f", HEAD: "lm_head"}
        ),
        modules=MappingProxyType(
            {
                "input_layernorm": "input_layernorm",
                "self_attn.qkv_proj": "attention.qkv",
                "self_attn.o_proj": "attention.dense",
                "post_attention_layernorm": "post_layernorm",
                "mlp.gate": "mlp.router",
                "mlp.experts.gate_up": "mlp.fc",
                "mlp.experts.down": "mlp.proj",
            }
        ),
    ),
)
