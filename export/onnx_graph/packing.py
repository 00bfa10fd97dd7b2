"""Quantised weights in the layout that this machine's CPU kernels read, so that an engine's file is only mapped.

ONNX Runtime repacks every MatMulNBits and QMoE weight when it loads a graph, into private memory. It can also keep the
packed form: a graph saved with `session.save_external_prepacked_constant_initializers` names, beside an initializer's
place in the data file, the packed blobs and a key (operator + hash of the packed bytes). On loading, the kernel packs
the initializer's bytes. Where the result has that key and, from ONNX Runtime 1.32 on, is equal to the blobs byte for
byte, the copy is dropped for the blobs, which are mapped and so shared by every process (microsoft/onnxruntime#23069).
A blob must begin at a multiple of 256 bytes of the file: 1.32 keeps its own copy of any other.

So an engine holds both forms. The blobs lie in the first part of the data file, which serving reads; the codes and
scales lie behind them and are read only while a graph is loaded. Kernels that pack otherwise would meet no key and
pack for themselves, each process into memory of its own; `kernel_layout` tells such kernels beforehand.

Each weight is packed by ONNX Runtime itself, in a graph of that one node.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from export.errors import ExportError, MoeshipError
from export.onnx_graph import names
from export.optional import onnx_runtime

if TYPE_CHECKING:
    import onnx

PACKING_OPERATORS = ("MatMulNBits", "QMoE")
HASH_DIGITS = 20
SCRATCH_COPIES = 2  # ONNX Runtime writes both forms
NO_KEY = "{}+" + "0" * HASH_DIGITS  # of an operator, as long as any
TILE_ROWS = 16  # the kernels pack so many rows together
_COPY_BYTES = 1 << 24
# What ONNX Runtime notes of a packed weight: `operator+hash|offset;bytes;checksum|...`, plain text in the graph's file.
_PACKED_NOTE = re.compile(rb"(?:%s)\+\d+(?:\|\d+;\d+;\d+)+" % "|".join(PACKING_OPERATORS).encode())


@dataclass(frozen=True, kw_only=True)
class Span:
    """Bytes of a file: which, where, how many."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """One weight of a MatMulNBits or QMoE node: the shapes of its codes and scales, and how the node reads them.

    MatMulNBits: codes uint8 [N, blocks, block bytes], scales float32 [N, blocks].
    QMoE: codes uint8 [E, N, K * bits / 8], scales float32 [E, N, blocks].
    """

    operator: str
    codes: tuple[int, ...]
    scales: tuple[int, ...]
    bits: int
    block_size: int
    accuracy_level: int

    @property
    def num_features(self) -> int:
        return self.scales[-1] * self.block_size

    @property
    def scales_bytes(self) -> int:
        return 4 * math.prod(self.scales)

    @property
    def codes_bytes(self) -> int:
        return math.prod(self.codes)


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """What packing gave: blobs in a file of `folder`, and the key under which a session finds them: the operator, "+"
    and an unsigned 64-bit hash in HASH_DIGITS decimal digits (ONNX Runtime writes no leading zeros)."""

    key: str
    folder: Path
    blobs: tuple[Span, ...]

    def pieces(self, blob: Span) -> Iterator[npt.NDArray[np.uint8]]:
        """A blob's bytes, in order."""
        with (self.folder / blob.file).open("rb") as file:
            file.seek(blob.offset)
            for start in range(0, blob.length, _COPY_BYTES):
                yield np.fromfile(file, np.uint8, min(blob.length - start, _COPY_BYTES))


