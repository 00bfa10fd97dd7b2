"""Initializers of quantised weights in the shapes that ONNX Runtime's operators take, and ONNX tensors that refer to
the data file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from export.checkpoint.tensor_table import Role, TensorSpec
from export.onnx_graph.weights import Initializer, Placement, WeightJob
from export.provider import Provider

if TYPE_CHECKING:
    import onnx


def quantized_initializers(
    spec: TensorSpec, bits: int, block: int, provider: Provider, *, zeros: bool = False
) -> tuple[Initializer, ...]:
    """The initializers of a quantised weight: codes, scales and, with `zeros` or for an embedding on a provider with
    `writes_zero_points`, zero points. An embedding's scales are float32, like the residual stream."""
    *rows, columns = spec.shape
    blocks = columns // block
    if spec.role in (Role.EXPERT, Role.EMBEDDING):
        codes = (*rows, columns * bits // 8)
    else:
        codes = (*rows, blocks, block * bits // 8)  # MatMulNBits: [N, blocks, bytes of a block]
    embedding = spec.role is Role.EMBEDDING
    of_codes, of_scales = initializer_names(spec.name)
    initializers = [
        Initializer(name=of_codes, dtype="uint8", shape=codes),
        Initializer(name=of_scales, dtype="float32" if embedding else provider.float_type, shape=(*rows, blocks)),
    ]
    if zeros or (embedding and provider.writes_zero_points):
        shape = (*rows, -(-blocks * bits // 8))
        initializers.append(Initializer(name=zero_points_name(spec.name), dtype="uint8", shape=shape))
    return tuple(initializers)


def onnx_type(dtype: str) -> int:
    """ONNX's number (TensorProto.DataType) of a dtype's name."""
    from onnx import TensorProto

    types = {
        "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8,
        "int8": TensorProto.INT8,
    }  # fmt: skip
    return int(types[dtype])


def tensors(job: WeightJob, placement: Placement, data_file: str) -> list[onnx.TensorProto]:
    """A job's initializers as ONNX tensors that refer to `data_file`, at the offsets of `placement`."""
    return [
        _external(output.name, output.dtype, output.shape, placement.offsets[output.name], data_file)
        for output in job.outputs
    ]


def initializer_names(source: str) -> tuple[str, str]:
    """The names of the two initializers that hold a quantised weight's codes and its scales."""
    return f"{source}.codes", f"{source}.scales"


def zero_points_name(source: str) -> str:
    """The name of the initializer that holds a quantised weight's zero points, where they are stated."""
    return f"{source}.zero_points"


def _external(name: str, dtype: str, shape: Sequence[int], place: tuple[int, int], data_file: str) -> onnx.TensorProto:
    from onnx import TensorProto

    tensor = TensorProto(name=name, data_type=onnx_type(dtype), dims=shape, data_location=TensorProto.EXTERNAL)
    offset, length = place
    for key, value in (("location", data_file), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor
