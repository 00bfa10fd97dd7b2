"""Loads the library of llama.cpp or of ik_llama.cpp, one of them in a process, and keeps its log.

Files and functions of both libraries have the same names, but their structs have different layouts. In a process that
loads both, one library would call functions of the other. Use a separate process for the second library.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from typing import Any

from decode import machine
from export.errors import ConfigError
from export.optional import optional_package

LOG: list[str] = []  # the library's log messages, which can be parts of lines
_PACKAGES = ("llama_cpp", "ik_llama_cpp")


@functools.cache
def llama_cpp() -> Any:  # noqa: ANN401 - the package, untyped
    """Import llama-cpp-python. Raises MissingPackageError."""
    _alone("llama_cpp")
    with optional_package("llama-cpp-python", "measuring llama.cpp", "bench"):
        library = importlib.import_module("llama_cpp")
    library.llama_log_set(ctypes.cast(_keep_log, library.llama_log_callback), None)
    return library


@functools.cache
def ik_llama_cpp() -> Any:  # noqa: ANN401 - a module of the package, untyped
    """Import the module of ik-llama-cpp-python that declares llama.h; its `_lib` has every function.

    Raises MissingPackageError, and ConfigError if the library was compiled for another processor.
    """
    _alone("ik_llama_cpp")
    with optional_package("ik-llama-cpp-python", "measuring ik_llama.cpp", "bench"):
        library = importlib.import_module("ik_llama_cpp._ctypes_api")
    functions = library._lib
    functions.llama_batch_get_one.argtypes = [library.llama_token_p, ctypes.c_int32, library.llama_pos, ctypes.c_int32]
    functions.llama_batch_get_one.restype = library.llama_batch
    functions.llama_print_system_info.restype = ctypes.c_char_p
    functions.llama_log_set(_keep_log, None)
    system = functions.llama_print_system_info().decode()
    if "avx512_vnni" in machine.vector_extensions() and "AVX512_VNNI = 1" not in system:
        raise ConfigError(
            "measuring ik_llama.cpp: this processor has AVX-512 VNNI, the library is compiled without, as the wheel "
            "is; compile it with benchmarks/decode/compile_ik_llama.sh and set the variable that it prints"
        )
    return library


def log_tail() -> str:
    """The last lines of the library's log."""
    return "".join(LOG[-10:]).strip()


def _alone(package: str) -> None:
    [other] = set(_PACKAGES) - {package}
    if other in sys.modules:
        raise AssertionError(f"loading {package}: this process has loaded {other}; load it in another process")


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)  # ggml_log_callback
def _keep_log(_level: int, text: bytes, _data: None) -> None:
    LOG.append(text.decode(errors="replace"))
