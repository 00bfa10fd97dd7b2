"""Graphs of an engine that also give what each layer adds to the residual, which is attention's output and that of the
MLP or the experts, and the sum.

    scoring, serving = (stored_or_float32(engine, file) for file in (SCORING_GRAPH, SERVING_GRAPH))
    parts = layer_parts(engine, scoring, serving)
    session = Session(engine, content=with_outputs(serving, parts))
    session.step(cache, rows, more={part.value: room})

What is added is the second operand of an Add that a family's graph names after its layer (`export/families/shared`), in
every form of the graph. A value that becomes an output is not fused away, which changes the order of a sum at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.families import family_named
from export.optional import optional_package
from export.reference.model import ATTENTION, MLP, SUM
from trt_build.ort.engine import Engine
from trt_build.ort.questions.float32 import with_float32_activations

PARTS_BYTES = 1 << 29  # of what parts of layers give in a graph, held at a time
# Differences of what a part gives that are more than the order of summation makes, which in small models of three
# layers was 5e-7 with float32 and 5e-4 with float16 between the operations; attention scaled by 1.03 makes 4e-3 and
# 1.3e-2 where it begins.
PART_LIMITS = {"float32": 1e-4, "float16": 3e-3}
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True, kw_only=True)
class LayerPart:
    """What a layer adds to the residual, or the sum: the number of the layer, which part as the reference names it
    (`export.reference.model`: ATTENTION, MLP, SUM), its name in words, and that of its value in a graph."""

    layer: int
    part: str
    name: str
    value: str


def stored_or_float32(engine: Engine, file: str) -> bytes:
    """A graph of an engine; of a quantised one for the CPU with float32 activations."""
    if engine.manifest.provider == "cpu" and engine.manifest.precision.quantises:
        return with_float32_activations(engine.folder, file)
    return (engine.folder / file).read_bytes()


def layer_parts(engine: Engine, *graphs: bytes) -> list[LayerPart]:
    """The parts of all layers that each of the graphs computes, in their order; behind the parts of a layer the sum
    that it gives to the next."""
    facts, layer_name = engine.manifest.architecture, family_named(engine.manifest.family).layer
    sums = [
        {node.name: (*node.input[:2], node.output[0]) for node in _read(content).graph.node if node.op_type == "Add"}
        for content in graphs
    ]
    found = []
    for layer in range(facts.num_layers):
        name, mlp = layer_name(layer), "experts" if layer in facts.mixture_layers else "MLP"
        for part, words, node, place in (
            (ATTENTION, "attention", f"{name}.attention_residual.sum", 1),
            (MLP, mlp, f"{name}.sum", 1),
            (SUM, "residual's sum", f"{name}.sum", 2),
        ):
            values = {graph[node][place] if node in graph else None for graph in sums}
            value = values.pop()
            if not values and value is not None:
                found.append(LayerPart(layer=layer, part=part, name=f"{words} of layer {layer}", value=value))
    return found


def groups_of(parts: Sequence[LayerPart], hidden: int, num_tokens: int) -> Iterator[Sequence[LayerPart]]:
    """The parts in groups, each of which gives at most PARTS_BYTES for so many tokens."""
    size = max(1, PARTS_BYTES // (4 * hidden * num_tokens))
    for start in range(0, len(parts), size):
        yield parts[start : start + size]


def with_outputs(content: bytes, parts: Sequence[LayerPart]) -> bytes:
    """A graph that gives the values of parts too."""
    with optional_package("onnx", "reading an engine's graph", "cpu"):
        import onnx
    model = _read(content)
    model.graph.output.extend(onnx.ValueInfoProto(name=part.value) for part in parts)  # ONNX Runtime infers the types
    written: bytes = model.SerializeToString()
    return written


def room_for(backend: Any, parts: Sequence[LayerPart], *shape: int) -> dict[str, npt.NDArray[Any]]:  # noqa: ANN401
    """Value -> room of a shape for what a loaded graph gives of each part, in the graph's own types."""
    types = {output.name: output.type for output in backend.get_outputs()}
    return {part.value: np.empty(shape, dtype=_DTYPES[types[part.value]]) for part in parts}


def _read(content: bytes) -> Any:  # noqa: ANN401 - an onnx.ModelProto
    with optional_package("onnx", "reading an engine's graph", "cpu"):
        import onnx
    return onnx.load_model_from_string(content)