@contextmanager
def packed(weight: QuantizedWeight, data: Path, codes: int, scales: int, folder: Path) -> Iterator[PackedWeight]:
    """Pack one weight, whose codes and scales lie in the file `data` from these bytes on; its blobs lie in a file until
    the block ends.

    The working files are made in `folder`, about SCRATCH_COPIES times the weight's bytes. Raises ExportError where this
    machine's kernel keeps no packed form of it, and OSError where the disk is full.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="pack-") as scratch:
        work = Path(scratch)
        codes_span = Span(file=data.name, offset=codes, length=weight.codes_bytes)
        scales_span = Span(file=data.name, offset=scales, length=weight.scales_bytes)
        yield _pack(weight, _external(weight, codes_span, scales_span), work / "packed.bin", data.parent)


def pack_in_memory(
    weight: QuantizedWeight, codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    """The first blob of a weight. Working files are made in the temporary folder; raises as `packed` does."""
    from onnx import numpy_helper

    tensors = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]
    with tempfile.TemporaryDirectory(prefix="moeship-pack-") as scratch:
        found = _pack(weight, tensors, Path(scratch) / "packed.bin", Path(scratch))
        blob = found.blobs[0]
        return np.fromfile(found.folder / blob.file, np.uint8, blob.length, offset=blob.offset)


@lru_cache(maxsize=64)
def packed_bytes(weight: QuantizedWeight) -> tuple[int, ...]:
    """Bytes of each blob of a weight of this shape, learnt by packing a few of its rows.

    Every TILE_ROWS rows of an expert add the same bytes to its share of the first blob; the others do not grow.
    Raises ExportError where this machine's kernel keeps no packed form of it.
    """
    *experts, rows = weight.scales[:-1]
    tiles, odd_rows = divmod(rows, TILE_ROWS)
    draw = np.random.default_rng(0)
    found = []
    for few in (odd_rows + TILE_ROWS, odd_rows + 2 * TILE_ROWS):
        small = _with_rows(weight, few)
        with tempfile.TemporaryDirectory(prefix="moeship-probe-") as scratch:
            found.append(_pack(small, _inline(small, draw), Path(scratch) / "packed.bin", Path(scratch)).blobs)
    first, second = found
    one_expert = first[0].length + (second[0].length - first[0].length) * (tiles - 1)
    return (math.prod(experts) * one_expert, *(blob.length for blob in first[1:]))


def probe_graph(weights: Iterable[QuantizedWeight]) -> bytes:
    """A graph that has a few rows of each kind of weight, random values inside it: what `kernel_layout` looks at."""
    from onnx import helper

    draw = np.random.default_rng(0)
    kinds = {(w.operator, w.bits, w.block_size, w.accuracy_level): w for w in weights}
    whole = helper.make_graph([], "probe", [], [])
    for number, kind in enumerate(sorted(kinds)):
        small = _with_rows(kinds[kind], 3 * TILE_ROWS, blocks=3)
        part = _one_node(small, _inline(small, draw), prefix=f"{number}/").graph
        whole.node.extend(part.node)
        whole.initializer.extend(part.initializer)
        whole.input.extend(part.input)
        whole.output.extend(part.output)
    return bytes(_model(whole).SerializeToString())


def kernel_layout(graph: bytes) -> str:
    """SHA-256 of how this machine's kernels pack the weights of a probe graph: of the keys and the packed blobs,
    wherever ONNX Runtime puts them in a file.

    Under equal digests the packed forms are equal, so an engine prepared under one runs under the other. Takes about
    10 ms, and neither reads an engine's weights nor imports onnx.
    """
    with tempfile.TemporaryDirectory(prefix="moeship-probe-") as scratch:
        packed = Path(scratch) / "packed.bin"
        save_with_packed_forms(graph, packed, Path(scratch))
        return layout_digest(packed.with_suffix(".onnx").read_bytes(), packed.read_bytes())


def layout_digest(graph: bytes, data: bytes) -> str:
    """SHA-256 of the packed weights of a saved graph: for each the key, then the length and SHA-256 of each blob in
    `data`, the graph's data file; weights in the order of these texts."""
    lines = []
    for note in _PACKED_NOTE.findall(graph):
        key, *blobs = note.decode().split("|")
        places = [tuple(map(int, blob.split(";")))[:2] for blob in blobs]
        digests = [f"{size} {hashlib.sha256(data[start : start + size]).hexdigest()}" for start, size in places]
        lines.append(" ".join([key, *digests]))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _with_rows(weight: QuantizedWeight, rows: int, blocks: int | None = None) -> QuantizedWeight:
    """A weight of its kind with one expert of so many rows, and its own features unless `blocks` says how many."""
    blocks = blocks or weight.scales[-1]
    block_bytes = weight.block_size * weight.bits // 8
    if weight.operator == "QMoE":
        return replace(weight, codes=(1, rows, blocks * block_bytes), scales=(1, rows, blocks))
    return replace(weight, codes=(rows, blocks, block_bytes), scales=(rows, blocks))


