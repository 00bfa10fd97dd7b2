"""Code for Llama and similar families: Llama's attention, RMSNorm, and a SwiGLU MLP or SwiGLU experts.

  our name, in layer i under model.layers.{i}
  self_attn.qkv_proj            q, k and v one after the other, [(N+2G)*D, H]
  self_attn.q_norm, .k_norm     where queries and keys are normalised: [N*D] and [G*D], or [D] each
  self_attn.o_proj              [H, N*D]
  mlp.gate                      the router, [E, H]
  mlp.experts.gate_up           [E, 2F, H], rows alternate between gate and up
  mlp.experts.down              [E, H, F]
  mlp.shared_expert             beside the experts of some families: an MLP, named as in a dense layer
  mlp.shared_expert_gate        [1, H], whose sigmoid is the shared expert's share
  mlp.gate_proj, mlp.up_proj    in a dense model or layer: [F, H] each
  mlp.down_proj                 in a dense model or layer: [H, F]

Each layer also has two norms, and the model has model.embed_tokens and lm_head [V, H] and model.norm. Nothing has a
bias unless a family says so. An expert, and a dense model's MLP, is down(silu(gate x) * up x). Attention and mixture
(or MLP) each take the RMSNorm of the residual as input, and their outputs are added to the residual. With
`norms_after`, each takes the residual itself, and the RMSNorm of its output is added. The rotary embedding covers all
of a head's D, in half-split order. Factors are those of `export.architecture.Scales`.
Source: transformers, models/llama and models/mixtral.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from export import rotary
from export.architecture import (
    MAX_EXPERTS,
    MAX_LAYERS,
    Architecture,
    ConfigReader,
    QueryKeyValue,
    Router,
    Scales,
    SwiGlu,
)
from export.checkpoint.tensor_table import Part, Role, TensorSpec, concatenated, interleaved, single, stacked
from export.families.shared.network import Activation, Attention, Layer, Mlp, Network, Norm
from export.families.shared.transformers_config import check_heads, read_rope, refuse_quantized, tied_names

if TYPE_CHECKING:
    from export.onnx_graph.graph import GraphBuilder

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
HEAD = "lm_head"
BASE_MODULES = {"embed_tokens": "model", "layers": "model", "norm": "model"}


# The norms of attention and of MLP or mixture: of their inputs, or with `norms_after` of their outputs.
_NORMS = ("input_layernorm", "post_attention_layernorm")
_NORMS_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")


def layer_name(layer: int) -> str:
    return f"model.layers.{layer}"


def read_stack_config(
    reader: ConfigReader,
    family: str,
    *,
    rope_base: float,
    norm_epsilon: float,
    num_kv_heads: int | None = None,
    sliding_window: int | None = None,
    scales: Scales | None = None,
    dense: bool = False,
    experts_key: str = "num_local_experts",
    num_experts: int = 8,
    experts_per_token: int = 2,
    width_key: str = "intermediate_size",
    router: Router | None = None,
    qkv: QueryKeyValue | None = None,
    attention_bias: bool = False,
    full_layers: tuple[int, ...] = (),
    swiglu: SwiGlu | None = None,
    dense_layers: tuple[int, ...] = (),
    dense_ffn_size: int | None = None,
    shared_ffn_size: int | None = None,
    head_bias: bool = False,
) -> Architecture:
    """Read the Architecture from a config.json with the keys of transformers' LlamaConfig. `rope_base`, `norm_epsilon`,
    `num_kv_heads` (None: as many as query heads), `num_experts` and `experts_per_token` are the defaults of the
    family's configuration class for missing keys; `experts_key` is its key of the number of experts, and `width_key`
    that of an expert's F. Null means as many key/value heads as query heads. A `dense` family has no experts.
    `attention_bias` is the only value that the key of this name may have, and that of a missing key. Raises
    ConfigError."""
    raw = reader.raw
    refuse_quantized(reader)
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    reader.require("hidden_act", ["silu", "swish"], absent="silu")
    reader.require("attention_bias", [attention_bias], absent=attention_bias)
    reader.require("tie_word_embeddings", [False, True], absent=False)
    head_size = reader.integer("head_dim", absent=hidden // heads, null=hidden // heads)
    if raw.get("head_dim") is None and hidden % heads:
        reader.problem(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    experts = 0 if dense else reader.integer(experts_key, absent=num_experts, maximum=MAX_EXPERTS)
    per_token = 0 if dense else reader.integer("num_experts_per_tok", absent=experts_per_token)
    if per_token > experts:
        reader.problem(f"num_experts_per_tok is {per_token}, expected 1 to {reader.spelled(experts_key)} = {experts}")
    rope = read_rope(reader, head_size, base=rope_base)
    architecture = Architecture(
        family=family,
        hidden_size=hidden,
        num_layers=reader.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=reader.integer("num_key_value_heads", absent=num_kv_heads or heads, null=heads),
        head_size=head_size,
        ffn_size=reader.integer(width_key),
        vocab_size=reader.integer("vocab_size"),
        num_experts=experts,
        experts_per_token=per_token,
        rotary_dim=rope.dim,
        rope_base=rope.base,
        rotary_scaling=rope.scaling,
        norm_epsilon=reader.real("rms_norm_eps", absent=norm_epsilon),
        max_positions=rope.positions,
        source_dtype=reader.text("dtype") or reader.text("torch_dtype"),
        sliding_window=sliding_window,
        tied_head=bool(raw.get("tie_word_embeddings")),
        scales=scales or Scales(),
        router=router or Router(),
        qkv=qkv or QueryKeyValue(),
        full_layers=full_layers,
        swiglu=swiglu or SwiGlu(),
        dense_layers=dense_layers,
        dense_ffn_size=dense_ffn_size,
        shared_ffn_size=shared_ffn_size,
        attention_bias=attention_bias,
        head_bias=head_bias,
    )
    reader.harmless("torch_dtype", "dtype")
    check_heads(reader, architecture)
    reader.finish()
    return architecture


def stack_tensors(
    architecture: Architecture,
    names: Sequence[str],
    mixture: Callable[[Architecture, str], list[TensorSpec]],
    *,
    biases: str = "",
    sinks: bool = False,
    centred_norms: bool = False,
    norms_after: bool = False,
) -> list[TensorSpec]:
    """The rows of the tensor table; `names` are the checkpoint's tensors, and `mixture(architecture, layer_name)`
    returns the rows of a layer's MLP, or of its router and experts; layers that are dense in a model with experts have
    an MLP. `biases` are the letters of those of attention's matrices that have a bias: "qkv" or "qkvo". With `sinks`
    each query head has one more logit of its softmax, and with `centred_norms` each norm has a bias. With `norms_after`
    a layer's norms are those of outputs."""

    def norm(name: str) -> list[TensorSpec]:
        parts = ("weight", "bias") if centred_norms else ("weight",)
        return [single(f"{name}.{part}", (hidden,), "H", Role.NORM) for part in parts]

    hidden, vocab = architecture.hidden_size, architecture.vocab_size
    attention_norm, mlp_norm = _NORMS_AFTER if norms_after else _NORMS
    embedding, head = tied_names(architecture.tied_head, f"{EMBEDDING}.weight", f"{HEAD}.weight", names)
    specs = [single(f"{EMBEDDING}.weight", (vocab, hidden), "V H", Role.EMBEDDING, stored_name=embedding)]
    for layer in range(architecture.num_layers):
        name = layer_name(layer)
        specs += [
            *norm(f"{name}.{attention_norm}"),
            *_attention_tensors(architecture, f"{name}.self_attn", biases),
            *([_sinks(architecture, name)] if sinks else []),
            *norm(f"{name}.{mlp_norm}"),
            *(dense_mlp if layer in architecture.dense_layers else mixture)(architecture, name),
        ]
    return [
        *specs,
        *norm(FINAL_NORM),
        single(f"{HEAD}.weight", (vocab, hidden), "V H", Role.HEAD, stored_name=head),
        *([single(f"{HEAD}.bias", (vocab,), "V", Role.BIAS)] if architecture.head_bias else []),
    ]


