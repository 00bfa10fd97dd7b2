"""Graphs of an engine with float32 activations in their quantised products, so that nothing is rounded but the weights.

with float32_experts():
    session = ScoringSession(engine, content=with_float32_activations(engine.folder, SCORING_GRAPH))
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.optional import optional_package

# Its value 0 makes ONNX Runtime's QMoE multiply dequantised float32 weights: at 8 bits it rounds activations to int8
# whatever its attribute says. It is read when a session is made (onnxruntime/contrib_ops/cpu/moe).
_QMOE_VARIABLE = "ORT_QMOE_CPU_QNBIT_GEMM"


def with_float32_activations(folder: Path, file: str) -> bytes:
    """A graph of the engine in `folder` whose quantised products take float32 activations, serialised; its weights stay
    in the data file."""
    with optional_package("onnx", "reading an engine's graph", "cpu"):
        import onnx
    model = onnx.load(str(folder / file), load_external_data=False)
    for node in model.graph.node:
        for entry in node.attribute:
            if entry.name == "accuracy_level":
                entry.i = 1  # of MatMulNBits and QMoE: float32
            elif entry.name == "activations" and node.op_type in ("BlockLinear", "Experts"):
                entry.s = b"float32"
    content: bytes = model.SerializeToString()
    return content


@contextmanager
def float32_experts() -> Iterator[None]:
    """Sessions that are made in the block multiply the experts of ONNX Runtime's QMoE in float32."""
    before = os.environ.get(_QMOE_VARIABLE)
    os.environ[_QMOE_VARIABLE] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_QMOE_VARIABLE]
        else:
            os.environ[_QMOE_VARIABLE] = before