def _pack(weight: QuantizedWeight, tensors: Sequence[onnx.TensorProto], output: Path, folder: Path) -> PackedWeight:
    """Pack the weight whose codes and scales are given, into the new file `output`."""
    import onnx

    try:
        save_with_packed_forms(_one_node(weight, tensors).SerializeToString(), output, folder)
    except MoeshipError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class, and this one does not tell why
        if shutil.disk_usage(folder).free < 2 * weight.codes_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(output)) from error
        raise
    for tensor in onnx.load(output.with_suffix(".onnx"), load_external_data=False).graph.initializer:
        packed = {entry.key: entry.value for entry in tensor.external_data}.get("prepacked_0")
        if tensor.name == "codes" and packed is not None:
            key, *blobs = packed.split("|")
            operator, digits = key.split("+")
            places = [tuple(map(int, blob.split(";")))[:2] for blob in blobs]
            return PackedWeight(
                key=f"{operator}+{digits:0>{HASH_DIGITS}}",
                folder=output.parent,
                blobs=tuple(Span(file=output.name, offset=start, length=size) for start, size in places),
            )
    raise ExportError(
        f"packing a {weight.operator} weight of {weight.bits} bits in blocks of {weight.block_size}: ONNX Runtime "
        "keeps no packed form of it on this machine; build a portable engine (--portable)"
    )


def save_with_packed_forms(graph: bytes, output: Path, folder: Path) -> None:
    """Let ONNX Runtime load a graph, its data in `folder`, and save it with what it packed in the file `output`."""
    with onnx_runtime("onnxruntime", "packing weights for the CPU", "cpu"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(output.with_suffix(".onnx"))
    for key, value in (
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.optimized_model_external_initializers_file_name", output.name),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "0"),
        ("session.model_external_initializers_file_folder_path", str(folder)),
    ):
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _one_node(weight: QuantizedWeight, tensors: Sequence[onnx.TensorProto], prefix: str = "") -> onnx.ModelProto:
    """A graph of one node that reads the weight. Packing looks at neither the other inputs nor the routing."""
    from onnx import TensorProto, helper

    def name(of: str) -> str:
        return prefix + of

    for tensor in tensors:
        tensor.name = name(tensor.name)
    value, features = helper.make_tensor_value_info, weight.num_features
    inputs = [value(name("x"), TensorProto.FLOAT, ["tokens", features])]
    if weight.operator == "MatMulNBits":
        node = helper.make_node(
            "MatMulNBits", [name("x"), name("codes"), name("scales")], [name("y")], domain=names.MICROSOFT_DOMAIN,
            K=features, N=weight.codes[0], bits=weight.bits, block_size=weight.block_size,
            accuracy_level=weight.accuracy_level,
        )  # fmt: skip
    else:
        experts = weight.codes[0]
        inputs.append(value(name("router"), TensorProto.FLOAT, ["tokens", experts]))
        # The node's other matrix, a tile of one block.
        block_bytes, rows = weight.block_size * weight.bits // 8, experts * TILE_ROWS
        other = (experts, TILE_ROWS, block_bytes), (experts, TILE_ROWS, 1)
        tensors = [
            *tensors,
            helper.make_tensor(name("other"), TensorProto.UINT8, other[0], bytes(rows * block_bytes), raw=True),
            helper.make_tensor(name("other_scales"), TensorProto.FLOAT, other[1], bytes(rows * 4), raw=True),
        ]
        places = ("x", "router", "codes", "scales", "", "other", "other_scales")
        node = helper.make_node(
            "QMoE", [name(place) if place else "" for place in places], [name("y")], domain=names.MICROSOFT_DOMAIN,
            k=1, activation_type="gelu", normalize_routing_weights=1, use_sparse_mixer=0, swiglu_fusion=0,
            expert_weight_bits=weight.bits, block_size=weight.block_size, quant_type="int", weights_prepacked=0,
            accuracy_level=weight.accuracy_level,
        )  # fmt: skip
    output = value(name("y"), TensorProto.FLOAT, None)
    return _model(helper.make_graph([node], "one_weight", inputs, [output], tensors))


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    from onnx import helper

    opsets = [helper.make_opsetid("", names.OPSET), helper.make_opsetid(names.MICROSOFT_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=names.IR_VERSION)


def _inline(weight: QuantizedWeight, draw: np.random.Generator) -> list[onnx.TensorProto]:
    """Random codes and scales, inside the graph."""
    from onnx import numpy_helper

    codes = draw.integers(0, 256, weight.codes, dtype=np.uint8)
    scales = draw.random(weight.scales, dtype=np.float32)
    return [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]


def _external(weight: QuantizedWeight, codes: Span, scales: Span) -> list[onnx.TensorProto]:
    """Codes and scales that lie in files."""
    from onnx import TensorProto

    tensors = []
    for name, dtype, shape, span in (
        ("codes", TensorProto.UINT8, weight.codes, codes),
        ("scales", TensorProto.FLOAT, weight.scales, scales),
    ):
        tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", span.file), ("offset", str(span.offset)), ("length", str(span.length))):
            tensor.external_data.add(key=key, value=value)
        tensors.append(tensor)
    return tensors
