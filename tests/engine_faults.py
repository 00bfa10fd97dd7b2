"""Faults that are put into an engine's own files: bytes of the weights, nodes and constants of the graphs.

    with_fault(engine, tmp_path / "wrong", FAULTS["two experts swapped"], network)

Each fault names what of the network it is about, so one table serves both families and every precision. Quantised
weights are changed by their codes and scales, as they lie in the file.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from export.families.shared.network import Attention, Layer, Network
from export.quantize.grid import pack, unpack
from export.quantize.layout import MatrixLayout
from trt_build.ort.engine import Engine

GRAPHS = ("model.onnx", "model_serving.onnx", "model_scoring.onnx")
SERVING = GRAPHS[1]
DATA = "model.onnx.data"
_FLOATS = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16, onnx.TensorProto.UINT8: np.uint8}


class Files:
    """An engine's files, opened to be changed."""

    def __init__(self, folder: Path, network: Network) -> None:
        self.network = network
        self._folder = folder
        self.models = {file: onnx.load(str(folder / file), load_external_data=False) for file in GRAPHS}
        self._data = np.memmap(folder / DATA, dtype=np.uint8, mode="r+")
        self._tensors = {tensor.name: tensor for tensor in self.models[GRAPHS[0]].graph.initializer}

    @property
    def layer(self) -> Layer:
        return self.network.layers[1]

    @property
    def attention(self) -> Attention:
        return self.layer.attention

    def save(self) -> None:
        self._data.flush()
        for file, model in self.models.items():
            (self._folder / file).write_bytes(model.SerializeToString())

    def array(self, name: str) -> np.ndarray:
        """The bytes of an initializer in the data file."""
        tensor = self._tensors[name]
        entries = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
        part = self._data[entries["offset"] : entries["offset"] + entries["length"]]
        return part.view(_FLOATS[tensor.data_type]).reshape(tuple(tensor.dims))

    def has(self, name: str) -> bool:
        return name in self._tensors

    def nodes(self, *operators: str) -> Iterator[Any]:
        """The nodes of all graphs with these operators."""
        for model in self.models.values():
            yield from (node for node in model.graph.node if node.op_type in operators)

    def change(self, weight: str, edit: Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]) -> None:
        """Replace codes [..., N, K] and scales [..., N, P] of a quantised weight by what `edit` makes of them. A float
        weight comes as codes, with scales of ones."""
        if self.has(weight):
            values = self.array(weight)
            values[:] = edit(values.copy(), np.ones((*values.shape[:-1], 1), np.float32))[0]
            return
        packed, stored = self.array(f"{weight}.codes"), self.array(f"{weight}.scales")
        bits, block, grouped = self._recipe(f"{weight}.codes")
        if not grouped:
            codes = unpack(packed.reshape(*stored.shape[:-1], -1), bits)
            codes, scales = edit(codes.copy(), stored.copy())
            packed[:] = pack(np.ascontiguousarray(codes), bits).reshape(packed.shape)
            stored[:] = scales
            return
        rows, features = self._sizes(f"{weight}.codes")
        layout = MatrixLayout(rows=rows, features=features, bits=bits, block_size=block)
        codes, scales = edit(layout.unpack_codes(packed), layout.unpack_scales(stored))
        packed[:], stored[:] = layout.pack_codes(np.ascontiguousarray(codes)), layout.pack_scales(scales)

    def _user(self, name: str) -> tuple[Any, dict[str, Any], int]:
        node = next(n for n in self.models[GRAPHS[0]].graph.node if name in n.input)
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        return node, attributes, list(node.input).index(name)

    def _recipe(self, codes: str) -> tuple[int, int, bool]:
        node, attributes, place = self._user(codes)
        if node.op_type == "Experts" and place > 2:
            return attributes["second_bits"], attributes["second_block_size"], True
        bits = attributes.get("bits", attributes.get("expert_weight_bits"))
        return bits, attributes["block_size"], node.domain == "moeship"

    def _sizes(self, codes: str) -> tuple[int, int]:
        node, attributes, place = self._user(codes)
        if node.op_type == "BlockLinear":
            return attributes["out_features"], attributes["in_features"]
        if node.op_type == "Embedding":
            return attributes["rows"], attributes["features"]
        hidden, width = attributes["hidden_size"], attributes["expert_size"]
        gated = attributes["activation"] == b"swiglu"
        return ((1 + gated) * width, hidden) if place == 2 else (hidden, width)


