"""Three ports for a server: those asked for, checked to be free, and free ones where none was asked for."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

from export.errors import listing
from triton_repo.errors import ServerError

HIGHEST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class Ports:
    """TCP ports; None means any free one."""

    grpc: int | None = None
    http: int | None = None
    metrics: int | None = None


@dataclass(frozen=True, kw_only=True)
class ChosenPorts:
    """TCP ports that were free when they were looked at."""

    grpc: int
    http: int
    metrics: int


def choose_ports(host: str, wanted: Ports) -> ChosenPorts:
    """Raises ServerError listing every port that cannot be had."""
    try:
        socket.getaddrinfo(host, None, socket.AF_INET)
    except OSError as error:
        raise ServerError(
            f"choosing ports: {host!r} is no IPv4 address or name of this machine ({error.strerror}); "
            "give one such as 127.0.0.1, or 0.0.0.0 for all"
        ) from error
    if not host:
        raise ServerError("choosing ports: the host is empty; give 127.0.0.1, or 0.0.0.0 for all addresses")
    asked = {name: port for name, port in vars(wanted).items() if port is not None}
    problems = [
        f"the {name} port is {port}, expected 1 to {HIGHEST_PORT}"
        for name, port in asked.items()
        if not 0 < port <= HIGHEST_PORT
    ]
    if len(set(asked.values())) < len(asked):
        problems.append(f"found the same port twice: {', '.join(f'{name} {port}' for name, port in asked.items())}")
    if problems:
        raise ServerError(f"choosing ports:{listing(problems)}")
    chosen: dict[str, int] = {}
    with contextlib.ExitStack() as held:  # all are held until the last is chosen, so that no two are the same
        for name, port in sorted(vars(wanted).items(), key=lambda item: item[1] is None):
            probe = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port or 0))
            except OSError as error:
                problems.append(f"the {name} port {port} on {host} cannot be had ({error.strerror})")
            else:
                chosen[name] = probe.getsockname()[1]
    if problems:
        raise ServerError(f"choosing ports: name others, or none to have free ones chosen:{listing(problems)}")
    return ChosenPorts(**chosen)
