"""Chooses where a server listens: the address of a host, and a port each for gRPC, HTTP and metrics.

A port that is asked for must be free. If none is asked for, a free one is chosen, below those that the kernel gives to
outgoing connections: one of these may be taken again before the server listens on it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import random
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from export.errors import listing
from triton_repo.errors import ServerError

HIGHEST_PORT = 65535
LOWEST_CHOSEN = 10000
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")  # of IPv6 too
_TRIES = 64
EVERY_ADDRESS = ("0.0.0.0", "::")
_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, kw_only=True)
class Ports:
    """TCP ports; None means any free one."""

    grpc: int | None = None
    http: int | None = None
    metrics: int | None = None


@dataclass(frozen=True, kw_only=True)
class ChosenPorts:
    """TCP ports that were free when they were chosen. `http` is None if HTTP is off."""

    grpc: int
    http: int | None
    metrics: int


@dataclass(frozen=True)
class Address:
    """An IPv4 or IPv6 address, such as 127.0.0.1 or ::1, that a server listens on."""

    text: str

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.text

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this machine can reach the address."""
        return ipaddress.ip_address(self.text).is_loopback

    @property
    def in_url(self) -> str:
        """The form that is put before a port in a URL: IPv6 in brackets (RFC 3986, 3.2.2)."""
        return f"[{self.text}]" if self.is_ipv6 else self.text

    @property
    def to_ask(self) -> Address:
        """The address at which this machine reaches a server that listens here: for all addresses, the loopback
        address."""
        return Address(_LOOPBACK_OF.get(self.text, self.text))


def unencrypted_address(address: Address, *, has_tls: bool) -> Address:
    """Where HTTP and metrics listen on a server whose gRPC listens on `address`. Triton has TLS for gRPC alone
    (triton-inference-server/server, src/command_line_parser.cc), so beside TLS only this machine reaches the others."""
    return Address("::1" if address.is_ipv6 else "127.0.0.1") if has_tls and not address.is_loopback else address


def resolve_host(host: str) -> Address:
    """The address of a host. An IPv4 address is preferred if the name has both kinds. Raises ServerError."""
    if not host:
        raise ServerError("choosing ports: the host is empty; give 127.0.0.1, or 0.0.0.0 for all addresses")
    try:
        # The codec idna limits the length of each part of a name, and raises UnicodeError.
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ServerError(
            f"choosing ports: {host!r} is not an address or name that this machine can resolve ({reason}); "
            "give one such as 127.0.0.1, or 0.0.0.0 for all"
        ) from error
    family, *_, place = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    if family == socket.AF_INET6 and place[-1]:  # a scope: the address is valid on one link only
        raise ServerError(
            f"choosing ports: {host!r} is an IPv6 address of one link, which Triton cannot listen on; give another "
            "address of this machine, such as 127.0.0.1"
        )
    return Address(str(place[0]))


def choose_ports(address: Address, wanted: Ports, *, http: bool = True, has_tls: bool = False) -> ChosenPorts:
    """Check the ports that are given and choose the others. If `http` is False there is no HTTP port. `has_tls` is that
    of `unencrypted_address`. Raises ServerError that lists every port that cannot be used."""
    unencrypted = unencrypted_address(address, has_tls=has_tls)
    wishes = {name: port for name, port in vars(wanted).items() if http or name != "http"}
    asked = {name: port for name, port in vars(wanted).items() if port is not None}
    problems = [
        f"the {name} port is {port}, expected 1 to {HIGHEST_PORT}"
        for name, port in asked.items()
        if not 0 < port <= HIGHEST_PORT
    ]
    if not http and wanted.http is not None:
        problems.append(f"the http port is {wanted.http}, and HTTP is off; leave one of the two out")
    if len(set(asked.values())) < len(asked):
        problems.append(f"found the same port twice: {', '.join(f'{name} {port}' for name, port in asked.items())}")
    if problems:
        raise ServerError(f"choosing ports:{listing(problems)}")
    chosen: dict[str, int | None] = {"http": None}
    with contextlib.ExitStack() as held:  # each is held until the last is chosen, so that no two are equal
        for name, port in sorted(wishes.items(), key=lambda item: item[1] is None):
            own = address if name == "grpc" else unencrypted
            try:
                probe = held.enter_context(_listening(own, [port] if port else _candidates()))
            except OSError as error:
                what = f"the {name} port {port}" if port else f"a port for {name}"
                problems.append(f"{what} on {own.text} cannot be used ({error.strerror})")
            else:
                chosen[name] = probe.getsockname()[1]
    if problems:
        raise ServerError(f"choosing ports: give other ports, or none to have free ones chosen:{listing(problems)}")
    return ChosenPorts(**chosen)  # type: ignore[arg-type]  # only `http` may be None


def check_port(name: str, address: Address, port: int) -> None:
    """Raise ServerError for a port that cannot be listened on."""
    if not 0 < port <= HIGHEST_PORT:
        raise ServerError(f"choosing ports: the {name} port is {port}, expected 1 to {HIGHEST_PORT}")
    try:
        _listening(address, [port]).close()
    except OSError as error:
        raise ServerError(
            f"choosing ports: the {name} port {port} on {address.text} cannot be used ({error.strerror}); give another"
        ) from error


def _candidates() -> Iterator[int]:
    """Ports to try: some below those of outgoing connections, in a random order, then 0, any that is free."""
    try:
        end = int(_OUTGOING.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        end = 0
    yield from random.sample(range(LOWEST_CHOSEN, end), _TRIES) if end >= LOWEST_CHOSEN + _TRIES else ()
    yield 0


def _listening(address: Address, ports: Iterable[int]) -> socket.socket:
    """A socket that listens on the first of `ports` that is free. Raises OSError, that of the last, if none is."""
    family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
    for port in ports:
        probe = socket.socket(family, socket.SOCK_STREAM)
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address.text, port))
            probe.listen()  # with SO_REUSEADDR two sockets that do not listen can have one port
        except OSError as error:
            probe.close()
            failure = error
        else:
            return probe
    raise failure