@dataclass(frozen=True)
class Fault:
    """A change of an engine's files. `at`: "weights" for what the first question must find, "graph" for what only the
    second can, "serving" for a change of the serving graph alone. `needs_bias`: whether it is about a bias, which
    Mixtral does not have."""

    edit: Callable[[Files], None]
    at: str = "weights"
    needs_bias: bool = False


def in_generating_graph(edit: Callable[[Files], None]) -> Callable[[Files], None]:
    """Change the graph for onnxruntime-genai alone."""

    def apply(files: Files) -> None:
        every = files.models
        files.models = {GRAPHS[0]: every[GRAPHS[0]]}
        edit(files)
        files.models = every

    return apply


def with_fault(engine: Engine, folder: Path, fault: Fault, network: Network) -> Engine:
    """A copy of an engine with a fault in it, in place of what `folder` holds.

    It is not opened again, since its files are not those of engine.json.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(engine.folder, folder)
    files = Files(folder, network)
    if fault.at == "serving":
        files.models = {SERVING: files.models[SERVING]}
    fault.edit(files)
    files.save()
    return dataclasses.replace(engine, folder=folder)


def attribute(node: Any, name: str) -> Any:
    return next(entry for entry in node.attribute if entry.name == name)


def _scaled(codes: np.ndarray, scales: np.ndarray, factor: float, rows: slice = slice(None)) -> tuple[Any, Any]:
    """Float weights come with scales of ones."""
    if codes.dtype == np.uint8:
        scales[..., rows, :] *= scales.dtype.type(factor)
    else:
        codes[..., rows, :] *= codes.dtype.type(factor)
    return codes, scales


def scale(which: Callable[[Files], str], factor: float, rows: slice = slice(None)) -> Callable[[Files], None]:
    return lambda files: files.change(which(files), lambda codes, scales: _scaled(codes, scales, factor, rows))


def shift_rows(which: Callable[[Files], str]) -> Callable[[Files], None]:
    def edit(codes: np.ndarray, scales: np.ndarray) -> tuple[Any, Any]:
        return np.roll(codes, 1, axis=-2), np.roll(scales, 1, axis=-2)

    return lambda files: files.change(which(files), edit)


def swap_rows(which: Callable[[Files], str]) -> Callable[[Files], None]:
    def edit(codes: np.ndarray, scales: np.ndarray) -> tuple[Any, Any]:
        codes[..., [3, 7], :], scales[..., [3, 7], :] = codes[..., [7, 3], :].copy(), scales[..., [7, 3], :].copy()
        return codes, scales

    return lambda files: files.change(which(files), edit)


def swap_experts(files: Files) -> None:
    for module in (files.layer.mlp.first, files.layer.mlp.second):
        for kind in ("weight", "weight.codes", "weight.scales", "bias"):
            if files.has(f"{module}.{kind}"):
                values = files.array(f"{module}.{kind}")
                values[[0, 2]] = values[[2, 0]].copy()


def one_expert(factor: float) -> Callable[[Files], None]:
    """Scale the matrix of one expert."""

    def edit(codes: np.ndarray, scales: np.ndarray) -> tuple[Any, Any]:
        part = _scaled(codes[1], scales[1], factor)
        codes[1], scales[1] = part
        return codes, scales

    return lambda files: files.change(f"{files.layer.mlp.second}.weight", edit)


def raise_codes(files: Files) -> None:
    """Add one to every code of a matrix; a float matrix is moved by a hundredth of its size."""

    def edit(codes: np.ndarray, scales: np.ndarray) -> tuple[Any, Any]:
        if codes.dtype != np.uint8:
            return codes + np.abs(codes).mean() / 100, scales
        top = 15 if codes.max() < 16 else 255
        return np.minimum(codes, top - 1) + np.uint8(1), scales

    files.change(f"{files.attention.output}.weight", edit)


def move_codes(which: Callable[[Files], str], rows: slice, columns: slice) -> Callable[[Files], None]:
    """Make codes of every matrix of a weight the next ones; float values become larger by a hundredth."""

    def edit(codes: np.ndarray, scales: np.ndarray) -> tuple[Any, Any]:
        part = codes[..., rows, columns]
        if codes.dtype != np.uint8:
            part *= codes.dtype.type(1.01)
        else:
            top = 15 if codes.max() < 16 else 255
            part[:] = np.where(part < top, part + 1, part - 1)
        return codes, scales

    return lambda files: files.change(which(files), edit)


def scale_block(which: Callable[[Files], str], factor: float) -> Callable[[Files], None]:
    """Multiply the scale of one block of every matrix of a weight; of a float weight half of a row."""

    def edit(codes: np.ndarray, scales: np.ndarray) -> tuple[Any, Any]:
        if codes.dtype == np.uint8:
            scales[..., 5, 0] *= scales.dtype.type(factor)
        else:
            codes[..., 5, : codes.shape[-1] // 2] *= codes.dtype.type(factor)
        return codes, scales

    return lambda files: files.change(which(files), edit)


def values(which: Callable[[Files], str], edit: Callable[[np.ndarray], Any]) -> Callable[[Files], None]:
    """Change the values of a float initializer in place."""

    def apply(files: Files) -> None:
        array = files.array(which(files))
        array[:] = edit(array.copy())

    return apply


def number(
    operators: tuple[str, ...], name: str, edit: Callable[[Any], Any], *, everywhere: bool = False
) -> Callable[[Files], None]:
    """Change an attribute of the second such node of each graph, or of all of them."""

    def apply(files: Files) -> None:
        for model in files.models.values():
            nodes = [node for node in model.graph.node if node.op_type in operators]
            for node in nodes if everywhere else nodes[1:2]:
                entry = attribute(node, name)
                if entry.type == onnx.AttributeProto.FLOAT:
                    entry.f = edit(entry.f)
                else:
                    entry.i = edit(entry.i)

    return apply


def text(operators: tuple[str, ...], name: str, to: dict[bytes, bytes]) -> Callable[[Files], None]:
    def apply(files: Files) -> None:
        for node in files.nodes(*operators):
            for entry in node.attribute:
                if entry.name in name.split("/"):
                    entry.s = to[entry.s]

    return apply


def drop_input(which: Callable[[Files], str]) -> Callable[[Files], None]:
    """Leave a bias out of the nodes that add it."""

    def apply(files: Files) -> None:
        name = which(files)
        for model in files.models.values():
            for node in model.graph.node:
                if name in node.input and node.op_type == "Add":
                    node.op_type = "Identity"
                    node.input.remove(name)
                elif name in node.input:
                    node.input[list(node.input).index(name)] = ""

    return apply


def rotary(base: float) -> Callable[[Files], None]:
    def apply(files: Files) -> None:
        for model in files.models.values():
            for tensor in model.graph.initializer:
                if tensor.name.startswith("rotary/"):
                    old = numpy_helper.to_array(tensor)
                    powers = base ** (np.arange(old.shape[1]) / old.shape[1])
                    angles = np.arange(len(old))[:, None] / powers
                    new = np.cos(angles) if "cos" in tensor.name else np.sin(angles)
                    tensor.CopyFrom(numpy_helper.from_array(new.astype(old.dtype), tensor.name))

    return apply


def tables(edit: Callable[[np.ndarray], np.ndarray], kinds: str = "cos sin") -> Callable[[Files], None]:
    """Change the rotary tables [positions, frequencies]."""

    def apply(files: Files) -> None:
        for model in files.models.values():
            for tensor in model.graph.initializer:
                if tensor.name.startswith("rotary/") and tensor.name[7:10] in kinds.split():
                    changed = edit(numpy_helper.to_array(tensor)).astype(np.float32)
                    tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))

    return apply


def anew(table: np.ndarray) -> np.ndarray:
    """Positions from 300 on count from 0 again."""
    return np.concatenate([table[:300], table[: len(table) - 300]])


def other_layers_norm(files: Files) -> None:
    """The second layer is normalised with the factors of the first."""
    names = [f"{files.network.layers[layer].norm.name}.weight" for layer in (0, 1)]
    for model in files.models.values():
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name == names[1]:
                    node.input[place] = names[0]


def rewire(files: Files) -> None:
    """The second layer's attention takes the first layer's queries, keys and values."""
    for model in files.models.values():
        nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
        nodes[1].input[0] = nodes[0].input[0]


def skip_attention(files: Files) -> None:
    """The second layer's attention is added twice: to what enters the layer, and to itself."""
    for model in files.models.values():
        sums = [node for node in model.graph.node if node.op_type == "Add" and node.name.endswith("residual.sum")]
        sums[1].input[0] = sums[1].input[1]


