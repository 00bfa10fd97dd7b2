"""moeship's own CPU kernels: a library of custom operators for ONNX Runtime, compiled when moeship is installed.

Operators of the domain `moeship`, version 1: BlockLinear, Experts, Embedding and Attention; block_linear.cpp,
experts.cpp, embedding.cpp and attention.cpp say what each takes. The first three read weights in the layout of
`export.quantize.layout`, the last keys and values in the layout of `export.onnx_graph.kv_records`. To use them, call
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
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from export.onnx_graph import names
from trt_build.errors import EngineError
from trt_build.ort.kernels.library_file import found_damage

logger = logging.getLogger(__name__)

DOMAIN = names.MOESHIP_DOMAIN
LEVEL_VARIABLE = "MOESHIP_KERNELS_LEVEL"
LIBRARY_FILE = "moeship_kernels.so"
INTERFACE = 4  # interface version of the library that this moeship loads: kInterface in layout.h
COMPILERS = ("g++", "clang++")
_LIBRARY = Path(__file__).with_name(LIBRARY_FILE)


@dataclass(frozen=True)
class Fault:
    """Why the library cannot be used here, and what a user should do to use it."""

    reason: str
    remedy: str


def library(doing: str = "loading the CPU kernels") -> Path:
    """The path of the compiled library. Raises EngineError, whose message begins with `doing`, if `found_fault` finds a
    fault, and EngineError as `check_level` does."""
    fault = found_fault()
    if fault is not None:
        raise EngineError(f"{doing}: {fault.reason}; {fault.remedy}; or build the engine with --kernels onnxruntime")
    check_level()
    return _LIBRARY


def is_usable() -> bool:
    """Whether the library is compiled, loads on this machine, belongs to this version of moeship, and has an
    instruction set (level) for this CPU."""
    return found_fault() is None


def found_fault() -> Fault | None:
    """The reason why the library cannot be used, with the remedy; None if it can be used.

    A level that MOESHIP_KERNELS_LEVEL names is the user's choice and no fault of the library: `check_level` checks it.
    """
    problem = _library_problem()
    if problem is not None:
        return Fault(problem, remedy())
    if os.environ.get(LEVEL_VARIABLE):
        return None
    level, problem = _ask_level()
    if level is not None:
        return None
    # "choosing the kernels' instruction set: this CPU lacks avx2; ...": runtime.cpp
    reason = problem.partition("; ")[0].rpartition(": ")[2]
    return Fault(reason, f"set {LEVEL_VARIABLE} to plain, which is slow")


def check_level() -> None:
    """Raise EngineError if MOESHIP_KERNELS_LEVEL names a level that this CPU does not have. Does nothing if it names
    none, or if the library cannot be loaded: `found_fault` reports that."""
    if os.environ.get(LEVEL_VARIABLE) and _library_problem() is None:
        level, problem = _ask_level()
        if level is None:
            raise EngineError(problem)


def warn_if_unusable(done: str, further: str) -> None:
    """Log a warning if an engine needs the kernels and this machine cannot use them. An engine may be made on another
    machine than the one that serves it, so this is no error. The warning says what is `done` all the same, and what
    `further` steps need the kernels."""
    fault = found_fault()
    if fault is not None:
        logger.warning(
            "moeship's CPU kernels cannot be used here: %s; %s, and loads on machines where they can be used; to %s it "
            "here, %s",
            fault.reason, done, further, fault.remedy,
        )  # fmt: skip


def _library_problem() -> str | None:
    """The reason why the file is no library that this moeship can call; None if it is one."""
    if not _LIBRARY.is_file():
        return f"{_LIBRARY} does not exist"
    try:
        damage = found_damage(_LIBRARY.read_bytes())
        if damage is not None:
            return f"{_LIBRARY} is damaged ({damage})"
        found = ctypes.CDLL(str(_LIBRARY)).MoeshipKernelsInterface
    except OSError as error:
        return f"{_LIBRARY} is not a library that this machine can load ({error})"
    except AttributeError:
        return (
            f"{_LIBRARY} does not say which interface it has, expected {INTERFACE}: it belongs to another version of "
            "moeship"
        )
    found.restype = ctypes.c_int64
    if found() != INTERFACE:
        return (
            f"{_LIBRARY} has interface {found()}, expected {INTERFACE}: it was compiled for another version of moeship"
        )
    return None


def remedy() -> str:
    """What a user should do if the library is missing or not this moeship's."""
    compiler = (
        "" if any(map(shutil.which, COMPILERS)) else f"install a C++17 compiler ({' or '.join(COMPILERS)}), then "
    )
    return f"{compiler}install moeship again; in a clone `pip install -v --no-deps -e .` shows what the compiler says"


def chosen_level() -> str:
    """The instruction set (level) that the compiled kernels use in this process. Raises EngineError as `library`
    does."""
    library()
    level, problem = _ask_level()
    if level is None:
        raise EngineError(problem)
    return level


def _ask_level() -> tuple[str | None, str]:
    """The level that the library chooses, or None and the sentence that says why there is none."""
    ask = ctypes.CDLL(str(_LIBRARY)).MoeshipKernelsLevel
    ask.restype, problem = ctypes.c_char_p, ctypes.c_char_p()
    name: bytes | None = ask(ctypes.byref(problem))
    return (None, (problem.value or b"").decode()) if name is None else (name.decode(), "")