def _sinks(architecture: Architecture, layer: str) -> TensorSpec:
    return single(f"{layer}.self_attn.sinks", (architecture.num_heads,), "N", Role.BIAS)


def _attention_tensors(architecture: Architecture, name: str, biases: str) -> list[TensorSpec]:
    hidden, rows = architecture.hidden_size, architecture.qkv_rows
    parts = [
        Part(name=f"{name}.{letter}_proj.weight", shape=(number, hidden))
        for letter, number in zip("qkv", rows, strict=True)
    ]
    of_biases = [
        Part(name=f"{name}.{letter}_proj.bias", shape=(number,))
        for letter, number in zip("qkv", rows, strict=True)
        if letter in biases
    ]
    norms: list[tuple[str, int, str]] = []
    if architecture.qkv.norm == "width":
        norms = [("q", rows[0], "ND"), ("k", rows[1], "GD")]
    elif architecture.qkv.norm == "head":
        norms = [(letter, architecture.head_size, "D") for letter in "qk"]
    return [
        concatenated(f"{name}.qkv_proj.weight", parts, "(N+2G)D H", Role.ATTENTION),
        *([concatenated(f"{name}.qkv_proj.bias", of_biases, "(N+2G)D", Role.BIAS)] if of_biases else []),
        *(single(f"{name}.{of}_norm.weight", (width,), letters, Role.NORM) for of, width, letters in norms),
        single(f"{name}.o_proj.weight", (hidden, rows[0]), "H ND", Role.ATTENTION),
        *([single(f"{name}.o_proj.bias", (hidden,), "H", Role.BIAS)] if "o" in biases else []),
    ]


def dense_tensors(architecture: Architecture, names: Sequence[str]) -> list[TensorSpec]:
    """The rows of the tensor table of a dense model, whose tensors have the same names in every checkpoint."""
    return stack_tensors(architecture, names, dense_mlp)


def dense_mlp(architecture: Architecture, layer: str) -> list[TensorSpec]:
    """The rows of a dense layer's MLP."""
    return _mlp_tensors(f"{layer}.mlp", architecture.dense_ffn_size or architecture.ffn_size, architecture.hidden_size)


def shared_expert(architecture: Architecture, layer: str) -> list[TensorSpec]:
    """The rows of the MLP beside a layer's experts, and of its share."""
    hidden = architecture.hidden_size
    return [
        *_mlp_tensors(f"{layer}.mlp.shared_expert", architecture.shared_ffn_size or 0, hidden),
        single(f"{layer}.mlp.shared_expert_gate.weight", (1, hidden), "1 H", Role.SHARE),
    ]


def _mlp_tensors(name: str, width: int, hidden: int) -> list[TensorSpec]:
    return [
        single(f"{name}.gate_proj.weight", (width, hidden), "F H", Role.FFN),
        single(f"{name}.up_proj.weight", (width, hidden), "F H", Role.FFN),
        single(f"{name}.down_proj.weight", (hidden, width), "H F", Role.FFN),
    ]


def packed_experts(architecture: Architecture, layer: str, gate: str, gate_up: str, down: str) -> list[TensorSpec]:
    """The rows of a layer's router and experts, for a checkpoint that keeps all experts in two tensors. `gate` names
    the router, `gate_up` a tensor [E, 2F, H] with F rows of gate and then F of up for each expert, and `down` a tensor
    [E, H, F]."""
    width, hidden, number = architecture.ffn_size, architecture.hidden_size, architecture.num_experts

    def half(row: int) -> Part:
        return Part(name=gate_up, shape=(width, hidden), stored_shape=(number, 2 * width, hidden), first_row=row)

    pairs = [(half(2 * e * width), half((2 * e + 1) * width)) for e in range(number)]
    shape, stored = (hidden, width), (number, hidden, width)
    parts = [Part(name=down, shape=shape, stored_shape=stored, first_row=e * hidden) for e in range(number)]
    return expert_tensors(architecture, layer, gate, pairs, parts)


def single_experts(
    architecture: Architecture, layer: str, mixture: str, matrices: tuple[str, str, str]
) -> list[TensorSpec]:
    """The rows of a layer's router and experts, for a checkpoint in which each expert has three tensors. `mixture`
    names the module that has the gate and the experts, `matrices` an expert's gate, up and down."""
    width, hidden = architecture.ffn_size, architecture.hidden_size
    gate, up, down = matrices

    def parts(matrix: str, *shape: int) -> list[Part]:
        return [
            Part(name=f"{mixture}.experts.{e}.{matrix}.weight", shape=shape) for e in range(architecture.num_experts)
        ]

    pairs = list(zip(parts(gate, width, hidden), parts(up, width, hidden), strict=True))
    return expert_tensors(architecture, layer, f"{mixture}.gate.weight", pairs, parts(down, hidden, width))


def module_experts(names: Sequence[str]) -> Callable[[Architecture, str], list[TensorSpec]]:
    """What returns the rows of a layer's router and experts for `stack_tensors`, for checkpoints with a module `mlp`
    whose experts have a gate_proj, an up_proj and a down_proj each, or lie packed as transformers 5 keeps them; `names`
    are the checkpoint's tensors."""
    packed = any(name.endswith(".mlp.experts.gate_up_proj") for name in names)

    def mixture(architecture: Architecture, layer: str) -> list[TensorSpec]:
        name = f"{layer}.mlp"
        if not packed:
            return single_experts(architecture, layer, name, ("gate_proj", "up_proj", "down_proj"))
        gate_up, down = f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj"
        return packed_experts(architecture, layer, f"{name}.gate.weight", gate_up, down)

    return mixture


def expert_tensors(
    architecture: Architecture, layer: str, gate: str, pairs: Sequence[tuple[Part, Part]], down: Sequence[Part]
) -> list[TensorSpec]:
    """The rows of a layer's router and experts. `gate` names the router, `pairs` has the gate and up of each expert,
    and `down` the second matrix of each."""
    shape = (architecture.num_experts, architecture.hidden_size)
    return [
        single(f"{layer}.mlp.gate.weight", shape, "E H", Role.ROUTER, stored_name=gate),
        interleaved(f"{layer}.mlp.experts.gate_up.weight", pairs, "E 2F H", Role.EXPERT),
        stacked(f"{layer}.mlp.experts.down.weight", down, "E H F", Role.EXPERT),
    ]


def dense_between(raw: Mapping[str, Any]) -> set[int]:
    """The layers without experts by decoder_sparse_step and mlp_only_layers of a config.json, for `stack_network`."""
    step, listed = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
    return {layer for layer in range(raw["num_hidden_layers"]) if (layer + 1) % step or layer in listed}


def stack_network(
    raw: Mapping[str, Any],
    *,
    rope_theta: float,
    rms_norm_eps: float,
    num_key_value_heads: int | None = None,
    sliding_window: int | None = None,
    embedding: float = 1.0,
    attention: float | None = None,
    residual: float = 1.0,
    logits: float = 1.0,
    dense: bool | Collection[int] = False,
    router: Router | None = None,
    normed: bool = False,
    clip: float | None = None,
    full_layers: Collection[int] = (),
    sinks: bool = False,
    swiglu: SwiGlu | None = None,
    shared: bool = False,
    centred_norms: bool = False,
    norms_after: bool = False,
) -> Network:
    """What the network computes, from a config.json with the keys of transformers' LlamaConfig. The first three are the
    values of missing keys; `embedding` to `logits` are the factors of `export.families.shared.network` (`logits`
    divides). `dense` has the layers with an MLP in place of experts, or is True for all. If `normed`, queries and keys
    are normalised; `clip` is that of its Attention. The `full_layers` have no window. With `sinks` attention has such,
    and `swiglu` is that of an Mlp. If `shared`, there is an MLP beside the experts. `centred_norms` are LayerNorms.
    With `norms_after` outputs are normalised in place of inputs."""
    config = raw
    turned = rotary.parameters(raw, rope_theta)
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    epsilon = config.get("rms_norm_eps", rms_norm_eps)
    scaling = rotary.scaling_of(turned, config["max_position_embeddings"])

    def norm(name: str) -> Norm:
        return Norm(name=name, centred=centred_norms, epsilon=epsilon)

    def mlp(name: str, index: int) -> Mlp:
        if dense is True or (dense and index in dense):
            return _alone(name)
        return Mlp(
            first=f"{name}.experts.gate_up",
            second=f"{name}.experts.down",
            activation=Activation.SILU,
            gated=True,
            gate=f"{name}.gate",
            router=router or Router(),
            swiglu=swiglu or SwiGlu(),
            shared=_alone(f"{name}.shared_expert") if shared else None,
            share=f"{name}.shared_expert_gate" if shared else None,
        )

    def layer(index: int) -> Layer:
        name = layer_name(index)
        norms = [norm(f"{name}.{own}") for own in (_NORMS_AFTER if norms_after else _NORMS)]
        before, after = ([None, None], norms) if norms_after else (norms, [None, None])
        return Layer(
            norm=before[0],
            attention_output_norm=after[0],
            mlp_norm=before[1],
            mlp_output_norm=after[1],
            attention=Attention(
                inputs=(f"{name}.self_attn.qkv_proj",),
                output=f"{name}.self_attn.o_proj",
                num_heads=heads,
                num_kv_heads=config.get("num_key_value_heads", num_key_value_heads) or heads,
                rotary_dim=head_size,
                rotary_base=turned["rope_theta"],
                rotary_scaling=scaling,
                factor=attention,
                window=None if index in full_layers else sliding_window,
                query_norm=norm(f"{name}.self_attn.q_norm") if normed else None,
                key_norm=norm(f"{name}.self_attn.k_norm") if normed else None,
                clip=clip,
                sinks=f"{name}.self_attn.sinks" if sinks else None,
            ),
            mlp=mlp(f"{name}.mlp", index),
            factor=residual,
        )

    return Network(
        embedding=EMBEDDING,
        layers=tuple(map(layer, range(config["num_hidden_layers"]))),
        norm=norm(FINAL_NORM),
        head=HEAD,
        embedding_factor=embedding,
        logits_divisor=logits,
    )


def _alone(name: str) -> Mlp:
    """A SwiGLU MLP whose gate and up are two matrices."""
    return Mlp(
        first=f"{name}.gate_proj",
        up=f"{name}.up_proj",
        second=f"{name}.down_proj",
        activation=Activation.SILU,
        gated=True,
    )


def stack_graph(
    graph: GraphBuilder, architecture: Architecture, *, centred_norms: bool = False, norms_after: bool = False
) -> str:
    """Add the network from token ids to the last layer; returns its output [B, S, H]. `centred_norms` are LayerNorms
    with biases. With `norms_after` outputs of attention and of mixture (or MLP) are normalised in place of inputs."""
    kind = graph.layer_norm if centred_norms else graph.rms_norm
    epsilon, scales = architecture.norm_epsilon, architecture.scales
    attention_norm, mlp_norm = _NORMS_AFTER if norms_after else _NORMS

    def norm(x: str, path: str, *, after: bool) -> str:
        """The norm of x before or after attention or mixture; x itself where the layer has its norms at the other."""
        return kind(x, path, epsilon) if after is norms_after else x

    x = graph.scale(graph.embedding(f"{EMBEDDING}.weight"), scales.embedding, EMBEDDING)  # [B, S, H]
    for layer in range(architecture.num_layers):
        name = layer_name(layer)
        normed = norm(x, f"{name}.{attention_norm}", after=False)
        qkv = graph.query_key_value(normed, f"{name}.self_attn.qkv_proj")  # [B, S, (N+2G)*D]
        query, key, value = graph.conditioned(qkv, f"{name}.self_attn", epsilon)
        heads = graph.attention(  # [B, S, N*D]
            query, f"{name}.self_attn", layer, window=architecture.window(layer), key=key, value=value
        )
        attended = norm(graph.linear(heads, f"{name}.self_attn.o_proj"), f"{name}.{attention_norm}", after=True)
        attended = graph.scale(attended, scales.residual, f"{name}.self_attn")
        x = graph.add(x, attended, f"{name}.attention_residual")
        normed = norm(x, f"{name}.{mlp_norm}", after=False)
        has_experts = architecture.is_moe and layer not in architecture.dense_layers
        output = (_mixture if has_experts else _mlp)(graph, normed, f"{name}.mlp")
        if has_experts and architecture.shared_ffn_size:
            shared = _mlp(graph, normed, f"{name}.mlp.shared_expert")
            shared = graph.times_share(shared, normed, f"{name}.mlp.shared_expert_gate")
            output = graph.add(output, shared, f"{name}.mlp.shared")
        output = norm(output, f"{name}.{mlp_norm}", after=True)
        x = graph.add(x, graph.scale(output, scales.residual, f"{name}.mlp"), name)
    return x


def _mixture(graph: GraphBuilder, normed: str, name: str) -> str:
    return graph.experts(
        normed, gate=f"{name}.gate.weight", fc1=f"{name}.experts.gate_up", fc2=f"{name}.experts.down", name=name,
        activation="swiglu",
    )  # fmt: skip


def _mlp(graph: GraphBuilder, normed: str, name: str) -> str:
    gate, up = (graph.linear(normed, f"{name}.{matrix}") for matrix in ("gate_proj", "up_proj"))
    return graph.linear(graph.silu_times(gate, up, f"{name}.act"), f"{name}.down_proj")


def stack_head(graph: GraphBuilder, architecture: Architecture, x: str, *, centred_norms: bool = False) -> str:
    """Add the final norm and the head: hidden state [B, S, H] to logits [B, S, V]."""
    norm = graph.layer_norm if centred_norms else graph.rms_norm
    logits = graph.linear(norm(x, FINAL_NORM, architecture.norm_epsilon), HEAD)
    return graph.divide(logits, architecture.scales.logits, HEAD)
