"""Guards imports of packages that are optional or slow to load: a failure raises one error, and Ctrl-C is delayed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from export.errors import MissingPackageError

# ONNX Runtime reads it when it is imported (onnxruntime/core/platform/posix/telemetry_1ds.cc; releases from 1.29 on).
_TELEMETRY_VARIABLE = "ORT_DISABLE_TELEMETRY"


@contextmanager
def optional_package(package: str, purpose: str, extra: str) -> Iterator[None]:
    """Guard a block that imports `package`: raises MissingPackageError if the package is missing or cannot be loaded.
    The error names `purpose`, what the package is needed for, and `extra`, moeship's extra that installs it.

    Ctrl-C raises KeyboardInterrupt after the block instead of within it. An interrupted import leaves a half loaded
    module behind, and compiled modules report an interrupt as an ImportError.
    """
    with _interrupts_held():
        try:
            yield
        except ModuleNotFoundError as error:
            raise MissingPackageError(package, purpose, extra) from error
        except ImportError as error:
            raise MissingPackageError(package, purpose, extra, reason=str(error)) from error


def require_packages(modules: Sequence[str], package: str, purpose: str, extra: str) -> None:
    """Raise MissingPackageError where a module is not installed, without importing any; the rest as
    `optional_package`."""
    if any(find_spec(module) is None for module in modules):
        raise MissingPackageError(package, purpose, extra)


@contextmanager
def onnx_runtime(package: str, purpose: str, extra: str) -> Iterator[None]:
    """Guard the first import of ONNX Runtime like `optional_package`, and turn its telemetry off.

    ONNX Runtime's Linux wheels report to Microsoft which models are loaded, and leave a file `.ses` in the temporary
    folder. A value of ORT_DISABLE_TELEMETRY that the user has set is kept.
    """
    os.environ.setdefault(_TELEMETRY_VARIABLE, "1")
    with optional_package(package, purpose, extra):
        yield


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delay the KeyboardInterrupt of Ctrl-C until after the block. Does nothing outside the main thread, or if the
    program handles SIGINT itself."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = threading.Event()
    signal.signal(signal.SIGINT, lambda _number, _frame: pressed.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed.is_set():
            raise KeyboardInterrupt
