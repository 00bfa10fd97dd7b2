"""The command line of a tritonserver: arguments of every rank, and arguments of the rank that answers clients.

The options are those of triton-inference-server/server, src/command_line_parser.cc, the same from 2.41 (December 2023)
on.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

from triton_repo.contracts.tls.server import CheckedTls
from triton_repo.serving.installation import Installation
from triton_repo.serving.ports import Address, ChosenPorts, unencrypted_address

# APIs that no client of a model needs. `model-repository` stays open, since its index says whether a model is ready.
RESTRICTED_APIS = ("shared-memory", "trace", "logging")
_RESTRICTION_HEADER = "moeship-admin"


def server_arguments(
    installation: Installation, repository: Path, *, memory_prefix: str, exit_timeout_s: int
) -> list[str]:
    """The program and the arguments that every rank has. The names of its shared memory begin with `memory_prefix`.
    Requests in flight have `exit_timeout_s` seconds to finish when the server is asked to end."""
    backends = [f"--backend-directory={installation.backends}"] if installation.backends else []
    return [
        str(installation.program),
        f"--model-repository={repository}",
        *backends,
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={exit_timeout_s}",
        f"--backend-config=python,shm-region-prefix-name={memory_prefix}",
    ]


def endpoint_arguments(address: Address, ports: ChosenPorts, tls: CheckedTls | None = None) -> list[str]:
    """The arguments of the rank that answers clients. A model that does not load does not end the server. The
    restricted APIs ask for a header with a random value, which nobody knows."""
    unencrypted = unencrypted_address(address, has_tls=tls is not None)
    return [
        "--exit-on-error=false",
        *_grpc(address, ports.grpc),
        *(_tls(tls) if tls else ()),
        *_http(unencrypted, ports.http),
        *_metrics(unencrypted, ports),
    ]


def _grpc(address: Address, port: int) -> Iterator[str]:
    yield f"--grpc-address={address.in_url}"
    yield f"--grpc-port={port}"
    yield f"--grpc-restricted-protocol={_restriction()}"


def _tls(tls: CheckedTls) -> Iterator[str]:
    yield f"--grpc-server-cert={tls.cert}"
    yield f"--grpc-server-key={tls.key}"
    if tls.trusted is None:
        yield "--grpc-use-ssl=true"
    else:
        yield "--grpc-use-ssl-mutual=true"
        yield f"--grpc-root-cert={tls.trusted}"


def _http(address: Address, port: int | None) -> Iterator[str]:
    if port is None:
        yield "--allow-http=false"
        return
    yield f"--http-address={_http_address(address)}"
    yield f"--http-port={port}"
    yield f"--http-restricted-api={_restriction()}"


def _metrics(address: Address, ports: ChosenPorts) -> Iterator[str]:
    yield "--allow-metrics=true"
    yield f"--metrics-address={_http_address(address)}"
    yield f"--metrics-port={ports.metrics}"


def _http_address(address: Address) -> str:
    """The address in the form that Triton's HTTP library takes (evhtp.c, evhtp_bind_socket)."""
    return f"ipv6:{address.text}" if address.is_ipv6 else address.text


def _restriction() -> str:
    return f"{','.join(RESTRICTED_APIS)}:{_RESTRICTION_HEADER}={secrets.token_hex(16)}"