def other_layers_output(files: Files) -> None:
    """The first two layers' attention outputs exchange their weights."""
    one, other = (files.network.layers[layer].attention.output for layer in (0, 1))
    for model in files.models.values():
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name.startswith(f"{one}."):
                    node.input[place] = other + name.removeprefix(one)
                elif name.startswith(f"{other}."):
                    node.input[place] = one + name.removeprefix(other)


def first_position(files: Files) -> None:
    for model in files.models.values():
        for tensor in model.graph.initializer:
            if tensor.name in ("last/start", "last/end"):
                value = np.array([0 if tensor.name == "last/start" else 1])
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def scaled_head(files: Files) -> None:
    """A node that nobody planned multiplies what enters the head by 1.0005."""
    for model in files.models.values():
        nodes = list(model.graph.node)
        place = max(number for number, node in enumerate(nodes) if node.op_type in _NORM)
        [output] = nodes[place].output
        nodes[place].output[0] = f"{output}/before"
        factor = numpy_helper.from_array(np.array(1.0005, np.float32), "factor")
        model.graph.initializer.append(factor)
        added = onnx.helper.make_node("Mul", [f"{output}/before", "factor"], [output], name="added")
        del model.graph.node[:]
        model.graph.node.extend([*nodes[: place + 1], added, *nodes[place + 1 :]])


