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
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from export.architecture import Architecture
from export.checkpoint.tensor_table import Role, TensorSpec
from export.errors import ExportError
from export.onnx_graph import names
from export.onnx_graph.initializers import onnx_type, tensors
from export.onnx_graph.kernels import BY_NAME, Matrix, Operation, Routed, mixture_attributes
from export.onnx_graph.weights import Initializer, Layout, Placement, WeightJob
from export.provider import ONNX_RUNTIME, Provider
from export.quantize.grid import block_size
from export.quantize.recipe import QuantPlan

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
        plan: QuantPlan,
        provider: Provider,
        *,
        max_sequence: int | None = None,
        left_out: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        self.architecture = architecture
        self._max_sequence = max_sequence or architecture.max_positions
        self.jobs: list[WeightJob] = []
        self._plan = plan
        self._provider = provider
        self._kernels = BY_NAME[provider.kernels]
        self._expert_order = provider.expert_order(architecture.num_experts)
        self._left_out = left_out or {}
        self._table = {
            name: spec.with_experts(len(self._kept(name))) if spec.stacks_experts else spec
            for name, spec in table.items()
        }
        self._float_type = provider.float_type
        self._float_types: dict[str, str] = {}  # name of a value -> its float type, where known
        self._query_factors: dict[str, float] = {}  # output of `query_key_value` -> factor that its queries carry
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._router_outputs: list[str] = []
        self._check_attention()
        self._last_positions, self._total_length = self._sequence_facts()
        self._rotary_caches()

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

    def _lengths_of_queries(self) -> list[str]:
        """The inputs of attention that follow the rotary tables."""
        return []

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
        outputs, job = self._weight(weight)
        if job.layout is Layout.PLAIN:
            rows = self._node("Gather", [outputs[0], names.INPUT_IDS], weight, float_type=self._float_type, axis=0)
            return self._cast(rows, "float32")
        inputs = [outputs[0], names.INPUT_IDS, *outputs[1:]]
        return self._node(
            "GatherBlockQuantized", inputs, weight, microsoft=True, float_type="float32",
            bits=job.bits, block_size=job.block_size, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def layer_norm(self, x: str, path: str, epsilon: float) -> str:
        """LayerNorm of [B, S, H] over H: normalised, multiplied by path.weight, path.bias added."""
        weight, bias = self._plain(f"{path}.weight"), self._plain(f"{path}.bias")
        inputs = [self._cast(x, "float32"), weight, bias]
        return self._node(
            "LayerNormalization", inputs, path, float_type="float32", axis=-1, epsilon=epsilon, stash_type=1
        )

    def rms_norm(self, x: str, path: str, epsilon: float) -> str:
        """RMSNorm of [B, S, H]: divided by the root mean square over H, multiplied by path.weight."""
        inputs = [self._cast(x, "float32"), self._plain(f"{path}.weight")]
        return self._node(
            "SimplifiedLayerNormalization", inputs, path, float_type="float32", axis=-1, epsilon=epsilon, stash_type=1
        )

    def linear(self, x: str, path: str, *, scaled_rows: int = 0, row_factor: float = 1.0) -> str:
        """x @ path.weight.T + path.bias (if the table has a bias): [B, S, in] to [B, S, out]. The first `scaled_rows`
        outputs are multiplied by `row_factor`: weight and bias are stored multiplied by it."""
        scaled: dict[str, Any] = {"scaled_rows": scaled_rows, "row_factor": row_factor}
        outputs, job = self._weight(f"{path}.weight", **scaled)
        bias = self._bias(path, **scaled)
        x = self._cast(x, self._float_type)
        if job.layout is Layout.PLAIN:
            product = self._node(
                "FusedMatMul", [x, outputs[0]], f"{path}.product", microsoft=True, float_type=self._float_type,
                transA=0, transB=1, transBatchA=0, transBatchB=0, alpha=1.0,
            )  # fmt: skip
            return self._node("Add", [product, bias], path, float_type=self._float_type) if bias else product
        matrix = self._matrix(path, outputs, job, bias)
        return self._operation(self._kernels.linear(x, matrix, self._plan.accuracy_level), path)

    def query_key_value(self, x: str, path: str) -> str:
        """Queries, keys and values for `attention`, from one matrix: [B, S, H] to [B, S, (N+2G)*D].

        In float16 the queries are multiplied by the power of two that is nearest to attention's scale, which is exact.
        Otherwise the products of queries and keys could overflow: those of Phi-2 exceed 65504 in its last layers
        (huggingface/transformers#28163). ONNX Runtime's own attention kernels sum in float32, but others may not.
        """
        facts = self.architecture
        factor = 2.0 ** round(math.log2(facts.attention_scale)) if self._float_type == "float16" else 1.0
        rows = facts.qkv_rows[0] if factor != 1.0 else 0
        queries = self.linear(x, path, scaled_rows=rows, row_factor=factor)
        self._query_factors[queries] = factor
        return queries

    def query(self, x: str, path: str) -> str:
        """The queries alone, [B, S, H] to [B, S, N*D], with the same factor as in `query_key_value`. For models whose
        keys and values have matrices of their own (`linear`)."""
        return self.query_key_value(x, path)

    def attention(
        self, query: str, path: str, layer: int, *, window: int | None, key: str = "", value: str = ""
    ) -> str:
        """Causal attention with the key/value cache of `layer`; returns [B, S, N*D]. A token attends to the last
        `window` positions (None: all).

        `query` is either the output of `query_key_value`, [B, S, (N+2G)*D], or queries alone, [B, S, N*D], with `key`
        and `value` [B, S, G*D]. The rotary embedding of queries and keys is applied here.
        """
        facts = self.architecture
        inputs = [
            *(self._by_sequence(self._cast(part, self._float_type)) if part else "" for part in (query, key, value)),
            names.past_key(layer), names.past_value(layer),
            self._last_positions, self._total_length, "rotary/cos_cache", "rotary/sin_cache",
            *self._lengths_of_queries(),
        ]  # fmt: skip
        attended = self._node(
            "GroupQueryAttention", inputs, f"{path}.attention", microsoft=True,
            more_outputs=[names.present_key(layer), names.present_value(layer)],
            float_type=self._float_type, num_heads=facts.num_heads, kv_num_heads=facts.num_kv_heads,
            scale=facts.attention_scale / self._query_factors.get(query, 1.0),
            softcap=0.0, local_window_size=window or -1, do_rotary=1, rotary_interleaved=0,
            smooth_softmax=0,
        )  # fmt: skip
        return self._by_token(attended)

    def gelu_tanh(self, x: str, path: str) -> str:
        """GELU in its tanh form, which Phi-2's config calls gelu_new."""
        return self._node("Gelu", [x], path, float_type=self._float_types[x], approximate="tanh")

    def add(self, left: str, right: str, path: str) -> str:
        """left + right in float32: the residual stream and the output of attention or MLP."""
        inputs = [self._cast(left, "float32"), self._cast(right, "float32")]
        return self._node("Add", inputs, f"{path}.sum", float_type="float32")

    def scale(self, x: str, factor: float, path: str) -> str:
        """x * factor in float32; x itself if the factor is 1."""
        return self._by_number("Mul", x, factor, f"{path}.scaled")

    def divide(self, x: str, divisor: float, path: str) -> str:
        """x / divisor in float32; x itself if the divisor is 1."""
        return self._by_number("Div", x, divisor, f"{path}.divided")

    def experts(self, x: str, *, gate: str, fc1: str, fc2: str, name: str, activation: str) -> str:
        """A mixture: route [B, S, H] to K experts, chosen and weighted by the rule of `architecture.router`.

        `activation` between fc1 and fc2 is "gelu" in its tanh form, or "swiglu", which is silu(gate) * up, where the
        outputs of fc1 alternate between gate and up. Biases are added if the table has them. Raises
        KernelsError for a router or an activation that the kernels do not support.
        """
        rule = self.architecture.router
        self._kernels.check_mixture(rule, activation, name)
        router = self._router(x, gate, name)
        x = self._cast(x, self._float_type)
        features = [self._table[f"{fc}.weight"].shape[-1] for fc in (fc1, fc2)]
        (weight1, job1), (weight2, job2) = (self._weight(f"{fc}.weight", features) for fc in (fc1, fc2))
        bias1, bias2 = self._bias(fc1), self._bias(fc2)
        routed = Routed(
            router=router, k=self.architecture.experts_per_token, activation=activation, normalise=rule.normalise
        )
        if job1.layout is Layout.PLAIN:
            inputs = [x, router, weight1[0], bias1, weight2[0], bias2]
            mixed = self._node(
                "MoE", inputs, name, microsoft=True, float_type=self._float_type, **mixture_attributes(routed)
            )
        else:
            first, second = self._matrix(fc1, weight1, job1, bias1), self._matrix(fc2, weight2, job2, bias2)
            mixed = self._operation(self._kernels.experts(x, routed, first, second, self._plan.accuracy_level), name)
        return self.scale(mixed, rule.scale, f"{name}.routed")

    def finish(self, logits: str, placement: Placement, data_file: str) -> onnx.ModelProto:
        """The complete ONNX model with `logits` as output. Its weights are in `data_file`, at the offsets of
        `placement`."""
        from onnx import TensorProto, helper

        logits = self._cast(logits, "float32")
        self._nodes.append(helper.make_node("Identity", [logits], [names.LOGITS], name=names.LOGITS))
        initializers = [
            *self._constants,
            *(tensor for job in self.jobs for tensor in tensors(job, placement, data_file)),
        ]
        float32, cache = TensorProto.FLOAT, onnx_type(self._float_type)
        facts = self.architecture
        past_shape = [names.BATCH, facts.num_kv_heads, names.PAST, facts.head_size]
        present_shape = [names.BATCH, facts.num_kv_heads, names.TOTAL, facts.head_size]
        value = helper.make_tensor_value_info
        inputs = self._token_inputs()
        outputs = [value(names.LOGITS, float32, self._logits_shape())]
        for layer in range(facts.num_layers):
            inputs += [value(f(layer), cache, past_shape) for f in (names.past_key, names.past_value)]
            outputs += [value(f(layer), cache, present_shape) for f in (names.present_key, names.present_value)]
        outputs += [value(name, float32, ["tokens", facts.num_experts]) for name in self._router_outputs]
        graph = helper.make_graph(self._nodes, facts.family, inputs, outputs, initializers)
        opsets = [helper.make_opsetid("", names.OPSET), helper.make_opsetid(names.MICROSOFT_DOMAIN, 1)]
        opsets += [helper.make_opsetid(domain, 1) for domain in {self._kernels.domain} - {names.MICROSOFT_DOMAIN}]
        return helper.make_model(graph, opset_imports=opsets, ir_version=names.IR_VERSION, producer_name="moeship")

    # Helpers of the operations.

    def _kept(self, name: str) -> tuple[int, ...]:
        """The experts of a gate or of a row that stacks experts, in the engine's expert order, without those that are
        left out."""
        left_out = self._left_out.get(name, ())
        return tuple(expert for expert in self._expert_order if expert not in left_out)

    def _by_number(self, operator: str, x: str, number: float, path: str) -> str:
        if number == 1.0:
            return x
        constant = self._constant(f"number/{number!r}", np.array(number, np.float32))
        return self._node(operator, [self._cast(x, "float32"), constant], path, float_type="float32")

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
        job = WeightJob(
            source=gate, role=Role.ROUTER, layout=Layout.PLAIN, expert_order=self._expert_order,
            outputs=(Initializer(name=gate, dtype="float32", shape=self._table[gate].shape),),
        )  # fmt: skip
        self.jobs.append(job)
        logits = self._node(
            "FusedMatMul", [self._cast(x, "float32"), gate], f"{name}.router", microsoft=True, float_type="float32",
            transA=0, transB=1, transBatchA=0, transBatchB=0, alpha=1.0,
        )  # fmt: skip
        flat = self._constant("router/shape", np.array([-1, self.architecture.num_experts], np.int64))
        rows = self._node("Reshape", [logits, flat], f"{name}.router_rows", float_type="float32", allowzero=0)
        if self.gives_router_logits:
            output = names.router_logits(len(self._router_outputs))
            self._router_outputs.append(output)
            self._node("Identity", [rows], f"{name}.router_output", output=output)
        kept = self._kept(gate)
        if len(kept) < self.architecture.num_experts:
            places = [self._expert_order.index(expert) for expert in kept]
            constant = self._constant(f"router/kept/{','.join(map(str, places))}", np.array(places, np.int64))
            rows = self._node("Gather", [rows, constant], f"{name}.router_kept", float_type="float32", axis=1)
        return rows if self._float_type == "float32" else self._cast(self._below_the_kth(rows, name), self._float_type)

    def _below_the_kth(self, rows: str, name: str) -> str:
        """[T, E] minus the K-th largest value of each row."""
        k = self.architecture.experts_per_token
        count, kth = (self._constant(f"router/{n}", np.array([v], np.int64)) for n, v in (("k", k), ("kth", k - 1)))
        largest = self._node(
            "TopK", [rows, count], f"{name}.router_largest", more_outputs=[f"{name}.router_largest/places"],
            axis=-1, largest=1, sorted=1,
        )  # fmt: skip
        least = self._node("Gather", [largest, kth], f"{name}.router_kth", axis=1)
        return self._node("Sub", [rows, least], f"{name}.router_shifted", float_type="float32")

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
        """Add the rotary tables: cos and sin [max_sequence, rotary_dim / 2] of position * base^(-2i / rotary_dim).

        Frequencies and angles are rounded to float32 at the same steps as in PyTorch's implementations. An angle
        computed in float64 would differ by 1e-4 at position 2000.
        """
        facts = self.architecture
        exponents = np.arange(0, facts.rotary_dim, 2, dtype=np.float32) / np.float32(facts.rotary_dim)
        powers = np.power(np.float64(facts.rope_base), exponents.astype(np.float64)).astype(np.float32)
        frequencies = np.float32(1.0) / powers
        angles = np.arange(self._max_sequence, dtype=np.float32)[:, None] * frequencies[None, :]
        self._constant("rotary/cos_cache", np.cos(angles.astype(np.float64)).astype(self._float_type))
        self._constant("rotary/sin_cache", np.sin(angles.astype(np.float64)).astype(self._float_type))

    def _cast(self, value: str, float_type: str) -> str:
        """The value in another float type. A value is cast to a type at most once."""
        if self._float_types[value] == float_type:
            return value
        path = f"{value}/{float_type}"
        if path not in self._float_types:
            self._node("Cast", [value], path, output=path, float_type=float_type, to=onnx_type(float_type))
        return path

    def _weight(
        self,
        name: str,
        features: Sequence[int] | None = None,
        **scaled: Any,  # noqa: ANN401 - WeightJob's fields
    ) -> tuple[list[str], WeightJob]:
        """Plan a matrix in the precision of its role; returns the names of its initializers, and its job. `features`
        are the numbers of input features of all matrices that must have the same block size (None: of this one)."""
        spec = self._table[name]
        bits = self._plan.bits_of(spec.role)
        order = self._kept(name) if spec.role is Role.EXPERT else None
        if bits is None:
            outputs: tuple[Initializer, ...] = (Initializer(name=name, dtype=self._float_type, shape=spec.shape),)
            job = WeightJob(
                source=name, role=spec.role, layout=Layout.PLAIN, outputs=outputs, expert_order=order, **scaled
            )
            self.jobs.append(job)
            return [name], job
        block = block_size(name, features or spec.shape[-1:], self._plan.block_sizes)
        kernels = BY_NAME[ONNX_RUNTIME] if spec.role is Role.EMBEDDING else self._kernels
        initializers = kernels.initializers(spec, bits, block, self._provider)
        job = WeightJob(
            source=name, role=spec.role, layout=kernels.layout, bits=bits, block_size=block, expert_order=order,
            outputs=initializers, **scaled,
        )  # fmt: skip
        self.jobs.append(job)
        return [initializer.name for initializer in initializers], job

    def _matrix(self, path: str, initializers: list[str], job: WeightJob, bias: str) -> Matrix:
        return Matrix(job=job, initializers=initializers, shape=self._table[f"{path}.weight"].shape, bias=bias)

    def _bias(self, path: str, **scaled: Any) -> str:  # noqa: ANN401 - WeightJob's fields
        """Plan path.bias; returns its name, or "" if the table has no such row: ONNX's notation for an absent input."""
        return self._plain(f"{path}.bias", self._float_type, **scaled) if f"{path}.bias" in self._table else ""

    def _plain(self, name: str, float_type: str = "float32", **scaled: Any) -> str:  # noqa: ANN401 - as above
        """Plan a tensor that is never quantised (a norm or bias); returns its name. Biases of experts are stored in the
        engine's expert order."""
        spec = self._table[name]
        if self._plan.bits_of(spec.role) is not None:
            raise ExportError(f"planning {name}: the recipe lists the role {spec.role}, which is never quantised")
        order = self._kept(name) if spec.stacks_experts else None
        output = Initializer(name=name, dtype=float_type, shape=spec.shape)
        self.jobs.append(
            WeightJob(source=name, role=spec.role, layout=Layout.PLAIN, outputs=(output,), expert_order=order, **scaled)
        )
        return name

    def _constant(self, name: str, value: npt.NDArray[Any]) -> str:
        from onnx import numpy_helper

        if all(existing.name != name for existing in self._constants):
            self._constants.append(numpy_helper.from_array(value, name))
        return name

    def _operation(self, operation: Operation, path: str) -> str:
        """Add a node that multiplies quantised matrices; returns the name of its output."""
        return self._node(
            operation.operator, operation.inputs, path, domain=operation.domain, float_type=self._float_type,
            **operation.attributes,
        )  # fmt: skip

    def _node(
        self,
        operator: str,
        inputs: list[str],
        path: str,
        *,
        microsoft: bool = False,
        domain: str = "",
        output: str | None = None,
        more_outputs: list[str] | None = None,
        float_type: str | None = None,
        **attributes: Any,  # noqa: ANN401 - ints, floats and strings
    ) -> str:
        from onnx import helper

        first = output or f"{path}/output_0"
        domain = names.MICROSOFT_DOMAIN if microsoft else domain
        node = helper.make_node(
            operator, inputs, [first, *(more_outputs or [])], name=path, domain=domain, **attributes
        )
        self._nodes.append(node)
        if float_type is not None:
            self._float_types[first] = float_type
        return first
