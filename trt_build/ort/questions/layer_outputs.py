"""Graphs of an engine that also give what each layer adds to the residual, which is attention's output and that of the
MLP or the experts, and the sum.

    scoring, serving = (stored_or_float32(engine, file) for file in (SCORING_GRAPH, SERVING_GRAPH))
    parts = layer_parts(scoring, serving, engine.manifest)
    session = Session(engine, content=with_outputs(serving, parts))
    session.step(cache, rows, more={part.value: room})

What is added is the second operand of an Add that a family's graph names after its layer (`export/families/shared`), in
every form of the graph. A value that becomes an output is not fused away, which changes the order of a sum at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.families import family_named
from export.optional import optional_package
from trt_build.ort.engine import Engine
from trt_build.ort.questions.float32 import with_float32_activations

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True, kw_only=True)
class LayerPart:
    """What a layer adds to the residual, or the sum: its name in words, and that of its value in a graph."""

    name: str
    value: str


def stored_or_float32(engine: Engine, file: str) -> bytes:
    """A graph of an engine; of a quantised one for the CPU with float32 activations."""
    if engine.manifest.provider == "cpu" and engine.manifest.precision.quantises:
        return with_float32_activations(engine.folder, file)
    return (engine.folder / file).read_bytes()


def layer_parts(scoring: bytes, serving: bytes, engine: Engine) -> list[LayerPart]:
    """The parts of all layers that both graphs compute, in their order; behind the parts of a layer the sum that it
    gives to the next."""
    facts, layer_name = engine.manifest.architecture, family_named(engine.manifest.family).layer
    graphs = [
        {node.name: (*node.input[:2], node.output[0]) for node in _read(content).graph.node if node.op_type == "Add"}
        for content in (scoring, serving)
    ]
    found = []
    for layer in range(facts.num_layers):
        name, mlp = layer_name(layer), "experts" if layer in facts.mixture_layers else "MLP"
        for part, node, place in (
            ("attention", f"{name}.attention_residual.sum", 1),
            (mlp, f"{name}.sum", 1),
            ("residual's sum", f"{name}.sum", 2),
        ):
            values = {graph[node][place] if node in graph else None for graph in graphs}
            value = values.pop()
            if not values and value is not None:
                found.append(LayerPart(name=f"{part} of layer {layer}", value=value))
    return found


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
