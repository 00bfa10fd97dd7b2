"""Initializers as ONNX has them: the shapes that its operators take, and tensors whose values lie in the data file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from export.checkpoint.tensor_table import Role, TensorSpec
from export.onnx_graph.weights import Initializer, Placement, WeightJob
from export.provider import Provider

if TYPE_CHECKING:
    import onnx


def quantized_initializers(spec: TensorSpec, bits: int, block: int, provider: Provider) -> tuple[Initializer, ...]:
    """Codes, scales and, of an embedding, zero points where the provider wants them written, in the shapes that the
    operator takes. An embedding's scales are of the residual stream's type."""
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
    if embedding and provider.writes_zero_points:
        shape = (*rows, blocks * bits // 8)
        initializers.append(Initializer(name=f"{spec.name}.zero_points", dtype="uint8", shape=shape))
    return tuple(initializers)


def onnx_type(dtype: str) -> int:
    """ONNX's number of a dtype's name."""
    from onnx import TensorProto

    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}
    return int(types[dtype])


def tensors(job: WeightJob, placement: Placement, data_file: str) -> list[onnx.TensorProto]:
    """A job's initializers as tensors whose values lie in `data_file` as placed."""
    return [
        _external(output.name, output.dtype, output.shape, placement.offsets[output.name], data_file)
        for output in job.outputs
    ]


def initializer_names(source: str) -> tuple[str, str]:
    """Of a quantised weight's codes and scales."""
    return f"{source}.codes", f"{source}.scales"


def _external(name: str, dtype: str, shape: Sequence[int], place: tuple[int, int], data_file: str) -> onnx.TensorProto:
    from onnx import TensorProto

    tensor = TensorProto(name=name, data_type=onnx_type(dtype), dims=shape, data_location=TensorProto.EXTERNAL)
    offset, length = place
    for key, value in (("location", data_file), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor
