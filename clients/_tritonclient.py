"""Imports grpc and tritonclient, which are optional. Each function returns a module, or raises MissingPackageError that
names the extra to install. Importing this module loads neither package.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from export.optional import optional_package


def require_grpc() -> ModuleType:
    """`grpc`, with `grpc.aio`."""
    _require("grpc.aio")
    return _require("grpc")


def require_messages() -> ModuleType:
    """The protobuf messages of the inference service."""
    return _require("tritonclient.grpc.service_pb2")


def require_services() -> ModuleType:
    """The stub and the servicer of the inference service. The stub takes a channel of `grpc` or of `grpc.aio`."""
    return _require("tritonclient.grpc.service_pb2_grpc")


def require_utils() -> ModuleType:
    """tritonclient's functions that serialise and deserialise tensors, and its names of dtypes."""
    return _require("tritonclient.utils")


def _require(module: str) -> ModuleType:
    loaded = sys.modules.get(module)
    # A client asks several times for each message, and guarding an import takes longer than reading the message does.
    if loaded is not None and not getattr(loaded.__spec__, "_initializing", False):
        return loaded
    package = "grpcio" if module.startswith("grpc") else "tritonclient[grpc]"
    with optional_package(package, "talking to a server", "client"):
        return importlib.import_module(module)
