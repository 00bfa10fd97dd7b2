"""moeship's own CPU kernels: a library of custom operators for ONNX Runtime, compiled when moeship is installed.

Operators of the domain `moeship`, version 1: BlockLinear and Experts; block_linear.cpp and experts.cpp say what each
takes. Their weights lie in the one layout of `export.quantize.layout`. A session finds them after
`SessionOptions.register_custom_ops_library(str(library()))`.

The environment variable MOESHIP_KERNELS_LEVEL names an instruction set (plain, avx2, avx512bw, avx512vnni) in place of
the best that the CPU has; all of them give the same bits.
"""

from __future__ import annotations

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
            "compiler (g++ or clang++): install one and moeship again, or build the engine without --kernels moeship"
        )
    return _LIBRARY


def is_compiled() -> bool:
    return _LIBRARY.is_file()
