"""moeship's own CPU kernels: a library of custom operators for ONNX Runtime, compiled when moeship is installed.

Operators of the domain `moeship`, version 1: BlockLinear and Experts; block_linear.cpp and experts.cpp say what each
takes. Their weights lie in the one layout of `export.quantize.layout`. A session finds them after
`SessionOptions.register_custom_ops_library(str(library()))`.

The environment variable MOESHIP_KERNELS_LEVEL names an instruction set (plain, avx2, avx512bw, avx512vnni) in place of
the best that the CPU has; all of them give the same bits.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from export.onnx_graph import names
from trt_build.errors import EngineError

DOMAIN = names.MOESHIP_DOMAIN
LEVEL_VARIABLE = "MOESHIP_KERNELS_LEVEL"
LIBRARY_FILE = "moeship_kernels.so"
_LIBRARY = Path(__file__).with_name(LIBRARY_FILE)


def library() -> Path:
    """Where the compiled library lies. Raises EngineError where the install could not compile it."""
    if not _LIBRARY.is_file():
        raise EngineError(
            f"loading the CPU kernels: {_LIBRARY} does not exist; installing moeship compiles it if there is a C++17 "
            "compiler (g++ or clang++): install one and moeship again, or build the engine with --kernels onnxruntime"
        )
    return _LIBRARY


def is_compiled() -> bool:
    return _LIBRARY.is_file()


def chosen_level() -> str:
    """The instruction set that the compiled kernels run with in this process. Raises EngineError where the library is
    missing, another moeship's, or asked for an instruction set that this CPU does not have."""
    path = library()
    try:
        ask = ctypes.CDLL(str(path)).MoeshipKernelsLevel
    except (OSError, AttributeError) as error:
        raise EngineError(
            f"loading the CPU kernels: {path} was compiled from another moeship or for another system ({error}); "
            "install moeship again, which compiles them"
        ) from error
    ask.restype = ctypes.c_char_p
    name: bytes | None = ask()
    if name is None:
        raise EngineError(
            f"choosing the kernels' instruction set: this CPU does not have {LEVEL_VARIABLE}="
            f"{os.environ.get(LEVEL_VARIABLE)}; unset it to take the best that the CPU has"
        )
    return name.decode()
