"""Asks a running Triton whether it listens, whether it is live, and in what state its models are.

It is asked over HTTP, or over gRPC if HTTP is off or gRPC is encrypted: then an answer says that TLS works too.
"""

from __future__ import annotations

import http.client
import json
import socket
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from triton_repo.contracts.model_state import ModelState
from triton_repo.contracts.tls.client import Credentials
from triton_repo.errors import ServerError

if TYPE_CHECKING:
    from grpc import Channel

_TIMEOUT_S = 10
_NO_PROXY = (("grpc.enable_http_proxy", 0),)
# What urllib raises where no HTTP answer comes. Where another program has the port, its bytes are no HTTP.
_NO_ANSWER = (OSError, http.client.HTTPException)


@dataclass(frozen=True, kw_only=True)
class HealthEndpoint:
    """Where a server answers."""

    http: str | None  # http://host:port; None if it is asked over gRPC
    grpc: str  # host:port
    tls: Credentials | None = None  # of a server whose gRPC is encrypted
    tls_ends: datetime | None = None  # end of its certificate

    def channel(self) -> Channel:
        """A channel of gRPC to the server. It never goes through a proxy, since the server is on this machine."""
        import grpc

        if self.tls is None:
            return grpc.insecure_channel(self.grpc, options=_NO_PROXY)
        return self.tls.channel(grpc, self.grpc, _NO_PROXY)


def is_listening(host: str, port: int) -> bool:
    """Whether a process accepts TCP connections at this host and port."""
    try:
        with socket.create_connection((host, port), timeout=_TIMEOUT_S):
            return True
    except OSError:
        return False


def is_live(endpoint: HealthEndpoint, timeout_s: float) -> bool:
    """Whether the server says within `timeout_s` that it is live. When the certificate has expired it can say so to
    nobody any more, and answers on connections that were made before: a server that still listens counts as live."""
    if endpoint.tls_ends is not None and datetime.now(UTC) > endpoint.tls_ends:
        host, _, port = endpoint.grpc.rpartition(":")
        return is_listening(host.strip("[]"), int(port))
    if endpoint.http is None:
        return _is_live_by_grpc(endpoint, timeout_s)
    try:
        with _opener().open(f"{endpoint.http}/v2/health/live", timeout=timeout_s) as response:
            return bool(response.status == 200)
    except _NO_ANSWER:
        return False


def model_states(endpoint: HealthEndpoint) -> tuple[ModelState, ...]:
    """The states in the server's repository index. Raises ServerError if it does not answer as Triton does."""
    entries = _index_by_grpc(endpoint) if endpoint.http is None else _index_by_http(endpoint.http)
    return tuple(
        ModelState(
            name=entry["name"],
            version=entry.get("version", ""),
            state=entry.get("state") or "UNAVAILABLE",
            reason=entry.get("reason", ""),
        )
        for entry in entries
        if not entry["name"].startswith(".")  # Triton lists hidden folders, which are no models
    )


def server_version(http_url: str) -> str | None:
    """The version that a server reports; None if it does not answer as Triton does."""
    try:
        with _opener().open(f"{http_url}/v2", timeout=_TIMEOUT_S) as response:
            return str(json.load(response)["version"])
    except (*_NO_ANSWER, ValueError, LookupError, TypeError):
        return None


def _index_by_http(http_url: str) -> Iterable[dict[str, Any]]:
    request = urllib.request.Request(f"{http_url}/v2/repository/index", data=b"{}", method="POST")
    try:
        with _opener().open(request, timeout=_TIMEOUT_S) as response:
            entries: list[dict[str, Any]] = json.load(response)
            return entries
    except (*_NO_ANSWER, ValueError) as error:
        raise ServerError(f"asking {http_url} for its models: {error}; is it a Triton server?") from error


def _index_by_grpc(endpoint: HealthEndpoint) -> Iterable[dict[str, Any]]:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with endpoint.channel() as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            index = stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            raise ServerError(
                f"asking {endpoint.grpc} for its models: {error.code().name}: {error.details()}; is it a Triton server?"
            ) from error
    return [
        {"name": model.name, "version": model.version, "state": model.state, "reason": model.reason}
        for model in index.models
    ]


def _is_live_by_grpc(endpoint: HealthEndpoint, timeout_s: float) -> bool:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with endpoint.channel() as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            return bool(stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=timeout_s).live)
        except grpc.RpcError:
            return False


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))
