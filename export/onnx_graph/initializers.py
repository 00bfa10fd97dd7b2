"""Initializers as ONNX has them: the shapes that its operators take, and tensors whose values lie in the data file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from export.onnx_graph.packing import HASH_DIGITS, QuantizedWeight, packed_bytes
from export.onnx_graph.weights import Initializer, Placement, WeightJob
from export.provider import Provider
from export.tensor_table import Role, TensorSpec

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


def packed_blobs(source: str, weight: QuantizedWeight) -> tuple[Initializer, ...]:
    """The blobs of a packed weight, in the data file under names of their own."""
    return tuple(
        Initializer(name=f"{source}.packed.{number}", dtype="uint8", shape=(num_bytes,))
        for number, num_bytes in enumerate(packed_bytes(weight))
    )


def tensors(job: WeightJob, placement: Placement, data_file: str) -> list[onnx.TensorProto]:
    """A job's initializers as tensors whose values lie in `data_file` as placed; a packed weight's are its codes and
    scales."""
    return [
        _external(form.name, form.dtype, form.shape, placement.offsets[form.name], data_file)
        for form in (job.unpacked or job.outputs)
    ]


def with_packed_forms(
    plain: onnx.ModelProto, jobs: Sequence[WeightJob], placement: Placement, keys: Mapping[str, str]
) -> onnx.ModelProto:
    """A copy of the graph that says beside the codes of every packed weight where its blobs lie and under which key."""
    graph = type(plain)()
    graph.CopyFrom(plain)
    packed = {initializer_names(job.source)[0]: job for job in jobs if job.packed}
    for tensor in graph.graph.initializer:
        if tensor.name in packed:
            job = packed[tensor.name]
            operator, digits = keys[job.source].split("+")
            number = str(int(digits))
            blobs = ["{};{};0".format(*placement.offsets[output.name]) for output in job.outputs]
            # A blob's third figure is a checksum, which ONNX Runtime writes as 0 and does not read. More zeros make the
            # text as long for any key, so that a graph's size is known before its weights are.
            blobs[-1] += "0" * (HASH_DIGITS - len(number))
            tensor.external_data.add(key="prepacked_0", value="|".join([f"{operator}+{number}", *blobs]))
    return graph


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
