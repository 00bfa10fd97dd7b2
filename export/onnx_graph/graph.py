"""Builds the ONNX graph of a decoder: one method for each operation, and one job for each weight.

Nodes are named by their path, and methods take and return values by name. Every attribute is written and none is left
to an operator's default. Operators and their layouts: ONNX Runtime's contributed operators (docs/ContribOperators.md)
and ONNX opset 21.

Matrices, the activations between them and the key/value cache have the provider's float type. The residual stream, the
norms, the router and the logits are float32: in float16 the residual could overflow, and different router logits could
round to equal ones. Each operation casts its inputs to the type that it needs; on a float32 provider nothing is cast.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from export import rotary
from export.architecture import Architecture
from export.checkpoint.tensor_table import TensorSpec
from export.errors import ExportError, QuantizationError
from export.formats.view import Grid
from export.onnx_graph import names
from export.onnx_graph.initializers import onnx_type, tensors
from export.onnx_graph.kernels import BY_NAME, Matrix, Operation, Routed, mixture_attributes, without_absent_end
from export.onnx_graph.nodes import Nodes
from export.onnx_graph.sparse_mixer import sparse_mixer
from export.onnx_graph.weight_planner import WeightPlanner
from export.onnx_graph.weights import Layout, Placement, WeightJob
from export.provider import Provider
from export.quantize.recipe import Recipe

if TYPE_CHECKING:
    import onnx


class GraphBuilder(ABC):
    """Builds one decoder graph. A subclass (export/onnx_graph/forms.py) says how the tokens lie in the graph's inputs,
    and which logits it gives. `left_out`: name of a gate or of a row that stacks experts -> experts that this mixture
    does without."""

    gives_router_logits = False  # whether each router's logits are outputs

    def __init__(
        self,
        architecture: Architecture,
        table: Mapping[str, TensorSpec],
        recipe: Recipe,
        provider: Provider,
        *,
        max_sequence: int | None = None,
        left_out: Mapping[str, Collection[int]] | None = None,
        grids: Mapping[str, Grid] | None = None,
    ) -> None:
        self.architecture = architecture
        self._max_sequence = max_sequence or architecture.max_positions
        self._recipe = recipe
        self._provider = provider
        self._kernels = BY_NAME[provider.kernels]
        self._expert_order = provider.expert_order(architecture.num_experts)
        self._weights = WeightPlanner(table, recipe, provider, self._expert_order, left_out or {}, grids or {})
        self._float_type = provider.float_type
        self._nodes = Nodes()
        self._query_factors: dict[str, float] = {}  # output of `query_key_value` -> factor that its queries carry
        self._router_logits: dict[str, str] = {}  # path of a mixture -> the value with its logits [..., E]
        self._mixer_sums: dict[str, str] = {}  # path of a mixture -> the sum of its two weights, by the sparse mixer
        self._router_outputs: list[str] = []
        self._check_attention()
        self._last_positions, self._total_length = self._sequence_facts()
        self._rotary_caches()

    @property
    def jobs(self) -> list[WeightJob]:
        """The jobs of the weights that the graph uses."""
        return self._weights.jobs

    # How tokens lie in the inputs. [...] below is [B, S], or [T] where a form packs the tokens of all sequences.

    @abstractmethod
    def _sequence_facts(self) -> tuple[str, str]:
        """The names of two values: the index of each sequence's last position, int32 [B], and the length of the longest
        sequence, an int32 scalar."""

    def _by_sequence(self, x: str) -> str:
        """[..., n] as attention takes it, [B, S, n]."""
        return x

    def _by_token(self, x: str) -> str:
        """An output of attention, [B, S, n], as the other operations take it, [..., n]."""
        return x

    def _further_inputs(self, layer: int) -> list[str]:  # noqa: ARG002 - which scales belong to
        """The inputs of attention that follow its sinks."""
        return []

    def _cache_attributes(self) -> dict[str, Any]:
        """The attributes of attention that say how keys and values are stored; none where they are floats."""
        return {}

    @property
    def _cache_type(self) -> str:
        """The dtype of keys and values."""
        return self._float_type

    @property
    def _cache_width(self) -> int:
        """The numbers of that dtype that a head has for a position."""
        return self.architecture.head_size

    def _further_initializers(self) -> Iterable[onnx.TensorProto]:
        """Initializers that are no weights of the model."""
        return ()

    @abstractmethod
    def wanted(self, x: str) -> str:
        """The positions of [..., H] whose logits the graph gives."""

    @abstractmethod
    def _token_inputs(self) -> list[onnx.ValueInfoProto]:
        """The graph's inputs, except keys and values."""

    @abstractmethod
    def _logits_shape(self) -> list[str | int]:
        """The shape of the output `logits`."""

    # Operations, in the order a decoder uses them.

    def embedding(self, weight: str) -> str:
        """Look up the embedding rows of token ids: int64 [B, S] to float32 [B, S, H]."""
        outputs, job = self._weights.matrix(weight)
        if job.layout is Layout.PLAIN:
            rows = self._nodes.add("Gather", [outputs[0], names.INPUT_IDS], weight, float_type=self._float_type, axis=0)
            return self._nodes.cast(rows, "float32")
        matrix = Matrix(job=job, initializers=outputs, shape=self._weights.table[weight].shape, bias="")
        return self._operation(self._kernels.embedding(names.INPUT_IDS, matrix), weight, "float32")

    def layer_norm(self, x: str, path: str, epsilon: float) -> str:
        """LayerNorm of [B, S, H] over H: normalised, multiplied by path.weight, path.bias added."""
        weight, bias = self._weights.plain(f"{path}.weight"), self._weights.plain(f"{path}.bias")
        inputs = [self._nodes.cast(x, "float32"), weight, bias]
        return self._nodes.add(
            "LayerNormalization", inputs, path, float_type="float32", axis=-1, epsilon=epsilon, stash_type=1
        )

    def rms_norm(self, x: str, path: str, epsilon: float) -> str:
        """RMSNorm of [B, S, H]: divided by the root mean square over H, multiplied by path.weight."""
        inputs = [self._nodes.cast(x, "float32"), self._weights.plain(f"{path}.weight")]
        return self._nodes.add(
            "SimplifiedLayerNormalization", inputs, path, float_type="float32", axis=-1, epsilon=epsilon, stash_type=1
        )

    def linear(self, x: str, path: str, *, scaled_rows: int = 0, row_factor: float = 1.0) -> str:
        """x @ path.weight.T + path.bias (if the table has a bias): [B, S, in] to [B, S, out]. The first `scaled_rows`
        outputs are multiplied by `row_factor`: weight and bias are stored multiplied by it."""
        scaled: dict[str, Any] = {"scaled_rows": scaled_rows, "row_factor": row_factor}
        outputs, job = self._weights.matrix(f"{path}.weight", **scaled)
        bias = self._weights.bias(path, **scaled)
        x = self._cast(x)
        if job.layout is Layout.PLAIN:
            product = self._nodes.add(
                "FusedMatMul", [x, outputs[0]], f"{path}.product", microsoft=True, float_type=self._float_type,
                transA=0, transB=1, transBatchA=0, transBatchB=0, alpha=1.0,
            )  # fmt: skip
            return self._nodes.add("Add", [product, bias], path, float_type=self._float_type) if bias else product
        matrix = self._matrix(path, outputs, job, bias)
        return self._operation(self._kernels.linear(x, matrix, self._recipe.accuracy_level), path)

    def query_key_value(self, x: str, path: str) -> str:
        """Queries, keys and values for `attention`, from one matrix: [B, S, H] to [B, S, (N+2G)*D].

        In float16 the queries are multiplied by the power of two that is nearest to attention's scale, which is exact.
        Otherwise the products of queries and keys could overflow: those of Phi-2 exceed 65504 in its last layers
        (huggingface/transformers#28163). ONNX Runtime's own attention kernels sum in float32, but others may not.
        Queries that are normalised or clipped carry no factor: a norm would take it back, and both bound the products.
        """
        facts = self.architecture
        scaled = self._float_type == "float16" and facts.qkv.is_plain
        factor = 2.0 ** round(math.log2(facts.attention_scale)) if scaled else 1.0
        rows = facts.qkv_rows[0] if factor != 1.0 else 0
        queries = self.linear(x, path, scaled_rows=rows, row_factor=factor)
        self._query_factors[queries] = factor
        return queries

    def query(self, x: str, path: str) -> str:
        """The queries alone, [B, S, H] to [B, S, N*D], with the same factor as in `query_key_value`. For models whose
        keys and values have matrices of their own (`linear`)."""
        return self.query_key_value(x, path)

    def conditioned(self, qkv: str, path: str, epsilon: float) -> tuple[str, str, str]:
        """Queries, keys and values for `attention` by the rule of `architecture.qkv`: [B, S, (N+2G)*D] to [B, S, N*D]
        and twice [B, S, G*D], normalised by path.q_norm and path.k_norm and clipped, in float32. Where the rule is
        plain, `qkv` itself and no keys and values."""
        facts = self.architecture
        if facts.qkv.is_plain:
            return qkv, "", ""
        sizes = self._nodes.constant("attention/qkv_rows", np.array(facts.qkv_rows, np.int64))
        names_of = [f"{path}.split/output_{place}" for place in range(3)]
        self._nodes.add("Split", [qkv, sizes], f"{path}.split", more_outputs=names_of[1:], axis=-1)
        self._nodes.float_types |= dict.fromkeys(names_of, self._nodes.float_types[qkv])
        parts = names_of
        if facts.qkv.norm is not None:
            normed = [
                self._norm_of_heads(part, f"{path}.{letter}_norm", epsilon)
                for letter, part in zip("qk", parts[:2], strict=True)
            ]
            parts = [*normed, parts[2]]
        if facts.qkv.clip is not None:
            parts = [
                self._clip(part, facts.qkv.clip, f"{path}.{letter}_clipped")
                for letter, part in zip("qkv", parts, strict=True)
            ]
        query, key, value = parts
        return query, key, value

    def _norm_of_heads(self, x: str, path: str, epsilon: float) -> str:
        """The RMSNorm of queries or keys [..., heads * D], over all of a token's heads or over each head by itself."""
        if self.architecture.qkv.norm == "width":
            return self.rms_norm(x, path, epsilon)
        apart, shape = [-1, self.architecture.head_size], f"{path}.shape/output_0"
        sizes = self._nodes.constant("attention/head_size", np.array(apart, np.int64))
        self._nodes.add("Shape", [x], f"{path}.shape", start=0)
        kind = self._nodes.float_types[x]
        heads = self._nodes.add("Reshape", [x, sizes], f"{path}.heads", float_type=kind, allowzero=0)
        normed = self.rms_norm(heads, path, epsilon)
        return self._nodes.add("Reshape", [normed, shape], f"{path}.joined", float_type="float32", allowzero=0)

    def attention(
        self, query: str, path: str, layer: int, *, window: int | None, key: str = "", value: str = ""
    ) -> str:
        """Causal attention with the key/value cache of `layer`; returns [B, S, N*D]. A token attends to the last
        `window` positions (None: all). If the table has a row path.sinks [N], these are one more logit of the softmax
        for each query head.

        `query` is either the output of `query_key_value`, [B, S, (N+2G)*D], or queries alone, [B, S, N*D], with `key`
        and `value` [B, S, G*D]. The rotary embedding of queries and keys is applied here.
        """
        parts = [self._by_sequence(self._cast(part)) if part else "" for part in (query, key, value)]
        scale = self.architecture.attention_scale / self._query_factors.get(query, 1.0)
        sinks = self._weights.sinks(path)
        return self._by_token(self._attention_node(parts, sinks, f"{path}.attention", layer, window or 0, scale))

    def _attention_node(self, parts: list[str], sinks: str, path: str, layer: int, window: int, scale: float) -> str:
        """Attention over the cache of a layer, [B, S, N*D]. `parts` are queries, keys and values [B, S, n]; keys and
        values may be "". `window` 0: all positions."""
        facts = self.architecture
        inputs = [
            *parts, names.past_key(layer), names.past_value(layer),
            self._last_positions, self._total_length, "rotary/cos_cache", "rotary/sin_cache",
            "", "", sinks,  # position_ids and attention_bias are absent
            *self._further_inputs(layer),
        ]  # fmt: skip
        return self._nodes.add(
            "GroupQueryAttention", without_absent_end(inputs), path, microsoft=True,
            more_outputs=[names.present_key(layer), names.present_value(layer)],
            float_type=self._float_type, num_heads=facts.num_heads, kv_num_heads=facts.num_kv_heads, scale=scale,
            softcap=0.0, local_window_size=window or -1, do_rotary=1, rotary_interleaved=0,
            smooth_softmax=0, **self._cache_attributes(),
        )  # fmt: skip

    def gelu_tanh(self, x: str, path: str) -> str:
        """GELU in its tanh form, which Phi-2's config calls gelu_new."""
        return self._nodes.add("Gelu", [x], path, float_type=self._nodes.float_types[x], approximate="tanh")

    def silu_times(self, gate: str, up: str, path: str) -> str:
        """silu(gate) * up, value by value, where silu(x) is x / (1 + exp(-x)); in float32."""
        gate, up = (self._nodes.cast(x, "float32") for x in (gate, up))
        sigmoid = self._nodes.add("Sigmoid", [gate], f"{path}.sigmoid", float_type="float32")
        silu = self._nodes.add("Mul", [gate, sigmoid], f"{path}.silu", float_type="float32")
        return self._nodes.add("Mul", [silu, up], path, float_type="float32")

    def add(self, left: str, right: str, path: str) -> str:
        """left + right in float32: the residual stream and the output of attention or MLP."""
        inputs = [self._nodes.cast(left, "float32"), self._nodes.cast(right, "float32")]
        return self._nodes.add("Add", inputs, f"{path}.sum", float_type="float32")

    def scale(self, x: str, factor: float, path: str) -> str:
        """x * factor in float32; x itself if the factor is 1."""
        return self._by_number("Mul", x, factor, f"{path}.scaled")

    def divide(self, x: str, divisor: float, path: str) -> str:
        """x / divisor in float32; x itself if the divisor is 1."""
        return self._by_number("Div", x, divisor, f"{path}.divided")

    def experts(self, x: str, *, gate: str, fc1: str, fc2: str, name: str, activation: str) -> str:
        """A mixture: route [B, S, H] to K experts, chosen and weighted by the rule of `architecture.router`.

        `activation` between fc1 and fc2 is "gelu" in its tanh form, or "swiglu" by the rule of `architecture.swiglu`,
        where the outputs of fc1 alternate between gate and up. Biases are added if the table has them. Raises
        KernelsError for a router or an activation that the kernels do not support, and QuantizationError for a recipe
        that quantises one of the matrices alone.
        """
        rule = self.architecture.router
        self._kernels.check_mixture(rule, activation, name)
        router = self._router(x, gate, name)
        x = self._cast(x)
        both = [f"{fc1}.weight", f"{fc2}.weight"]
        codes = [one for one in both if self._weights.is_quantised(one)]
        if len(codes) == 1:
            floats = both[1 - both.index(codes[0])]
            raise QuantizationError(
                f"planning {name}: found {floats} stored as floats and {codes[0]} quantised, expected both or neither, "
                "since one operator multiplies by both; give both bits, or both bits: float"
            )
        together = both if self._kernels.one_storage else ()
        (weight1, job1), (weight2, job2) = (self._weights.matrix(name, together) for name in both)
        bias1, bias2 = self._weights.bias(fc1), self._weights.bias(fc2)
        plain = job1.layout is Layout.PLAIN
        routed = Routed(
            router=router, k=self.architecture.experts_per_token, activation=activation,
            swiglu=self.architecture.swiglu,
            normalise=rule.normalise or rule.jitter is not None or not plain,
        )  # fmt: skip
        if plain:
            inputs = [x, router, weight1[0], bias1, weight2[0], bias2]
            mixed = self._nodes.add(
                "MoE", inputs, name, microsoft=True, float_type=self._float_type, **mixture_attributes(routed)
            )
        else:
            first, second = self._matrix(fc1, weight1, job1, bias1), self._matrix(fc2, weight2, job2, bias2)
            mixed = self._operation(self._kernels.experts(x, routed, first, second, self._recipe.accuracy_level), name)
        if rule.jitter is not None or not (plain or rule.normalise):
            share = self._mixer_sums.get(name) or self._share_of_chosen(name)
            inputs = [self._nodes.cast(mixed, "float32"), share]
            mixed = self._nodes.add("Mul", inputs, f"{name}.weighed", float_type="float32")
        return self.scale(mixed, rule.scale, f"{name}.routed")

    def times_share(self, output: str, x: str, path: str) -> str:
        """output * sigmoid(x @ path.weight.T) in float32: [..., H] by one share a token, of x [..., H]."""
        inputs = [self._nodes.cast(x, "float32"), self._weights.plain(f"{path}.weight")]
        logit = self._nodes.add(
            "FusedMatMul", inputs, path, microsoft=True, float_type="float32",
            transA=0, transB=1, transBatchA=0, transBatchB=0, alpha=1.0,
        )  # fmt: skip
        share = self._nodes.add("Sigmoid", [logit], f"{path}.sigmoid", float_type="float32")
        factors = [self._nodes.cast(output, "float32"), share]
        return self._nodes.add("Mul", factors, f"{path}.weighed", float_type="float32")

    def finish(self, logits: str, placement: Placement, data_file: str) -> onnx.ModelProto:
        """The complete ONNX model with `logits` as output. Its weights are in `data_file`, at the offsets of
        `placement`."""
        from onnx import TensorProto, helper

        logits = self._nodes.cast(logits, "float32")
        self._nodes.nodes.append(helper.make_node("Identity", [logits], [names.LOGITS], name=names.LOGITS))
        initializers = [
            *self._nodes.constants,
            *(tensor for job in self.jobs for tensor in tensors(job, placement, data_file)),
            *self._further_initializers(),
        ]
        float32, cache = TensorProto.FLOAT, onnx_type(self._cache_type)
        facts = self.architecture
        past_shape = [names.BATCH, facts.num_kv_heads, names.PAST, self._cache_width]
        present_shape = [names.BATCH, facts.num_kv_heads, names.TOTAL, self._cache_width]
        value = helper.make_tensor_value_info
        inputs = self._token_inputs()
        outputs = [value(names.LOGITS, float32, self._logits_shape())]
        for layer in range(facts.num_layers):
            inputs += [value(f(layer), cache, past_shape) for f in (names.past_key, names.past_value)]
            outputs += [value(f(layer), cache, present_shape) for f in (names.present_key, names.present_value)]
        outputs += [value(name, float32, ["tokens", facts.num_experts]) for name in self._router_outputs]
        graph = helper.make_graph(self._nodes.nodes, facts.family, inputs, outputs, initializers)
        opsets = [helper.make_opsetid("", names.OPSET), helper.make_opsetid(names.MICROSOFT_DOMAIN, 1)]
        opsets += [helper.make_opsetid(domain, 1) for domain in {self._kernels.domain} - {names.MICROSOFT_DOMAIN}]
        return helper.make_model(graph, opset_imports=opsets, ir_version=names.IR_VERSION, producer_name="moeship")

    # Helpers of the operations.

    def _cast(self, x: str) -> str:
        """The value in the provider's float type."""
        return self._nodes.cast(x, self._float_type)

    def _by_number(self, operator: str, x: str, number: float, path: str) -> str:
        if number == 1.0:
            return x
        constant = self._nodes.constant(f"number/{number!r}", np.array(number, np.float32))
        return self._nodes.add(operator, [self._nodes.cast(x, "float32"), constant], path, float_type="float32")

    def _clip(self, x: str, limit: float, path: str) -> str:
        """x held within -limit and limit, in float32."""
        ends = [self._nodes.constant(f"number/{number!r}", np.array(number, np.float32)) for number in (-limit, limit)]
        return self._nodes.add("Clip", [self._nodes.cast(x, "float32"), *ends], path, float_type="float32")

    def _router(self, x: str, gate: str, name: str) -> str:
        """Router logits [B*S, kept experts], in the engine's expert order and the provider's float type.

        The matrix product is in float32. It has the rows of all experts, since the order of a product's sums may depend
        on its number of columns: so leaving out an expert changes the logits of no other.

        If the kernel takes float16, the K-th largest logit is subtracted from all logits before they are rounded. That
        does not change a softmax, and it moves the logits between which the choice is made close to zero, where float16
        is finer than float32 is at the magnitude of the logits. So logits that differ in float32 still differ in
        float16, and the kernel chooses the same experts. Equal logits stay equal, and the K-th largest is the same with
        and without experts that can never be chosen.
        """
        weight = self._weights.router(gate)
        logits = self._nodes.add(
            "FusedMatMul", [self._nodes.cast(x, "float32"), weight], f"{name}.router", microsoft=True,
            float_type="float32", transA=0, transB=1, transBatchA=0, transBatchB=0, alpha=1.0,
        )  # fmt: skip
        if bias := self._weights.router_bias(gate):
            logits = self._nodes.add("Add", [logits, bias], f"{name}.router_biased", float_type="float32")
        self._router_logits[name] = logits
        weighed, rule = logits, self.architecture.router
        if rule.jitter is not None:
            weighed, self._mixer_sums[name] = sparse_mixer(
                self._nodes, logits, name, num_experts=self.architecture.num_experts, jitter=rule.jitter,
                prefers_highest_place=self._provider.prefers_highest_place,
            )  # fmt: skip
        flat = self._nodes.constant("router/shape", np.array([-1, self.architecture.num_experts], np.int64))
        rows = self._nodes.add("Reshape", [logits, flat], f"{name}.router_rows", float_type="float32", allowzero=0)
        if self.gives_router_logits:
            output = names.router_logits(len(self._router_outputs))
            self._router_outputs.append(output)
            self._nodes.add("Identity", [rows], f"{name}.router_output", output=output)
        if weighed != logits:
            rows = self._nodes.add("Reshape", [weighed, flat], f"{name}.mixer_rows", float_type="float32", allowzero=0)
        kept = self._weights.kept(gate)
        if len(kept) < self.architecture.num_experts:
            places = [self._expert_order.index(expert) for expert in kept]
            constant = self._nodes.constant(f"router/kept/{','.join(map(str, places))}", np.array(places, np.int64))
            rows = self._nodes.add("Gather", [rows, constant], f"{name}.router_kept", float_type="float32", axis=1)
        return (
            rows
            if self._float_type == "float32"
            else self._nodes.cast(self._below_the_kth(rows, name), self._float_type)
        )

    def _share_of_chosen(self, name: str) -> str:
        """The sum [..., 1] of the chosen experts' values in the softmax over all experts, float32. Quantised mixtures
        normalise, and this takes it back: moeship's kernels know the softmax over the chosen alone, and ONNX Runtime
        1.32's QMoE does not weigh by the one over all experts."""
        logits, k = self._router_logits[name], np.array([self.architecture.experts_per_token], np.int64)
        count, axis = self._nodes.constant("router/k", k), self._nodes.constant("router/axis", np.array([-1], np.int64))
        shares = self._nodes.add("Softmax", [logits], f"{name}.router_shares", float_type="float32", axis=-1)
        largest = self._nodes.add(
            "TopK", [shares, count], f"{name}.router_chosen", more_outputs=[f"{name}.router_chosen/places"],
            float_type="float32", axis=-1, largest=1, sorted=1,
        )  # fmt: skip
        return self._nodes.add(
            "ReduceSum", [largest, axis], f"{name}.router_share", float_type="float32", keepdims=1,
            noop_with_empty_axes=0,
        )  # fmt: skip

    def _below_the_kth(self, rows: str, name: str) -> str:
        """[T, E] minus the K-th largest value of each row."""
        k = self.architecture.experts_per_token
        count, kth = (
            self._nodes.constant(f"router/{n}", np.array([v], np.int64)) for n, v in (("k", k), ("kth", k - 1))
        )
        largest = self._nodes.add(
            "TopK", [rows, count], f"{name}.router_largest", more_outputs=[f"{name}.router_largest/places"],
            axis=-1, largest=1, sorted=1,
        )  # fmt: skip
        least = self._nodes.add("Gather", [largest, kth], f"{name}.router_kth", axis=1)
        return self._nodes.add("Sub", [rows, least], f"{name}.router_shifted", float_type="float32")

    def _check_attention(self) -> None:
        """Raise ExportError for a head that ONNX Runtime's attention does not take, whatever the precision. This comes
        before the matrices: one that no block size divides is refused with the advice to take another precision."""
        facts = self.architecture
        if facts.head_size % 16 or facts.rotary_dim % 16:
            raise ExportError(
                f"planning the graph: the {facts.family} has the head size {facts.head_size} and the rotary dimension "
                f"{facts.rotary_dim}, and ONNX Runtime's GroupQueryAttention takes multiples of 16; this model cannot "
                "be built for ONNX Runtime at any precision"
            )

    def _rotary_caches(self) -> None:
        """Add the rotary tables: cos and sin [max_sequence, rotary_dim / 2]."""
        facts = self.architecture
        found = rotary.tables(self._max_sequence, facts.rotary_dim, facts.rope_base, facts.rotary_scaling)
        for name, table in zip(("cos", "sin"), found, strict=True):
            self._nodes.constant(f"rotary/{name}_cache", table.astype(self._float_type))

    def _matrix(self, path: str, initializers: list[str], job: WeightJob, bias: str) -> Matrix:
        return Matrix(job=job, initializers=initializers, shape=self._weights.table[f"{path}.weight"].shape, bias=bias)

    def _operation(self, operation: Operation, path: str, float_type: str | None = None) -> str:
        """Add a node that takes quantised matrices; returns the name of its output, of the provider's float type unless
        another is given."""
        return self._nodes.add(
            operation.operator, operation.inputs, path, domain=operation.domain,
            float_type=float_type or self._float_type, **operation.attributes,
        )  # fmt: skip
