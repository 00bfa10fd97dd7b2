"""moeship's own CPU kernels: a library of custom operators for ONNX Runtime, compiled when moeship is installed.

Operators of the domain `moeship`, version 1: BlockLinear and Experts; block_linear.cpp and experts.cpp say what each
takes. Both operators read weights in the layout of `export.quantize.layout`. To use them, call
`SessionOptions.register_custom_ops_library(str(library()))` before the session is made.

The library has every product for several instruction sets (levels), and uses the last level below that the CPU has:

| level | needs |
|---|---|
| plain | no instruction set; for CPUs other than x86. On x86 only if MOESHIP_KERNELS_LEVEL asks for it |
| avx2 | AVX2, FMA, F16C |
| avx512bw | AVX-512 F, BW, DQ, VL |
| avx512vnni | AVX-512 VNNI |
| amx | AMX's int8 tiles, and Linux's permission to use them |

The environment variable MOESHIP_KERNELS_LEVEL selects another level. All levels compute the same bits.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

from export.onnx_graph import names
from trt_build.errors import EngineError

DOMAIN = names.MOESHIP_DOMAIN
LEVEL_VARIABLE = "MOESHIP_KERNELS_LEVEL"
LIBRARY_FILE = "moeship_kernels.so"
INTERFACE = 2  # interface version of the library that this moeship loads: kInterface in layout.h
COMPILERS = ("g++", "clang++")
_LIBRARY = Path(__file__).with_name(LIBRARY_FILE)


def library() -> Path:
    """The path of the compiled library. Raises EngineError if it is missing or was compiled for another version."""
    problem = found_fault()
    if problem is not None:
        raise EngineError(
            f"loading the CPU kernels: {problem}; {remedy()}; or build the engine with --kernels onnxruntime"
        )
    return _LIBRARY


def is_compiled() -> bool:
    """Whether the library is compiled, loads on this machine, and belongs to this version of moeship."""
    return found_fault() is None


def found_fault() -> str | None:
    """The reason why the library cannot be used; None if it can be used."""
    if not _LIBRARY.is_file():
        return f"{_LIBRARY} does not exist, as no C++17 compiler worked when moeship was installed"
    try:
        found = ctypes.CDLL(str(_LIBRARY)).MoeshipKernelsInterface
    except OSError as error:
        return f"{_LIBRARY} is no library that this machine loads ({error})"
    except AttributeError:
        return f"{_LIBRARY} does not say which interface it has, expected {INTERFACE}: it is another moeship's"
    found.restype = ctypes.c_int64
    if found() != INTERFACE:
        return f"{_LIBRARY} has interface {found()}, expected {INTERFACE}: it was compiled for another moeship"
    return None


def remedy() -> str:
    """What a user should do if the library cannot be used."""
    compiler = (
        "" if any(map(shutil.which, COMPILERS)) else f"install a C++17 compiler ({' or '.join(COMPILERS)}), then "
    )
    return f"{compiler}install moeship again; in a clone `pip install -v --no-deps -e .` shows what the compiler says"


def chosen_level() -> str:
    """The instruction set (level) that the compiled kernels use in this process. Raises EngineError if the library
    cannot be used, if MOESHIP_KERNELS_LEVEL asks for a level that this CPU does not have, or if an x86 CPU lacks AVX2
    and no level is asked for."""
    ask = ctypes.CDLL(str(library())).MoeshipKernelsLevel
    ask.restype, problem = ctypes.c_char_p, ctypes.c_char_p()
    name: bytes | None = ask(ctypes.byref(problem))
    if name is None:
        raise EngineError((problem.value or b"choosing the kernels' instruction set").decode())
    return name.decode()
