"""Gets from llama.cpp the type of every tensor at a precision, and the packed bytes of quantised values.

llama.cpp's quantiser mixes types (Q4_K_M keeps some matrices of some layers at 6 bits). Its rules depend on the name of
the tensor, the index of the layer, the model's depth, heads and experts, and on whether rows are whole blocks of 256.
To learn the types, the quantiser converts a narrow model with the same depth, heads, experts and remainders of widths,
and the types are read from the result. Bytes come from ggml_quantize_chunk.
"""

from __future__ import annotations

import ctypes
import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from decode.gguf_model import gguf, write_model
from decode.libraries import llama_cpp, log_tail
from decode.shape import ROW_MULTIPLE, tensors
from export.architecture import Architecture
from export.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

FILE_TYPES = {"f32": 0, "q4_0": 2, "q4_k_m": 15, "iq4_xs": 30, "mxfp4": 38}  # llama_ftype in llama.h


def chosen_types(model: Architecture, precision: str) -> Mapping[str, GGMLQuantizationType]:
    """The type that llama.cpp chooses for every tensor of `model` at a precision of FILE_TYPES."""
    kinds = gguf().GGMLQuantizationType
    plain = {tensor.name: kinds.F32 for tensor in tensors(model)}
    if precision == "f32":
        return plain
    head = model.num_heads * model.head_size % ROW_MULTIPLE or ROW_MULTIPLE
    head = math.lcm(head, model.num_heads) // model.num_heads
    narrow = replace(
        model, hidden_size=model.hidden_size % ROW_MULTIPLE or ROW_MULTIPLE, vocab_size=ROW_MULTIPLE,
        ffn_size=model.ffn_size % ROW_MULTIPLE or ROW_MULTIPLE, head_size=head, rotary_dim=head,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "f32.gguf", Path(folder) / "quantised.gguf"
        write_model(source, narrow, plain, quantize, FILE_TYPES["f32"])
        quantise_file(source, target, precision)
        return {tensor.name: tensor.tensor_type for tensor in gguf().GGUFReader(target).tensors}


def quantise_file(source: Path, target: Path, precision: str) -> None:
    """Quantise a whole GGUF file with llama.cpp. Raises CheckpointError if llama.cpp refuses it."""
    library = llama_cpp()
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[precision]
    status = library.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(parameters))
    if status:
        raise CheckpointError(f"quantising {source} to {precision}: llama.cpp ended with status {status}: {log_tail()}")


def quantize(rows: npt.NDArray[np.float32], kind: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """Quantise float32 rows [R, C] with ggml; returns the packed rows, uint8 [R, bytes of a row]."""
    if kind.name == "F32":
        return rows.view(np.uint8)
    library = _ggml()
    packed = np.empty(gguf().quant_shape_to_byte_shape(rows.shape, kind), dtype=np.uint8)
    rows = np.ascontiguousarray(rows)
    written = library.ggml_quantize_chunk(
        int(kind), rows.ctypes.data, packed.ctypes.data, 0, rows.shape[0], rows.shape[1], None
    )
    if written != packed.nbytes:
        raise AssertionError(f"ggml wrote {written} bytes of {kind.name}, expected {packed.nbytes}")
    return packed


def _ggml() -> ctypes.CDLL:
    """libggml-base, which llama_cpp has loaded; ggml.h declares the function."""
    folder = Path(llama_cpp().__file__).parent / "lib"
    [path] = [path for path in folder.iterdir() if path.name in ("libggml-base.so", "libggml-base.dylib")]
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library
