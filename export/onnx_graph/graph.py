"""The graph under construction: one method an operation, nodes named by their path, weights planned as jobs.

Every attribute is written, none left to an operator's default. Values are passed as names. Operators and their
layouts: ONNX Runtime's contributed operators (docs/ContribOperators.md) and ONNX opset 21.

Matrices, what flows between them and the key/value cache have the provider's float type. The residual stream, norms,
router and logits are float32: a float16 sum over the layers could overflow, and a float16 router would see ties where
there are none. Each operation casts what it is given to what it takes; on a float32 provider nothing is cast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from export.architecture import Architecture
from export.checkpoint.tensor_table import Join, Role, TensorSpec
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


class GraphBuilder:
    """Builds one decoder graph. `scoring` gives logits of all positions and the router's logits as outputs."""

    def __init__(
        self,
        architecture: Architecture,
        table: Mapping[str, TensorSpec],
        plan: QuantPlan,
        provider: Provider,
        *,
        scoring: bool,
        max_sequence: int | None = None,
    ) -> None:
        self.architecture = architecture
        self.scoring = scoring
        self._max_sequence = max_sequence or architecture.max_positions
        self.jobs: list[WeightJob] = []
        self._table = table
        self._plan = plan
        self._provider = provider
        self._kernels = BY_NAME[provider.kernels]
        self._expert_order = provider.expert_order(architecture.num_experts)
        self._float_type = provider.float_type
        self._float_types: dict[str, str] = {}  # of values, where known
        self._query_factors: dict[str, float] = {}  # of packed query, key and value
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._router_outputs: list[str] = []
        self._sequence_facts()
        self._rotary_caches()

    # Operations, in the order a decoder uses them.

    def embedding(self, weight: str) -> str:
        """Token ids int64 [B, S] to float32 [B, S, H]."""
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
        """[B, S, H] normalised, scaled and shifted by path.weight and path.bias."""
        weight, bias = self._plain(f"{path}.weight"), self._plain(f"{path}.bias")
        inputs = [self._cast(x, "float32"), weight, bias]
        return self._node(
            "LayerNormalization", inputs, path, float_type="float32", axis=-1, epsilon=epsilon, stash_type=1
        )

    def rms_norm(self, x: str, path: str, epsilon: float) -> str:
        """[B, S, H] divided by its root mean square over H, and scaled by path.weight."""
        inputs = [self._cast(x, "float32"), self._plain(f"{path}.weight")]
        return self._node(
            "SimplifiedLayerNormalization", inputs, path, float_type="float32", axis=-1, epsilon=epsilon, stash_type=1
        )

    def linear(self, x: str, path: str, *, scaled_rows: int = 0, row_factor: float = 1.0) -> str:
        """x @ path.weight.T + path.bias, where the table has a bias: [B, S, in] to [B, S, out]; its first `scaled_rows`
        outputs are multiplied by `row_factor`, which the stored weight and bias take in."""
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
        """Queries, keys and values for `attention`, of one matrix: [B, S, H] to [B, S, (N+2G)*D].

        In float16 the queries carry the power of two nearest to attention's scale, which rounds nothing: their products
        with the keys are then of the scores' own magnitude, where Phi-2's raw products pass 65504 in its last layers
        (huggingface/transformers#28163). ONNX Runtime's own attention kernels sum in float32; others need not.
        """
        facts = self.architecture
        factor = 2.0 ** round(math.log2(facts.attention_scale)) if self._float_type == "float16" else 1.0
        rows = facts.qkv_rows[0] if factor != 1.0 else 0
        queries = self.linear(x, path, scaled_rows=rows, row_factor=factor)
        self._query_factors[queries] = factor
        return queries

    def query(self, x: str, path: str) -> str:
        """The queries alone, [B, S, H] to [B, S, N*D], carrying what those of `query_key_value` do; for attention whose
        keys and values have matrices of their own (`linear`)."""
        return self.query_key_value(x, path)

    def attention(
        self, query: str, path: str, layer: int, *, window: int | None, key: str = "", value: str = ""
    ) -> str:
        """Queries to [B, S, N*D], through the cache of `layer`, looking back on `window` positions (None: on all).

        `query` is what `query_key_value` gave, [B, S, (N+2G)*D]; or queries alone, [B, S, N*D], with `key` and `value`
        [B, S, G*D]. Both are turned by the rotary embedding here.
        """
        facts = self.architecture
        if facts.head_size % 16 or facts.rotary_dim % 16:
            raise ExportError(
                f"planning {path}: head size {facts.head_size} and rotary dimension {facts.rotary_dim}, ONNX Runtime's "
                "GroupQueryAttention takes multiples of 16; this model cannot be built for it"
            )
        inputs = [
            *(self._cast(part, self._float_type) if part else "" for part in (query, key, value)),
            names.past_key(layer), names.past_value(layer),
            "attention/seqlens_k", "attention/total_sequence_length", "rotary/cos_cache", "rotary/sin_cache",
        ]  # fmt: skip
        return self._node(
            "GroupQueryAttention", inputs, f"{path}.attention", microsoft=True,
            more_outputs=[names.present_key(layer), names.present_value(layer)],
            float_type=self._float_type, num_heads=facts.num_heads, kv_num_heads=facts.num_kv_heads,
            scale=facts.attention_scale / self._query_factors.get(query, 1.0),
            softcap=0.0, local_window_size=window or -1, do_rotary=1, rotary_interleaved=0,
            smooth_softmax=0,
        )  # fmt: skip

    def gelu_tanh(self, x: str, path: str) -> str:
        """GELU in its tanh form, Phi-2's gelu_new."""
        return self._node("Gelu", [x], path, float_type=self._float_types[x], approximate="tanh")

    def add(self, left: str, right: str, path: str) -> str:
        """The residual stream and what a part of a layer adds to it, float32."""
        inputs = [self._cast(left, "float32"), self._cast(right, "float32")]
        return self._node("Add", inputs, f"{path}.sum", float_type="float32")

    def scale(self, x: str, factor: float, path: str) -> str:
        """x times a number, float32; x itself where the number is 1."""
        return self._by_number("Mul", x, factor, f"{path}.scaled")

    def divide(self, x: str, divisor: float, path: str) -> str:
        """x by a number, float32; x itself where the number is 1."""
        return self._by_number("Div", x, divisor, f"{path}.divided")

    def experts(self, x: str, *, gate: str, fc1: str, fc2: str, name: str, activation: str) -> str:
        """Route [B, S, H] to K experts, chosen and weighted as the architecture's router says.

        `activation` between fc1 and fc2 is "gelu" in its tanh form, or "swiglu", silu(gate) * up, where fc1 gives gate
        and up in turn. A bias is added where the table has one. Raises ExportError for a router that the kernels lack.
        """
        rule = self.architecture.router
        self._kernels.check_router(rule, name)
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

    def last_position(self, x: str) -> str:
        """[B, S, H] to [B, 1, H]."""
        starts, ends, axes = (self._constant(f"last/{n}", np.array([v], np.int64)) for n, v in
                              (("start", -1), ("end", np.iinfo(np.int64).max), ("axis", 1)))  # fmt: skip
        return self._node("Slice", [x, starts, ends, axes], "last_position", float_type=self._float_types[x])

    def finish(self, logits: str, placement: Placement, data_file: str) -> onnx.ModelProto:
        """The whole model, its weights lying in `data_file` as placed."""
        from onnx import TensorProto, helper

        logits = self._cast(logits, "float32")
        self._nodes.append(helper.make_node("Identity", [logits], [names.LOGITS], name=names.LOGITS))
        initializers = [
            *self._constants,
            *(tensor for job in self.jobs for tensor in tensors(job, placement, data_file)),
        ]
        float32, int64, cache = TensorProto.FLOAT, TensorProto.INT64, onnx_type(self._float_type)
        facts = self.architecture
        past_shape = [names.BATCH, facts.num_kv_heads, names.PAST, facts.head_size]
        present_shape = [names.BATCH, facts.num_kv_heads, names.TOTAL, facts.head_size]
        value = helper.make_tensor_value_info
        inputs = [
            value(names.INPUT_IDS, int64, [names.BATCH, names.SEQUENCE]),
            value(names.ATTENTION_MASK, int64, [names.BATCH, names.TOTAL]),
        ]
        outputs = [value(names.LOGITS, float32, [names.BATCH, names.SEQUENCE if self.scoring else 1, facts.vocab_size])]
        for layer in range(facts.num_layers):
            inputs += [value(f(layer), cache, past_shape) for f in (names.past_key, names.past_value)]
            outputs += [value(f(layer), cache, present_shape) for f in (names.present_key, names.present_value)]
        outputs += [value(name, float32, ["tokens", facts.num_experts]) for name in self._router_outputs]
        graph = helper.make_graph(self._nodes, facts.family, inputs, outputs, initializers)
        opsets = [helper.make_opsetid("", names.OPSET), helper.make_opsetid(names.MICROSOFT_DOMAIN, 1)]
        opsets += [helper.make_opsetid(domain, 1) for domain in {self._kernels.domain} - {names.MICROSOFT_DOMAIN}]
        return helper.make_model(graph, opset_imports=opsets, ir_version=names.IR_VERSION, producer_name="moeship")

    # Parts of the above.

    def _by_number(self, operator: str, x: str, number: float, path: str) -> str:
        if number == 1.0:
            return x
        constant = self._constant(f"number/{number!r}", np.array(number, np.float32))
        return self._node(operator, [self._cast(x, "float32"), constant], path, float_type="float32")

    def _router(self, x: str, gate: str, name: str) -> str:
        """Router logits [B*S, E], in the engine's expert order and the provider's float type.

        The product is float32 of the float32 norm. Where the kernel takes float16, the K-th largest logit is taken
        from all of them first: a softmax does not feel it, logits that differ still differ beside zero, where float16
        is finer than float32 is beside the logits, and so the kernel chooses the experts that float32 would.
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
        if self.scoring:
            output = names.router_logits(len(self._router_outputs))
            self._router_outputs.append(output)
            self._node("Identity", [rows], f"{name}.router_output", output=output)
        return rows if self._float_type == "float32" else self._cast(self._below_the_kth(rows, name), self._float_type)

    def _below_the_kth(self, rows: str, name: str) -> str:
        """[T, E] less the K-th largest of each row."""
        k = self.architecture.experts_per_token
        count, kth = (self._constant(f"router/{n}", np.array([v], np.int64)) for n, v in (("k", k), ("kth", k - 1)))
        largest = self._node(
            "TopK", [rows, count], f"{name}.router_largest", more_outputs=[f"{name}.router_largest/places"],
            axis=-1, largest=1, sorted=1,
        )  # fmt: skip
        least = self._node("Gather", [largest, kth], f"{name}.router_kth", axis=1)
        return self._node("Sub", [rows, least], f"{name}.router_shifted", float_type="float32")

    def _sequence_facts(self) -> None:
        """Per row the last position's index, int32 [B], and the longest row's length, int32 scalar, from the mask."""
        from onnx import TensorProto

        one, axis = self._constant("one", np.array(1, np.int64)), self._constant("axis_1", np.array([1], np.int64))
        lengths = self._node("ReduceSum", [names.ATTENTION_MASK, axis], "attention/lengths", keepdims=0,
                             noop_with_empty_axes=0)  # fmt: skip
        last = self._node("Sub", [lengths, one], "attention/last")
        self._node("Cast", [last], "attention/seqlens_k", output="attention/seqlens_k", to=TensorProto.INT32)
        shape = self._node("Shape", [names.ATTENTION_MASK], "attention/mask_shape", start=0)
        total = self._node("Gather", [shape, one], "attention/total", axis=0)
        self._node("Cast", [total], "attention/total_sequence_length", output="attention/total_sequence_length",
                   to=TensorProto.INT32)  # fmt: skip

    def _rotary_caches(self) -> None:
        """cos and sin [max_sequence, rotary_dim / 2] of position * base^(-2i / rotary_dim).

        Frequencies and angles are rounded to float32 where PyTorch's implementations round them: at position 2000 an
        angle in float64 would differ by 1e-4.
        """
        facts = self.architecture
        exponents = np.arange(0, facts.rotary_dim, 2, dtype=np.float32) / np.float32(facts.rotary_dim)
        powers = np.power(np.float64(facts.rope_base), exponents.astype(np.float64)).astype(np.float32)
        frequencies = np.float32(1.0) / powers
        angles = np.arange(self._max_sequence, dtype=np.float32)[:, None] * frequencies[None, :]
        self._constant("rotary/cos_cache", np.cos(angles.astype(np.float64)).astype(self._float_type))
        self._constant("rotary/sin_cache", np.sin(angles.astype(np.float64)).astype(self._float_type))

    def _cast(self, value: str, float_type: str) -> str:
        """The value in another float type; a value is cast once however many ask."""
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
        """Plan a matrix in the precision its role has; returns its initializers' names. `features` are those of all
        matrices that share its block size."""
        spec = self._table[name]
        bits = self._plan.bits_of(spec.role)
        order = self._expert_order if spec.role is Role.EXPERT else None
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
        """Plan path.bias; an empty name where the table has none, as ONNX writes an absent input."""
        return self._plain(f"{path}.bias", self._float_type, **scaled) if f"{path}.bias" in self._table else ""

    def _plain(self, name: str, float_type: str = "float32", **scaled: Any) -> str:  # noqa: ANN401 - as above
        """Plan a tensor that is never quantised: norms and biases; an expert's bias follows the experts' order."""
        spec = self._table[name]
        if self._plan.bits_of(spec.role) is not None:
            raise ExportError(f"planning {name}: the role {spec.role} is never quantised, the recipe lists it")
        order = self._expert_order if spec.join is Join.STACK else None
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
        """A node that multiplies quantised matrices."""
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