_MIXTURE = ("MoE", "QMoE", "Experts")
_NORM = ("LayerNormalization", "SimplifiedLayerNormalization")
_ATTENTION = ("GroupQueryAttention",)


def embedding(files: Files) -> str:
    return f"{files.network.embedding}.weight"


def head(files: Files) -> str:
    return f"{files.network.head}.weight"


def qkv(files: Files) -> str:
    return f"{files.attention.inputs[0]}.weight"


def output(files: Files) -> str:
    return f"{files.attention.output}.weight"


def first(files: Files) -> str:
    return f"{files.layer.mlp.first}.weight"


def second(files: Files) -> str:
    return f"{files.layer.mlp.second}.weight"


def gate(files: Files) -> str:
    return f"{files.layer.mlp.gate}.weight"


def norm(files: Files) -> str:
    return f"{files.layer.norms[0].name}.weight"


def bias(which: Callable[[Files], str]) -> Callable[[Files], str]:
    return lambda files: which(files).removesuffix("weight") + "bias"


_MATRICES = {
    "embedding": embedding, "head": head, "query, key and value": qkv, "attention's output": output,
    "experts' first": first, "experts' second": second,
}  # fmt: skip
FAULTS: dict[str, Fault] = {
    **{f"{name} times 1.03": Fault(scale(which, 1.03)) for name, which in _MATRICES.items()},
    **{f"{name} of zeros": Fault(scale(which, 0.0)) for name, which in _MATRICES.items()},
    **{f"{name} moved by one row": Fault(shift_rows(which)) for name, which in _MATRICES.items()},
    **{f"two rows of {name} swapped": Fault(swap_rows(which)) for name, which in _MATRICES.items()},
    "an embedding row of zeros": Fault(scale(embedding, 0.0, slice(65, 66))),
    "eight rows of the experts' second of zeros": Fault(scale(second, 0.0, slice(8, 16))),
    "one expert's second times 1.05": Fault(one_expert(1.05)),
    "codes off by one": Fault(raise_codes),
    "every 64th code off by one": Fault(move_codes(second, slice(None), slice(63, None, 64))),
    "a code of each row off by one": Fault(move_codes(qkv, slice(None), slice(7, 8))),
    "one code off by one": Fault(move_codes(output, slice(5, 6), slice(7, 8))),
    "one block's scale times 1.05": Fault(scale_block(first, 1.05)),
    "sixteen rows of attention's output times 1.03": Fault(scale(output, 1.03, slice(16, 32))),
    "two experts swapped": Fault(swap_experts),
    "two router rows swapped": Fault(values(gate, lambda rows: rows[[1, 0, *range(2, len(rows))]])),
    "router times 1.03": Fault(values(gate, lambda rows: rows * np.float32(1.03))),
    "norm times 1.03": Fault(values(norm, lambda factors: factors * np.float32(1.03))),
    "norm moved by one": Fault(values(norm, lambda factors: np.roll(factors, 1))),
    "one value of the norm off by a bit": Fault(
        values(norm, lambda f: np.where(np.arange(len(f)) == 5, np.nextafter(f, 9), f))
    ),
    "another layer's norm": Fault(other_layers_norm),
    "head bias dropped": Fault(drop_input(bias(head)), needs_bias=True),
    "head bias of zeros": Fault(values(bias(head), np.zeros_like), needs_bias=True),
    "biases of the experts' second dropped": Fault(drop_input(bias(second)), needs_bias=True),
    "biases of the experts' second of zeros": Fault(values(bias(second), np.zeros_like), needs_bias=True),
    "one bias of zero": Fault(values(bias(output), lambda b: np.where(np.arange(len(b)) == 3, 0, b)), needs_bias=True),
    "biases of two experts swapped": Fault(
        values(bias(first), lambda b: b[[1, 0, *range(2, len(b))]]), needs_bias=True
    ),
    "attention's scale times 1.03": Fault(number(_ATTENTION, "scale", lambda value: value * 1.03)),
    "one position less in the window": Fault(
        number(_ATTENTION, "local_window_size", lambda size: 64 if size == -1 else size - 1)
    ),
    "interleaved rotary": Fault(number(_ATTENTION, "rotary_interleaved", lambda _: 1)),
    "no rotary": Fault(number(_ATTENTION, "do_rotary", lambda _: 0)),
    "another epsilon": Fault(number(_NORM, "epsilon", lambda value: value * 1.1)),
    "one expert less in a layer": Fault(number(_MIXTURE, "k", lambda k: k - 1)),
    "another activation": Fault(
        text(_MIXTURE, "activation/activation_type", {b"gelu": b"silu", b"swiglu": b"gelu"}), at="weights"
    ),
    "rotary base off by one": Fault(rotary(10001.0)),
    "another layer's queries": Fault(rewire, at="graph"),
    "a residual taken twice": Fault(skip_attention, at="graph"),
    "generating alone: a residual taken twice": Fault(in_generating_graph(skip_attention)),
    "generating alone: another layer's queries": Fault(in_generating_graph(rewire)),
    "generating alone: another layer's output": Fault(in_generating_graph(other_layers_output)),
    "generating alone: what enters the head times 1.0005": Fault(in_generating_graph(scaled_head)),
    "generating alone: the first position's logits": Fault(in_generating_graph(first_position)),
    "positions off by one": Fault(tables(lambda table: np.roll(table, 1, axis=0))),
}
# Of the serving graph alone. The first question finds each of them too; they are for the question about serving.
SERVING_FAULTS: dict[str, Fault] = {
    name: Fault(edit, at="serving")
    for name, edit in {
        "rotary sine negated": tables(np.negative, "sin"),
        "rotary positions from 300 on begin anew": tables(anew),
        "one expert less per token": number(_MIXTURE, "k", lambda k: k - 1, everywhere=True),
        "norms' epsilon a hundred times as large": number(_NORM, "epsilon", lambda value: value * 100, everywhere=True),
        "rotary base 10100 in place of 10000": rotary(10100.0),
        "attention scaled by 1.03": number(_ATTENTION, "scale", lambda value: value * 1.03, everywhere=True),
    }.items()
}
