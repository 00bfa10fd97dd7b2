"""Errors of packaging, serving and answering requests, under export's root.

MoeshipError
├── RepositoryError   a model repository, or a model in one, is missing, damaged or not servable
├── ServerError       no tritonserver, a port in use, a server that did not start or ended unasked
├── TlsError          a certificate or key that TLS cannot use
└── RequestError      one request cannot be answered; `kind` is the Triton status that its client sees
"""

from __future__ import annotations

from typing import Literal

from export.errors import MoeshipError

# Names of triton_python_backend_utils.TritonError's codes, and of the gRPC statuses that they become.
RequestErrorKind = Literal["INVALID_ARG", "INTERNAL", "UNAVAILABLE"]
GRPC_STATUS: dict[RequestErrorKind, str] = {
    "INVALID_ARG": "INVALID_ARGUMENT",
    "INTERNAL": "INTERNAL",
    "UNAVAILABLE": "UNAVAILABLE",
}


class RepositoryError(MoeshipError):
    """A model repository, or a model in one, is missing, damaged or not servable."""


class ServerError(MoeshipError):
    """A server that is not there, cannot start, or ended unasked. The end of its log may stand in the message."""

    most_bytes = 8000


class TlsError(MoeshipError):
    """A certificate or a private key cannot be used: its file, its dates, its names, or one does not fit the other."""


class RequestError(MoeshipError):
    """One request cannot be answered; the server goes on."""

    most_bytes = 1900  # the message travels behind a status and the name of an ensemble

    def __init__(self, message: str, kind: RequestErrorKind = "INVALID_ARG") -> None:
        super().__init__(message)
        self.kind: RequestErrorKind = kind
