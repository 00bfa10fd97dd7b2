"""Quantised weights in the layout that this machine's CPU kernels read, so that an engine's file is only mapped.

ONNX Runtime repacks every MatMulNBits and QMoE weight when it loads a graph, into private memory and from a second
form of the same bytes. It can also keep the packed form: a graph saved with
`session.save_external_prepacked_constant_initializers` names, beside an initializer's place in the data file, the
packed blobs and a key (operator + hash of the packed bytes). On loading, the kernel packs the initializer's bytes,
and where the result has that key its copy is dropped for the blob, which is mapped and so shared by every process
(microsoft/onnxruntime#23069).

Saved like this a file would hold both forms. Here the packed form is the only one: the initializer's bytes are laid
over its own blob, and the key is that of what packing those bytes gives. The scales, which the blob has inside, all
point to one region of NaN. Kernels that pack otherwise meet no key and give NaN, never a plausible number;
`kernel_layout` tells such kernels beforehand.

Each weight is packed by ONNX Runtime itself, in a graph of that one node.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from export.errors import ExportError, MissingPackageError, MoeshipError
from export.onnx_graph import names

if TYPE_CHECKING:
    import onnx

PACKING_OPERATORS = ("MatMulNBits", "QMoE")
HASH_DIGITS = 20
SCRATCH_COPIES = 3  # the form to be packed, and what ONNX Runtime writes: both forms
NO_KEY = "{}+" + "0" * HASH_DIGITS  # of an operator, as long as any
TILE_ROWS = 16  # the kernels pack so many rows together
_COPY_BYTES = 1 << 24


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
def packed(
    weight: QuantizedWeight, pieces: Iterable[tuple[npt.NDArray[Any], ...]], folder: Path
) -> Iterator[PackedWeight]:
    """Pack one weight, given in consecutive pieces of codes and scales; its blobs lie in files until the block ends.

    The working files are made in `folder`, about SCRATCH_COPIES times the weight's bytes. Raises ExportError where this
    machine's kernel keeps no packed form of it, and OSError where the disk is full.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="pack-") as scratch:
        work = Path(scratch)
        with (work / "codes").open("wb") as codes, (work / "scales").open("wb") as scales:
            for piece in pieces:
                codes.write(np.ascontiguousarray(piece[0]).data)
                scales.write(np.ascontiguousarray(piece[1]).data)
        codes_span = Span(file="codes", offset=0, length=weight.codes_bytes)
        scales_span = Span(file="scales", offset=0, length=weight.scales_bytes)
        found = _pack(weight, _external(weight, codes_span, scales_span), work / "packed.bin", work)
        blob = found.blobs[0]
        if blob.length < weight.codes_bytes:
            raise ExportError(
                f"packing a {weight.operator} weight {list(weight.codes)}: packed it has {blob.length} bytes, fewer "
                f"than the {weight.codes_bytes} of its codes; build a portable engine (--portable)"
            )
        (work / "codes").unlink()
        (work / "scales").write_bytes(not_a_number(weight.scales_bytes))
        over_blob = Span(file="packed.bin", offset=blob.offset, length=weight.codes_bytes)
        (work / "keyed.bin").symlink_to(os.devnull)  # of this form the key is all that is wanted
        keyed = _pack(weight, _external(weight, over_blob, scales_span), work / "keyed.bin", work)
        (work / "keyed.bin").unlink(missing_ok=True)
        yield PackedWeight(key=keyed.key, folder=work, blobs=found.blobs)


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


def not_a_number(num_bytes: int) -> bytes:
    """What the scales of a packed weight point to."""
    return np.full(num_bytes // 4, np.nan, np.float32).tobytes()


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
    """SHA-256 of how this machine's kernels pack the weights of a probe graph.

    Under equal digests the packed forms are equal, so an engine prepared under one runs under the other. Takes about
    10 ms, and neither reads an engine's weights nor imports onnx.
    """
    with tempfile.TemporaryDirectory(prefix="moeship-probe-") as scratch:
        packed = Path(scratch) / "packed.bin"
        _save(graph, packed, Path(scratch))
        return hashlib.sha256(packed.read_bytes()).hexdigest()


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
        _save(_one_node(weight, tensors).SerializeToString(), output, folder)
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
                folder=folder,
                blobs=tuple(Span(file=output.name, offset=start, length=size) for start, size in places),
            )
    raise ExportError(
        f"packing a {weight.operator} weight of {weight.bits} bits in blocks of {weight.block_size}: ONNX Runtime "
        "keeps no packed form of it on this machine; build a portable engine (--portable)"
    )


def _save(graph: bytes, output: Path, folder: Path) -> None:
    """Let ONNX Runtime load a graph, its data in `folder`, and save it with what it packed in the file `output`."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError("onnxruntime", "packing weights for the CPU", "cpu") from error
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
