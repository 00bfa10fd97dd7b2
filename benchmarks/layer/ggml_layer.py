"""Runs the layer with ggml, in llama.cpp's or ik_llama.cpp's version, through the functions that ggml.h declares.

The graph is the one that both build for experts: mul_mat_id, gelu, mul_mat_id, sum. The weights of the sum, one number
for each row and expert, are left out. The matrices are stored as in serving. llama.cpp puts them into the first buffer
type of its CPU device that can run the product, which repacks them for kernels that need it. ik_llama.cpp interleaves
their rows at load (its --run-time-repack).
"""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from decode.libraries import ik_llama_cpp, llama_cpp
from layer.shape import CHOSEN, EXPERTS, HIDDEN, MATRICES, Rows

TYPES = {"Q4_0": 2, "Q4_K": 12, "IQ4_XS": 23, "IQ4_KS": 144}  # ggml_type; the last is ik_llama.cpp's own
_F32, _I32 = 0, 26
_POOL_ROWS = 64
_NODES_BYTES = 1 << 22
_POINTERS = (
    "ggml_init ggml_new_tensor_2d ggml_new_tensor_3d ggml_mul_mat_id ggml_gelu ggml_mul ggml_view_2d ggml_add "
    "ggml_new_graph ggml_backend_cpu_init ggml_backend_cpu_buffer_type ggml_backend_alloc_ctx_tensors_from_buft "
    "ggml_gallocr_new ggml_backend_get_device ggml_backend_dev_backend_reg ggml_backend_reg_get_proc_address "
)
_Pointer, _Long = ctypes.c_void_p, ctypes.c_int64


class _InitParameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class GgmlLayer:
    """The layer with random weights of one type of TYPES, in the library of `runtime`: llama.cpp or ik_llama.cpp."""

    def __init__(self, runtime: str, kind: str, threads: int) -> None:
        self._is_ik = runtime == "ik_llama.cpp"
        self._ggml = _Functions(*(_ik_libraries() if self._is_ik else _llama_libraries()))
        ggml = self._ggml
        self._backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(_Pointer(self._backend), threads)
        self._allocators: list[Any] = []
        self._graphs: dict[int, tuple[Any, Any, Any]] = {}
        self._buffer = "CPU"
        self._place(TYPES[kind])

    def run(self, rows: Rows, pair: tuple[int, int]) -> None:
        if len(rows) not in self._graphs:
            self._graphs[len(rows)] = self._build(len(rows))
        graph, x, ids = self._graphs[len(rows)]
        self._set(x, rows)
        self._set(ids, np.tile(np.array(pair, dtype=np.int32), (len(rows), 1)))
        status = self._ggml.ggml_backend_graph_compute(_Pointer(self._backend), graph)
        if status:
            raise AssertionError(f"ggml_backend_graph_compute ended with status {status}")

    def facts(self) -> str:
        return f"weights in buffer type {self._buffer}"

    def _place(self, kind: int) -> None:
        """Put the weights into the first buffer type whose products the backend can run."""
        ggml = self._ggml
        for buffer_type in [*self._extra_buffer_types(), ggml.ggml_backend_cpu_buffer_type()]:
            context = self._context()
            self._weights = {
                name: _Pointer(ggml.ggml_new_tensor_3d(
                    context, kind, _Long(features), _Long(rows), _Long(EXPERTS)))
                for name, (rows, features) in MATRICES.items()
            }  # fmt: skip
            buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, _Pointer(buffer_type))
            if buffer and all(map(self._runs, self._products(self._context(), 1)[1])):
                break
        else:
            raise AssertionError(f"no buffer type of ggml runs products of its type {kind}")
        if not self._is_ik:
            ggml.ggml_backend_buft_name.restype = ctypes.c_char_p
            self._buffer = ggml.ggml_backend_buft_name(_Pointer(buffer_type)).decode()
        self.num_bytes = 0
        for name, (rows, features) in MATRICES.items():
            data = self._draw(kind, rows, features)
            self.num_bytes += data.nbytes * CHOSEN // EXPERTS
            self._set(self._weights[name], data)
            if self._is_ik:
                ggml.iqk_repack_tensor(self._weights[name])
                self._buffer = "CPU, interleaved"

    def _draw(self, kind: int, rows: int, features: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of all experts: a few rows of normal values, packed by ggml and repeated."""
        ggml = self._ggml
        draws = np.random.default_rng(0).normal(0, features**-0.5, (_POOL_ROWS, features)).astype(np.float32)
        packed = np.empty((_POOL_ROWS, ggml.ggml_row_size(kind, _Long(features))), dtype=np.uint8)
        written = ggml.ggml_quantize_chunk(
            kind, _Pointer(draws.ctypes.data), _Pointer(packed.ctypes.data), _Long(0), _Long(_POOL_ROWS),
            _Long(features), None,
        )  # fmt: skip
        if written != packed.nbytes:
            raise AssertionError(f"ggml wrote {written} bytes of type {kind}, expected {packed.nbytes}")
        return np.tile(packed, (EXPERTS * rows // _POOL_ROWS, 1))

    def _extra_buffer_types(self) -> list[int]:
        """The buffer types of llama.cpp's CPU device that repack weights for kernels, in llama.cpp's order."""
        if self._is_ik:
            return []
        ggml = self._ggml
        device = ggml.ggml_backend_get_device(_Pointer(self._backend))
        registry = ggml.ggml_backend_dev_backend_reg(_Pointer(device))
        found = ggml.ggml_backend_reg_get_proc_address(_Pointer(registry), b"ggml_backend_dev_get_extra_bufts")
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(found)(device)
        return list(itertools.takewhile(bool, map(listed.__getitem__, itertools.count())))

    def _runs(self, product: Any) -> bool:  # noqa: ANN401 - a pointer
        self._ggml.ggml_backend_supports_op.restype = ctypes.c_bool
        return bool(self._ggml.ggml_backend_supports_op(_Pointer(self._backend), product))

    def _products(self, context: Any, count: int) -> tuple[tuple[Any, Any, Any], list[Any]]:  # noqa: ANN401
        """The inputs, ids and output of the layer for `count` rows, and its two products."""
        ggml = self._ggml
        x = _Pointer(ggml.ggml_new_tensor_3d(context, _F32, _Long(HIDDEN), _Long(1), _Long(count)))
        ids = _Pointer(ggml.ggml_new_tensor_2d(context, _I32, _Long(CHOSEN), _Long(count)))
        up = _Pointer(ggml.ggml_mul_mat_id(context, self._weights["fc1"], x, ids))
        active = _Pointer(ggml.ggml_gelu(context, up))
        down = _Pointer(ggml.ggml_mul_mat_id(context, self._weights["fc2"], active, ids))
        size = HIDDEN * np.dtype(np.float32).itemsize
        parts = [
            _Pointer(ggml.ggml_view_2d(
                context, down, _Long(HIDDEN), _Long(count), ctypes.c_size_t(CHOSEN * size),
                ctypes.c_size_t(place * size)))
            for place in range(CHOSEN)
        ]  # fmt: skip
        return (x, ids, _Pointer(ggml.ggml_add(context, *parts))), [up, down]

    def _build(self, count: int) -> tuple[Any, Any, Any]:
        ggml, context = self._ggml, self._context()
        (x, ids, output), _ = self._products(context, count)
        graph = _Pointer(ggml.ggml_new_graph(context))
        ggml.ggml_set_input(x)
        ggml.ggml_set_input(ids)
        ggml.ggml_set_output(output)
        ggml.ggml_build_forward_expand(graph, output)
        allocator = _Pointer(ggml.ggml_gallocr_new(_Pointer(ggml.ggml_backend_cpu_buffer_type())))
        ggml.ggml_gallocr_alloc_graph.restype = ctypes.c_bool
        if not ggml.ggml_gallocr_alloc_graph(allocator, graph):
            raise AssertionError("ggml found no memory for the layer")
        return graph, x, ids

    def _context(self) -> Any:  # noqa: ANN401 - a pointer
        return _Pointer(self._ggml.ggml_init(_InitParameters(mem_size=_NODES_BYTES, mem_buffer=None, no_alloc=True)))

    def _set(self, tensor: Any, values: np.ndarray[Any, Any]) -> None:  # noqa: ANN401 - a pointer
        values = np.ascontiguousarray(values)
        self._ggml.ggml_backend_tensor_set(
            tensor, _Pointer(values.ctypes.data), ctypes.c_size_t(0), ctypes.c_size_t(values.nbytes)
        )


class _Functions:
    """Looks functions up by name, in the first library that has them."""

    def __init__(self, *libraries: ctypes.CDLL) -> None:
        self._libraries = libraries

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a ctypes function
        [function, *_] = [getattr(library, name) for library in self._libraries if hasattr(library, name)]
        if name in _POINTERS.split():
            function.restype = ctypes.c_void_p
        elif name in ("ggml_quantize_chunk", "ggml_row_size"):
            function.restype = ctypes.c_size_t
        setattr(self, name, function)
        return function


def _llama_libraries() -> list[ctypes.CDLL]:
    folder = Path(llama_cpp().__file__).parent / "lib"
    return [ctypes.CDLL(str(folder / f"lib{name}.so")) for name in ("ggml-base", "ggml-cpu", "ggml")]


def _ik_libraries() -> list[ctypes.CDLL]:
    return [ik_llama_cpp()._lib]  # looking a name up in it also searches the ggml library that it links to
