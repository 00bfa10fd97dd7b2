"""Counts the bytes of an engine that decoding one token reads, from the graph that runs rather than from its plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from export.optional import optional_package
from export.quantize.layout import GROUP_ROWS

if TYPE_CHECKING:
    import onnx

EXPERT_OPS = ("MoE", "QMoE", "Experts")
ROW_OPS = ("Gather", "GatherBlockQuantized")  # operators of the embedding, which read one row of each operand
GROUP_OPS = ("Embedding",)  # that of our kernels, whose operands have one item of the first axis for GROUP_ROWS rows
ATTENTION_OPS = ("GroupQueryAttention",)  # operators whose constants are the rotary tables; they read one row of each


@dataclass(frozen=True, kw_only=True)
class EngineBytes:
    """Bytes of all constants, of the constants that decoding a token reads, and of the cache for each earlier
    position."""

    weight_bytes: int
    read_per_token: int
    cache_per_position: int


def count_bytes(graph: Path, num_experts: int, experts_per_token: int) -> EngineBytes:
    """Count an engine's bytes from its graph. Of experts a token reads K of E, of tables one row, of anything else all;
    for a constant with two uses the larger count is taken."""
    with optional_package("onnx", "counting an engine's bytes", "cpu"):
        import onnx
    model = onnx.load(str(graph), load_external_data=False)
    constants = {constant.name: constant for constant in model.graph.initializer}
    share: dict[str, float] = {}
    for node in model.graph.node:
        for name in node.input:
            if name not in constants:
                continue
            rows = constants[name].dims[0] if constants[name].dims else 1
            used = 1.0
            if node.op_type in EXPERT_OPS:
                used = experts_per_token / num_experts
            elif node.op_type in (*ROW_OPS, *ATTENTION_OPS):
                used = 1 / max(rows, 1)
            elif node.op_type in GROUP_OPS:
                used = 1 / max(rows * GROUP_ROWS, 1)
            share[name] = max(share.get(name, 0.0), used)
    sizes = {name: _num_bytes(constant.data_type, list(constant.dims)) for name, constant in constants.items()}
    return EngineBytes(
        weight_bytes=sum(sizes.values()),
        read_per_token=round(sum(sizes[name] * used for name, used in share.items())),
        cache_per_position=sum(_cache_bytes(model)),
    )


def _cache_bytes(model: onnx.ModelProto) -> Iterator[int]:
    """Bytes of one position of every past key and value, [B, G, C, D]."""
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            _, heads, _, size = value.type.tensor_type.shape.dim
            yield _num_bytes(value.type.tensor_type.elem_type, [heads.dim_value, size.dim_value])


def _num_bytes(data_type: int, dims: list[int]) -> int:
    """Bytes of a tensor; 4-bit types pack two elements into a byte."""
    import onnx

    count = 1
    for size in dims:
        count *= size
    if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return (count + 1) // 2
    return count * onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize
