"""The errors of a client, and the error that each gRPC status becomes.

    ClientError                 under export.errors.MoeshipError
    ├── RequestRejected         the request is wrong; the client finds this before sending, or the server does
    ├── ModelNotFound           the server has no model of that name
    ├── ModelNotReady           the server has the model, but has not loaded it
    ├── MethodNotSupported      the server or the model does not support what was asked
    ├── AccessDenied            credentials are missing or not enough
    ├── AddressInvalid          the server's address is not HOST:PORT
    ├── ConnectionFailed        nothing answers at that address
    ├── MetricsUnavailable      a server's metrics cannot be read
    ├── TlsFailed               client and server do not agree on TLS: a certificate, or one of them has none
    ├── ConnectionLost          after the request was sent, the server or the connection ended
    ├── DeadlineExceeded        `timeout_s` ran out; the server has been told to stop
    ├── RequestCancelled        the call was cancelled before its end
    ├── ServerOverloaded        the server is up but takes no more work now
    ├── ServerFailed            the server tried and failed
    ├── StreamBroken            the answer is incomplete or does not follow the wire contract
    ├── BatchInputInvalid       a batch that cannot be taken as it is: duplicates, or the answers of another job
    ├── EndpointsDisagree       the endpoints of a batch do not have one and the same model
    ├── BatchStopped            a batch stopped before its end; its answers so far are kept
    └── ClusterUnavailable      the Ray cluster of a batch cannot be reached or used

A command exits with status 2 if its arguments are wrong, and with 1 if the request was good but failed. The status
UNAVAILABLE may come from Triton, from its queue or from gRPC; the list of the server's models tells them apart.
"""

# Named after what happened, as httpx and grpc do, and not with the suffix "Error".
# ruff: noqa: N818

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, TypeGuard

from export.errors import MoeshipError, near_match

if TYPE_CHECKING:
    from triton_repo.contracts.model_state import ModelState


class ClientError(MoeshipError):
    """A request that got no complete answer. `status` is the name of the gRPC status; None if there was no call.
    `remedy` takes the place of the class's."""

    exit_status = 1
    remedy: ClassVar[str] = ""

    def __init__(self, message: str, *, status: str | None = None, remedy: str | None = None) -> None:
        remedy = self.remedy if remedy is None else remedy
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.status = status


class RequestRejected(ClientError):
    """The request itself is wrong."""

    exit_status = 2


class ModelNotFound(ClientError):
    """The server has no model of that name."""

    exit_status = 2


class ModelNotReady(ClientError):
    """The server knows the model but has not loaded it."""

    remedy = "wait until it is loaded, or read the reason in the server's log"


class MethodNotSupported(ClientError):
    """The server or the model does not support what was asked."""

    remedy = "check that it is Triton Inference Server and that the model is decoupled"


class AccessDenied(ClientError):
    """Credentials are missing or not enough."""

    remedy = "give the client credentials that this server accepts"


class AddressInvalid(ClientError):
    """The server's address is not valid; nothing was sent."""

    exit_status = 2


class ConnectionFailed(ClientError):
    """Nothing answers at that address."""

    remedy = "check that the server is running, and that this is its gRPC port (8001 by default), not its HTTP port"
    over_http: ClassVar[str] = "check that the server is running, and its address"  # remedy in place of that for gRPC


class TlsFailed(ClientError):
    """Client and server do not agree on TLS. The message says what to change."""


class MetricsUnavailable(ClientError):
    """Nothing answers at the address of metrics, or what answers gives no metrics."""

    remedy = "check that the server is running, and the address of its metrics, which `moeship serve` prints"


class ConnectionLost(ClientError):
    """The connection broke: the server ended, or something between client and server did."""

    remedy = "the answer is incomplete: check whether the server ended, and send the request again once it is ready"


class DeadlineExceeded(ClientError):
    """The allowed time was over before the answer was complete."""

    remedy = "allow more seconds or ask for fewer tokens"


class RequestCancelled(ClientError):
    """The call was cancelled before its end."""

    remedy = "the server or a proxy may be shutting down; send the request again"


class ServerOverloaded(ClientError):
    """The server is up but takes no more work now."""

    remedy = "send the request again later, or send fewer requests at a time"


class ServerFailed(ClientError):
    """The server tried and failed."""

    remedy = "the server's log has the cause"


class StreamBroken(ClientError):
    """The answer is incomplete, or does not follow the wire contract."""

    remedy = "check that `moeship package` made the model, and that the server was not stopped meanwhile"


class BatchInputInvalid(ClientError):
    """A batch cannot be taken as it is."""

    exit_status = 2


class EndpointsDisagree(ClientError):
    """The endpoints of a batch do not have one and the same model."""

    exit_status = 2


class BatchStopped(ClientError):
    """A batch stopped before its end."""

    remedy = "the answers so far are kept: mend the cause, and run the same command again"


class ClusterUnavailable(ClientError):
    """The Ray cluster of a batch cannot be reached or used."""

    exit_status = 2


# Every member of grpc.StatusCode except OK, by name, so that this module need not import grpc.
BY_STATUS: dict[str, type[ClientError]] = {
    "CANCELLED": RequestCancelled,
    "UNKNOWN": ServerFailed,
    "INVALID_ARGUMENT": RequestRejected,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "NOT_FOUND": ModelNotFound,
    "ALREADY_EXISTS": ServerFailed,
    "PERMISSION_DENIED": AccessDenied,
    "RESOURCE_EXHAUSTED": ServerOverloaded,
    "FAILED_PRECONDITION": ModelNotReady,
    "ABORTED": ServerFailed,
    "OUT_OF_RANGE": RequestRejected,
    "UNIMPLEMENTED": MethodNotSupported,
    "INTERNAL": ServerFailed,
    "UNAVAILABLE": ConnectionFailed,
    "DATA_LOSS": ServerFailed,
    "UNAUTHENTICATED": AccessDenied,
}

# What an ensemble puts before the error of one of its steps (triton-inference-server/core,
# src/ensemble_scheduler/ensemble_scheduler.cc).
_ENSEMBLE = re.compile(r"in ensemble '[^']*', ")
# Texts for a full queue, with any status: of Triton (core, src/scheduler_utils.cc) and of TensorRT-LLM's executor.
_QUEUE_FULL = ("Exceeds maximum queue size", "Maximum queue size of")
# The text of our models when their server is about to end (`server_stopping` of triton_repo/runtime/responses.py).
_STOPPING = "the server is stopping"
# Texts of gRPC for a connection that broke. One that was never made is "failed to connect to all addresses".
_LOST = re.compile(r"Socket closed|Connection reset|Broken pipe|recvmsg|GOAWAY|RST_STREAM|Stream removed|keepalive")
_NEVER_CONNECTED = "failed to connect"
# Statuses whose meaning depends on which models the server has. UNKNOWN is the status of an error sent as text.
NEEDS_MODELS = ("NOT_FOUND", "UNAVAILABLE", "UNKNOWN")


def depends_on_models(model: str | None, status: str) -> TypeGuard[str]:
    """Whether the list of the server's models is needed to find the error of a call about `model`."""
    return model is not None and status in NEEDS_MODELS


def error_of(
    *, doing: str, status: str, details: str, model: str | None = None, models: Sequence[ModelState] | None = None
) -> ClientError:
    """The error of one failed call.

    `doing` names the action, the model and the server. `details` is the text of the server or of gRPC. `models` are the
    models that the server listed afterwards; None if it was not asked or did not answer.
    """
    details = without_ensemble(details).removeprefix(f"{status}: ")
    message = f"{doing}: {status}: {details}"
    if any(text in details for text in (*_QUEUE_FULL, _STOPPING)):
        return ServerOverloaded(message, status=status)
    if _is_lost(status, details):
        return ConnectionLost(message, status=status)
    kind = BY_STATUS[status]
    if models is None or not depends_on_models(model, status):
        return kind(message, status=status)
    states = [state for state in models if state.name == model]
    if not states:
        return ModelNotFound(f"{message}; {what_exists(model, models)}", status=status)
    if not any(state.ready for state in states):
        return ModelNotReady(f"{message} (the server lists it as: {'; '.join(map(str, states))})", status=status)
    # If a model is ready but UNAVAILABLE, its queue is full.
    return ServerOverloaded(message, status=status) if status == "UNAVAILABLE" else kind(message, status=status)


def may_be_tls(error: ClientError) -> bool:
    """Whether a connection failed in a way that TLS may be the reason of. gRPC's text need not say so."""
    return isinstance(error, (ConnectionFailed, ConnectionLost))


def _is_lost(status: str, details: str) -> bool:
    """Whether a call ended because its connection broke."""
    if status not in ("UNAVAILABLE", "INTERNAL", "UNKNOWN") or details.startswith(_NEVER_CONNECTED):
        return False
    return _LOST.search(details) is not None


def without_ensemble(details: str) -> str:
    """The text of the step that failed, without what an ensemble puts before it."""
    prefix = _ENSEMBLE.match(details)
    return details[prefix.end() :] if prefix else details


def what_exists(model: str, models: Sequence[ModelState]) -> str:
    """A near match of a name, and the names of the server's models, for the end of a message."""
    names = sorted({state.name for state in models})
    near = near_match(model, names)
    hint = f"did you mean {near}? " if near else ""
    return f"{hint}The server has: {', '.join(names)}" if names else "the server has no models"
