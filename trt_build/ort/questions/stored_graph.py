"""Reads a graph of an engine as it lies in its folder: its nodes, and where each initializer is in the data file.

Everything comes from the ONNX file. Nothing is planned anew, so a fault of the plan shows in a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.errors import named, shown
from export.exporter import DATA_FILE
from export.optional import optional_package
from trt_build.errors import EngineError

_DTYPES = {1: "float32", 2: "uint8", 10: "float16"}  # ONNX's number (TensorProto.DataType) -> the dtype's name


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Where an initializer lies in the data file; `offset` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def view(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """The initializer's values in the data file's bytes, without a copy."""
        return data[self.offset : self.offset + self.num_bytes].view(self.dtype).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of a graph; an absent input is the name ""."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def input(self, place: int) -> str:
        return self.inputs[place] if place < len(self.inputs) else ""


@dataclass(frozen=True, kw_only=True)
class StoredMatrix:
    """A quantised weight: its initializers, and how the node that multiplies it reads them. With `grouped` they are in
    the layout of export/quantize/layout.py, else in that of ONNX Runtime's operators. `zeros` None: every zero point is
    2^(bits-1)."""

    codes: Extent
    scales: Extent
    zeros: Extent | None
    bits: int
    block_size: int
    grouped: bool


@dataclass(frozen=True, kw_only=True)
class _Operands:
    """How an operator reads quantised weights: the inputs of codes, scales and zero points of each, and the attributes
    of the bits and block size of each, or of the one storage that all have."""

    places: tuple[tuple[int, int, int], ...]
    storage: tuple[tuple[str, str], ...] = (("bits", "block_size"),)
    grouped: bool = False

    def storage_of(self, place: int, attributes: Mapping[str, Any]) -> tuple[int, int]:
        """Bits and block size of a weight, 0 where a node does not state them. A later weight without a statement has
        those of the first."""
        bits, block = self.storage[place if place < len(self.storage) else 0]
        first_bits, first_block = self.storage[0]
        return (
            int(attributes.get(bits, attributes.get(first_bits, 0))),
            int(attributes.get(block, attributes.get(first_block, 0))),
        )


# Source: ONNX Runtime's docs/ContribOperators.md, and trt_build/ort/kernels/register.cpp for the last three.
_OPERATORS = {
    "MatMulNBits": _Operands(places=((1, 2, 3),)),
    "GatherBlockQuantized": _Operands(places=((0, 2, 3),)),
    "QMoE": _Operands(places=((2, 3, 11), (5, 6, 12)), storage=(("expert_weight_bits", "block_size"),)),
    "BlockLinear": _Operands(places=((1, 2, 3),), grouped=True),
    "Embedding": _Operands(places=((1, 2, 3),), grouped=True),
    "Experts": _Operands(
        places=((2, 3, 4), (6, 7, 8)),
        storage=(("bits", "block_size"), ("second_bits", "second_block_size")),
        grouped=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class StoredGraph:
    """A graph of an engine: `extents` has the initializers of the data file, `constants` those of the graph itself."""

    file: str
    nodes: tuple[Node, ...]
    extents: Mapping[str, Extent]
    constants: Mapping[str, npt.NDArray[Any]]

    def matrices(self) -> dict[str, StoredMatrix]:
        """Name of the codes -> quantised weight, for all that a node multiplies or looks up."""
        return {matrix.codes.name: matrix for node in self.nodes for matrix in self._matrices(node)}

    def users(self) -> dict[str, list[tuple[Node, int]]]:
        """Name of a value or initializer -> the nodes that take it, each with the number of the input."""
        found: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for place, name in enumerate(node.inputs):
                found.setdefault(name, []).append((node, place))
        return found

    def _matrices(self, node: Node) -> Iterator[StoredMatrix]:
        operands = _OPERATORS.get(node.operator)
        if operands is None:
            return
        for place, (codes, scales, zeros) in enumerate(operands.places):
            if node.input(codes) in self.extents and node.input(scales) in self.extents:
                bits, block = operands.storage_of(place, node.attributes)
                yield StoredMatrix(
                    codes=self.extents[node.input(codes)],
                    scales=self.extents[node.input(scales)],
                    zeros=self.extents.get(node.input(zeros)),
                    bits=bits,
                    block_size=block,
                    grouped=operands.grouped,
                )


def read_graph(folder: Path, file: str) -> StoredGraph:
    """Read a graph of the engine in `folder`. Raises EngineError if it is not ONNX, or if it refers to bytes that the
    data file does not have."""
    with optional_package("onnx", "reading an engine's graph", "cpu"):
        import onnx
        from onnx import numpy_helper
    path, doing = folder / file, f"reading {named(folder / file)}"
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's and onnx's exceptions share no base class
        raise EngineError(f"{doing}: it is no ONNX graph ({error}); build the engine again") from error
    size = (folder / DATA_FILE).stat().st_size
    extents, constants = {}, {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            extents[tensor.name] = _extent(tensor, size, doing)
        else:
            constants[tensor.name] = numpy_helper.to_array(tensor)
    nodes = tuple(
        Node(
            operator=node.op_type,
            name=node.name,
            inputs=tuple(node.input),
            outputs=tuple(node.output),
            attributes={entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute},
        )
        for node in model.graph.node
    )
    return StoredGraph(file=file, nodes=nodes, extents=extents, constants=constants)


def _extent(tensor: Any, size: int, doing: str) -> Extent:  # noqa: ANN401 - an onnx.TensorProto
    entries = {entry.key: entry.value for entry in tensor.external_data}
    dtype = _DTYPES.get(tensor.data_type)
    if entries.get("location") != DATA_FILE or dtype is None:
        raise EngineError(
            f"{doing}: the initializer {named(tensor.name)} is in {shown(entries.get('location'))} as ONNX's type "
            f"{tensor.data_type}, expected floats or bytes in {DATA_FILE}; build the engine again"
        )
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
    except ValueError:
        offset, length = -1, -1
    extent = Extent(name=tensor.name, dtype=dtype, shape=tuple(tensor.dims), offset=offset)
    aligned = offset % np.dtype(dtype).itemsize == 0
    if offset < 0 or not aligned or length != extent.num_bytes or offset + length > size:
        raise EngineError(
            f"{doing}: the initializer {named(tensor.name)} {list(extent.shape)} is said to be bytes {offset} to "
            f"{offset + length} of the {size} of {DATA_FILE}, expected {extent.num_bytes} bytes; build the engine again"
        )
    return extent
