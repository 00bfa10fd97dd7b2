"""moeship's own CPU kernels: a library of custom operators for ONNX Runtime, compiled when moeship is installed.

Operators of the domain `moeship`, version 1: BlockLinear and Experts; block_linear.cpp and experts.cpp say what each
takes. Their weights lie in the one layout of `export.quantize.layout`. A session finds them after
`SessionOptions.register_custom_ops_library(str(library()))`.

The library has every product for several instruction sets (levels), and takes the last of these that the CPU has:

| level | needs |
|---|---|
| plain | C++; for CPUs that are no x86, an x86 CPU is refused with it unless it is asked for |
| avx2 | AVX2, FMA, F16C |
| avx512bw | AVX-512 F, BW, DQ, VL |
| avx512vnni | AVX-512 VNNI |
| amx | AMX's int8 tiles, which Linux has to grant |

The environment variable MOESHIP_KERNELS_LEVEL names another. All of them give the same bits.
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
INTERFACE = 2  # of the library that this version of moeship takes: kInterface in layout.h
COMPILERS = ("g++", "clang++")
_LIBRARY = Path(__file__).with_name(LIBRARY_FILE)


def library() -> Path:
    """Where the compiled library lies. Raises EngineError where it is missing or another version's."""
    problem = found_fault()
    if problem is not None:
        raise EngineError(
            f"loading the CPU kernels: {problem}; {remedy()}; or build the engine with --kernels onnxruntime"
        )
    return _LIBRARY


def is_compiled() -> bool:
    """Whether the library is there and this version's."""
    return found_fault() is None


def found_fault() -> str | None:
    """Why the library cannot be used; None where it can."""
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
    """What to do about a fault."""
    compiler = (
        "" if any(map(shutil.which, COMPILERS)) else f"install a C++17 compiler ({' or '.join(COMPILERS)}), then "
    )
    return f"{compiler}install moeship again; in a clone `pip install -v --no-deps -e .` shows what the compiler says"


def chosen_level() -> str:
    """The instruction set that the compiled kernels run with in this process. Raises EngineError where the library
    cannot be used, is asked for an instruction set that this CPU does not have, or is on an x86 CPU without AVX2."""
    ask = ctypes.CDLL(str(library())).MoeshipKernelsLevel
    ask.restype, problem = ctypes.c_char_p, ctypes.c_char_p()
    name: bytes | None = ask(ctypes.byref(problem))
    if name is None:
        raise EngineError((problem.value or b"choosing the kernels' instruction set").decode())
    return name.decode()
