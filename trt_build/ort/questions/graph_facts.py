"""The facts of an engine's graphs against config.json: attributes of nodes, operands in their places, rotary caches.

What is expected comes from the family's `network`, which reads config.json by itself, and the quantisation from
engine.json. What flows from node to node is only looked at where the generating graph has another flow than the
scoring graph (`same_flow.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from export.checkpoint.tensor_table import TensorSpec
from export.exporter import GENERATING_GRAPH, SERVING_GRAPH
from export.families import Model
from export.families.shared.network import Activation, Attention, Mlp, Network, Norm
from export.onnx_graph import names
from export.onnx_graph.initializers import zero_points_name
from export.provider import KERNELS
from export.quantize.layout import LAYOUT
from export.reference.attention import rotary_tables
from trt_build.ort.engine import Engine
from trt_build.ort.questions.same_flow import flow_failures
from trt_build.ort.questions.stored_graph import Node, StoredGraph, read_graph
from trt_build.ort.questions.stored_weights import attention_factor, attention_scale

_ROTARY_CACHES = ("rotary/cos_cache", "rotary/sin_cache")
_PLAIN_PRODUCT = {"transA": 0, "transB": 1, "transBatchA": 0, "transBatchB": 0, "alpha": 1.0}


def graph_failures(engine: Engine, model: Model, scoring: StoredGraph) -> list[str]:
    """What of an engine's graphs is not what config.json and engine.json say, one sentence a failure; `scoring` is the
    scoring graph. Raises EngineError for a graph that cannot be read."""
    graphs = [scoring, *(read_graph(engine.folder, file) for file in (GENERATING_GRAPH, SERVING_GRAPH))]
    found = [failure for graph in graphs for failure in _Facts(engine, model, graph).failures()]
    found += flow_failures(graphs[1], scoring)
    for graph in graphs[1:]:
        for name in sorted(graph.extents.keys() | scoring.extents.keys()):
            here, there = graph.extents.get(name), scoring.extents.get(name)
            if here != there:
                found.append(
                    f"{graph.file}: the initializer {name} is {_place(here)}, in {scoring.file} {_place(there)}"
                )
    return found


def _place(extent: Any) -> str:  # noqa: ANN401 - an Extent or None
    return "absent" if extent is None else f"{extent.dtype} {list(extent.shape)} at byte {extent.offset}"


class _Facts:
    """One graph beside what is expected of it."""

    def __init__(self, engine: Engine, model: Model, graph: StoredGraph) -> None:
        self._manifest = engine.manifest
        self._stored = engine.manifest.recipe()
        self._provider = KERNELS[engine.manifest.kernels][engine.manifest.provider]
        self._weights, self._table = model.weights, model.weights.table
        self._network: Network = model.family.network(model.weights.checkpoint.config)
        self._experts_per_token = model.architecture.experts_per_token
        self._num_experts = model.architecture.num_experts
        self._left_out = engine.manifest.left_out_experts
        self._graph = graph
        self._users = graph.users()
        self._used: set[str] = set()
        self._found: list[str] = []

    def failures(self) -> list[str]:
        network = self._network
        self._embedding(f"{network.embedding}.weight")
        for layer, record in enumerate(network.layers):
            for norm in record.norms:
                self._norm(norm)
            for name in (*record.attention.inputs, record.attention.output):
                self._linear(name)
            self._attention(layer, record.attention)
            self._mlp(layer, record.mlp)
        self._clips()
        self._mixers()
        self._norm(network.norm)
        self._linear(network.head)
        self._rotary(network.layers[0].attention)
        for name in sorted(self._graph.extents.keys() - self._used):
            self._fail(name, "is in the file and in no node that should have it")
        return self._found

    def _fail(self, name: str, problem: str) -> None:
        self._found.append(f"{self._graph.file}: {name} {problem}")

    def _quantised(self, row: str) -> bool:
        return f"{row}.codes" in self._graph.extents

    def _user(self, initializer: str, place: int, operators: Sequence[str]) -> Node | None:
        """The one node that has an initializer as its input `place`; adds a failure if there is none."""
        users = self._users.get(initializer, [])
        fitting = [node for node, taken in users if node.operator in operators and taken == place]
        if len(users) != 1 or len(fitting) != 1:
            taken = ", ".join(f"input {at} of {node.operator} {node.name}" for node, at in users) or "no node"
            self._fail(initializer, f"is taken by {taken}, expected by input {place} of one {' or '.join(operators)}")
        return fitting[0] if fitting else None

    def _operands(self, node: Node, start: int, expected: Sequence[str]) -> None:
        """Check a node's inputs from `start` on; later ones than expected must be absent."""
        found = list(node.inputs[start:])
        while found and not found[-1]:
            found.pop()
        wanted = list(expected)
        while wanted and not wanted[-1]:
            wanted.pop()
        if found != wanted:
            self._fail(node.name, f"takes {', '.join(map(repr, found))}, expected {', '.join(map(repr, wanted))}")
        self._used.update(expected)

    def _attributes(self, node: Node, expected: Mapping[str, Any]) -> None:
        for name, value in expected.items():
            found = node.attributes.get(name)
            found = found.decode() if isinstance(found, bytes) else found
            wanted = float(np.float32(value)) if isinstance(value, float) else value
            if found != wanted:
                self._fail(node.name, f"has {name} {found}, expected {wanted}")

    def _bias(self, module: str) -> str:
        return f"{module}.bias" if f"{module}.bias" in self._table else ""

    def _matrix(self, row: str) -> list[str]:
        return [f"{row}.codes", f"{row}.scales"] if self._quantised(row) else [row]

    def _zeros(self, row: str) -> str:
        """The zero points of a row; "" if it has none."""
        name = zero_points_name(row)
        return name if name in self._graph.extents else ""

    def _has_bits_of_grid(self, spec: TensorSpec, bits: Any) -> bool:  # noqa: ANN401 - an attribute
        """Whether a matrix whose codes the checkpoint has may have these bits: those of the checkpoint's codes, where
        the recipe has more."""
        choice = self._stored.choice(spec)
        if choice is None or not isinstance(choice.bits, int):
            return False
        grid = self._weights.grid(spec.name)
        return grid is not None and bits == grid.bits < choice.bits

    def _recipe(self, node: Node, spec: TensorSpec, bits: str = "bits", block_size: str = "block_size") -> None:
        """Check the attributes of bits and block size against engine.json."""
        choice = self._stored.choice(spec)
        expected = choice.bits if choice else None
        if node.attributes.get(bits) != expected and not self._has_bits_of_grid(spec, node.attributes.get(bits)):
            self._fail(node.name, f"has {bits} {node.attributes.get(bits)}, engine.json says {expected}")
        block, sizes = node.attributes.get(block_size), self._stored.block_sizes(spec)
        if block not in sizes:
            self._fail(node.name, f"has {block_size} {block}, engine.json says {' or '.join(map(str, sizes))}")

    def _is_plain(self, row: str) -> bool:
        """Whether a matrix is stored as floats; adds a failure if engine.json says otherwise."""
        choice = self._stored.choice(self._table[row])
        bits = choice.bits if choice else None
        if self._quantised(row) == (bits is None):
            self._fail(row, f"is {'quantised' if bits is None else 'not quantised'}, engine.json says {bits} bits")
        return not self._quantised(row)

    def _accuracy(self) -> dict[str, Any]:
        level = self._manifest.precision.accuracy_level
        if self._provider.kernels == "moeship":
            return {"layout": LAYOUT, "activations": "int8" if level == 4 else "float32"}
        return {"accuracy_level": level}

    def _embedding(self, row: str) -> None:
        if self._is_plain(row):
            if node := self._user(row, 0, ["Gather"]):
                self._operands(node, 0, [row, names.INPUT_IDS])
                self._attributes(node, {"axis": 0})
            return
        if any(node.operator == "Embedding" for node, _ in self._users.get(f"{row}.codes", [])):
            if node := self._user(f"{row}.codes", 1, ["Embedding"]):
                self._operands(node, 0, [names.INPUT_IDS, *self._matrix(row), self._zeros(row)])
                self._recipe(node, self._table[row])
                rows, columns = self._table[row].shape
                self._attributes(node, {"layout": LAYOUT, "rows": rows, "features": columns})
        elif node := self._user(f"{row}.codes", 0, ["GatherBlockQuantized"]):
            zeros = zero_points_name(row) if self._provider.writes_zero_points else self._zeros(row)
            self._operands(node, 0, [f"{row}.codes", names.INPUT_IDS, f"{row}.scales", zeros])
            self._recipe(node, self._table[row])
            self._attributes(node, {"gather_axis": 0, "quantize_axis": 1})

    def _norm(self, norm: Norm) -> None:
        operator = "LayerNormalization" if norm.centred else "SimplifiedLayerNormalization"
        if node := self._user(f"{norm.name}.weight", 1, [operator]):
            self._operands(node, 1, [f"{norm.name}.weight", *([f"{norm.name}.bias"] if norm.centred else [])])
            self._attributes(node, {"axis": -1, "epsilon": float(norm.epsilon), "stash_type": 1})

    def _clips(self) -> None:
        """Check that queries, keys and values of each layer are clipped, and nothing else is."""
        limits = [layer.attention.clip for layer in self._network.layers if layer.attention.clip is not None]
        expected = [(-np.float32(limit), np.float32(limit)) for limit in limits for _ in range(3)]
        clips = [node for node in self._graph.nodes if node.operator == "Clip"]
        found = [tuple(self._graph.constants.get(name) for name in node.inputs[1:]) for node in clips]
        if found != expected:
            self._fail(
                "attention", f"has {len(clips)} Clips by {found[:1]}, expected {len(expected)} by {expected[:1]}"
            )

    def _mixers(self) -> None:
        """Check how near a logit must be in each sparse mixer, which compares twice."""
        routers = [layer.mlp.router for layer in self._network.layers if layer.mlp.gate is not None]
        expected = [np.float32(2 * router.jitter) for router in routers if router.jitter is not None for _ in range(2)]
        nodes = [node for node in self._graph.nodes if node.operator == "Greater"]
        found = [self._graph.constants.get(node.inputs[1]) for node in nodes]
        if found != expected:
            self._fail("sparse mixers", f"compare with {found[:1]}, expected {expected[:1]}")

    def _linear(self, module: str) -> None:
        row, bias = f"{module}.weight", self._bias(module)
        rows, columns = self._table[row].shape
        if self._is_plain(row):
            if node := self._user(row, 1, ["FusedMatMul"]):
                self._operands(node, 1, [row])
                self._attributes(node, _PLAIN_PRODUCT)
                if bias and (added := self._user(bias, 1, ["Add"])):
                    self._operands(added, 0, [node.outputs[0], bias])
            return
        own = self._provider.kernels == "moeship"
        node = self._user(f"{row}.codes", 1, ["BlockLinear" if own else "MatMulNBits"])
        if node is None:
            return
        gap = [] if own else [""]
        self._operands(node, 1, [*self._matrix(row), self._zeros(row), *gap, bias])
        self._recipe(node, self._table[row])
        sizes: dict[str, Any] = (
            {"in_features": columns, "out_features": rows} if own else {"N": rows, "K": columns, "weight_prepacked": 0}
        )
        self._attributes(node, {**sizes, **self._accuracy()})

    def _attention(self, layer: int, attention: Attention) -> None:
        node = self._user(names.past_key(layer), 3, ["GroupQueryAttention"])
        if node is None:
            return
        head_size = self._table[f"{attention.output}.weight"].shape[-1] // attention.num_heads
        factor = attention_factor(self._graph, layer, attention, head_size)
        if factor != 1.0 and self._provider.float_type != "float16":
            self._fail(node.name, f"has a scale for queries that carry the factor {factor}, expected 1 in float32")
        self._attributes(
            node,
            {
                "num_heads": attention.num_heads, "kv_num_heads": attention.num_kv_heads,
                "scale": attention_scale(attention, head_size) / factor, "local_window_size": attention.window or -1,
                "softcap": 0.0, "do_rotary": 1, "rotary_interleaved": 0, "smooth_softmax": 0,
            },
        )  # fmt: skip
        found = (node.input(4), *node.inputs[7:9], node.input(11), *node.outputs[1:3])
        sinks = attention.sinks or ""
        self._used.add(sinks)
        present = (names.present_key(layer), names.present_value(layer))
        expected = (names.past_value(layer), *_ROTARY_CACHES, sinks, *present)
        if found != expected:
            self._fail(node.name, f"takes and gives {', '.join(found)}, expected {', '.join(expected)}")

    def _mlp(self, layer: int, mlp: Mlp) -> None:
        if mlp.shared is not None:
            self._mlp(layer, mlp.shared)
            share = f"{mlp.share}.weight"
            if node := self._user(share, 1, ["FusedMatMul"]):
                self._operands(node, 1, [share])
                self._attributes(node, _PLAIN_PRODUCT)
        if mlp.gate is None:
            for module in (mlp.first, mlp.up, mlp.second):
                if module is not None:
                    self._linear(module)
            return
        gate = f"{mlp.gate}.weight"
        if node := self._user(gate, 1, ["FusedMatMul"]):
            self._operands(node, 1, [gate])
            self._attributes(node, _PLAIN_PRODUCT)
            bias = self._bias(mlp.gate)
            if bias and (added := self._user(bias, 1, ["Add"])):
                self._operands(added, 0, [node.outputs[0], bias])
        first, second = f"{mlp.first}.weight", f"{mlp.second}.weight"
        plain, own = self._is_plain(first), self._provider.kernels == "moeship"
        self._is_plain(second)
        operator = "MoE" if plain else "Experts" if own else "QMoE"
        node = self._user(self._matrix(first)[0], 2, [operator])
        if node is None:
            return
        zeros = [[self._zeros(row)] for row in (first, second)]
        biases = [[self._bias(mlp.first)], [self._bias(mlp.second)]]
        if own:
            expected = [self._matrix(first), zeros[0], biases[0], self._matrix(second), zeros[1], biases[1]]
        else:
            expected = [self._matrix(first), biases[0], self._matrix(second), biases[1], ["", "", ""], *zeros]
        self._operands(node, 2, [name for names_of in expected for name in names_of])
        self._attributes(node, {"k": self._experts_per_token, **self._mixture(layer, mlp, plain=plain, own=own)})
        if plain:
            return
        self._recipe(node, self._table[first], "bits" if own else "expert_weight_bits")
        if "second_bits" in node.attributes or "second_block_size" in node.attributes:
            self._recipe(node, self._table[second], "second_bits", "second_block_size")
        extra: dict[str, Any] = {} if own else {"quant_type": "int", "weights_prepacked": 0}
        self._attributes(node, {**extra, **self._accuracy()})

    def _mixture(self, layer: int, mlp: Mlp, *, plain: bool, own: bool) -> dict[str, Any]:
        """The attributes of a mixture's node beside k and the recipe."""
        activation = "gelu" if mlp.activation is Activation.GELU_TANH else "swiglu" if mlp.gated else "silu"
        alpha_and_beta = {"activation_alpha": mlp.swiglu.alpha, "activation_beta": mlp.swiglu.beta}
        swiglu = alpha_and_beta if mlp.gated or own else {}
        largest = mlp.swiglu.finite_limit
        if own:
            _, hidden, width = self._table[f"{mlp.second}.weight"].shape
            stored = self._num_experts - len(self._left_out.get(str(layer), ()))
            return {
                "activation": activation, "activation_limit": largest, **swiglu,
                "hidden_size": hidden, "expert_size": width, "experts": stored,
            }  # fmt: skip
        limit = {"swiglu_limit": largest} if mlp.gated else {}
        return {
            "activation_type": activation, "normalize_routing_weights": int(
                mlp.router.normalise or mlp.router.jitter is not None or not plain
            ),
            "use_sparse_mixer": 0, "swiglu_fusion": int(mlp.gated), **swiglu, **limit,
        }  # fmt: skip

    def _rotary(self, attention: Attention) -> None:
        """Compare the rotary caches, which are for max_sequence positions. The last bit of cos and sin may be another
        one on the machine that built the engine."""
        tables = rotary_tables(self._manifest.max_sequence, attention)
        for name, table in zip(_ROTARY_CACHES, tables, strict=True):
            expected = table.astype(self._provider.float_type)
            found = self._graph.constants.get(name)
            if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
                shape = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                self._fail(name, f"is {shape}, expected {expected.dtype} {list(expected.shape)}")
                continue
            wide = expected.astype(np.float64)
            off = ~(np.abs(found.astype(np.float64) - wide) <= np.abs(np.spacing(expected)).astype(np.float64))
            if off.any():
                row, column = (int(place[0]) for place in np.nonzero(off))
                self._fail(
                    name,
                    f"at position {row}, frequency {column} is {float(found[row, column]):.9g}, expected "
                    f"{float(expected[row, column]):.9g} for base {attention.rotary_base:g} and width "
                    f"{attention.rotary_dim}",
                )
