"""Imports of packages that are optional, or slow to load: what goes wrong becomes one error, and Ctrl-C waits."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from export.errors import MissingPackageError

# Read when ONNX Runtime is imported (onnxruntime/core/platform/posix/telemetry_1ds.cc; releases from 1.29 on).
_TELEMETRY_VARIABLE = "ORT_DISABLE_TELEMETRY"


@contextmanager
def optional_package(package: str, purpose: str, extra: str) -> Iterator[None]:
    """The block imports `package`, of the extra `extra`, for `purpose`. Raises MissingPackageError where it cannot.

    Ctrl-C raises KeyboardInterrupt after the block and not within it: an import that is broken off leaves half a module
    behind, and compiled modules report an interrupt as an ImportError.
    """
    with _interrupts_held():
        try:
            yield
        except ModuleNotFoundError as error:
            raise MissingPackageError(package, purpose, extra) from error
        except ImportError as error:
            raise MissingPackageError(package, purpose, extra, reason=str(error)) from error


@contextmanager
def onnx_runtime(package: str, purpose: str, extra: str) -> Iterator[None]:
    """`optional_package` for the block that imports ONNX Runtime first.

    Its Linux wheels report to Microsoft which models are loaded, and leave a file `.ses` in the temporary folder. That
    is off here, unless ORT_DISABLE_TELEMETRY is set to another value.
    """
    os.environ.setdefault(_TELEMETRY_VARIABLE, "1")
    with optional_package(package, purpose, extra):
        yield


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Put off Ctrl-C until after the block, where it would raise KeyboardInterrupt in it."""
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
