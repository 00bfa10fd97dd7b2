"""Known holes of Triton releases, and whether a server that has some may listen beyond this machine.

To learn its version, the program is started for a moment without models, on the loopback address.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path

from export.errors import listing
from triton_repo.errors import ServerError
from triton_repo.processes.program import POLL_INTERVAL_S, Program, running_program
from triton_repo.serving.command import endpoint_arguments, server_arguments
from triton_repo.serving.health import server_version
from triton_repo.serving.installation import Installation, packages_folder
from triton_repo.serving.ports import Address, Ports, choose_ports

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 30
_EMPTY_REPOSITORY = "no-models"


@dataclass(frozen=True, kw_only=True)
class Hole:
    """A fault of Triton that strangers can use."""

    names: str  # of the CVEs
    what: str
    fixed_in: tuple[int, int, int]  # the first release without it, such as (2, 59, 1)
    container: str  # that release's tag

    def __str__(self) -> str:
        return f"{self.names}, fixed in tritonserver:{self.container}-py3: {self.what}"


# NVIDIA's security bulletins for Triton of August 2025 and of May 2026 (5828). 2.59.0 is 25.06 and 2.59.1 is 25.07;
# 2.71.0 is 26.07 and 2.74.0 is 26.10, one a month, so that 26.03 is 2.67.0.
KNOWN_HOLES = (
    Hole(
        names="CVE-2025-23310, CVE-2025-23311",
        what="an HTTP body in chunks, 4 MB in all, crashes the server and may run code in it; --no-http closes this",
        fixed_in=(2, 59, 1),
        container="25.07",
    ),
    Hole(
        names="CVE-2025-23319, CVE-2025-23320, CVE-2025-23334",
        what="error messages name the Python backend's shared memory, which clients can then register and write to; "
        "moeship serve restricts the shared-memory API",
        fixed_in=(2, 59, 1),
        container="25.07",
    ),
    Hole(
        names="CVE-2026-24206, CVE-2026-24207",
        what="APIs that are restricted to those who know a header can be used without it",
        fixed_in=(2, 67, 0),
        container="26.03",
    ),
)
IMAGE = "nvcr.io/nvidia/tritonserver"
NEWEST_FIX = max(KNOWN_HOLES, key=lambda hole: hole.fixed_in)


def holes_of(version: str | None) -> tuple[Hole, ...] | None:
    """The known holes of a release such as 2.51.0; None if `version` is not a version."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version or "")
    if found is None:
        return None
    numbers = (int(found[1]), int(found[2]), int(found[3] or 0))
    return tuple(hole for hole in KNOWN_HOLES if numbers < hole.fixed_in)


def refuse_known_holes(version: str | None, address: Address, *, accepted: bool) -> None:
    """Raise ServerError for a server with known holes, or with an unknown version, that other machines could reach. If
    the caller has accepted that, log a warning."""
    holes = holes_of(version)
    if address.is_loopback or holes == ():
        return
    remedy = (
        f"use the container {IMAGE}:{NEWEST_FIX.container}-py3 or a later one, listen on 127.0.0.1 behind a proxy, or "
        "accept it with --accept-known-vulnerabilities (docs/security.md)"
    )
    if holes is None:
        what, problems = "a tritonserver that does not report its version, so its holes are unknown", []
    else:
        what, problems = f"tritonserver {version}, which has known holes", list(map(str, holes))
    if not accepted:
        raise ServerError(f"listening on {address.text} with {what}; {remedy}{listing(problems) if problems else ''}")
    logger.warning("listening on %s with %s%s", address.text, what, listing(problems) if problems else "")


def read_version(installation: Installation, workspace: Path, mark: str) -> str | None:
    """Start a tritonserver to ask for its version, and end it. None if it does not report one."""
    repository = workspace / _EMPTY_REPOSITORY
    repository.mkdir()
    address = Address("127.0.0.1")
    ports = choose_ports(address, Ports())
    arguments = server_arguments(installation, repository, memory_prefix=f"{mark}version_", exit_timeout_s=0)
    program = Program(
        arguments=[*arguments, *endpoint_arguments(address, ports)],
        environment=installation.environment(),
        folder=packages_folder(),
        end_timeout_s=0,
    )
    version = None
    with contextlib.suppress(ServerError), running_program(program, workspace / "version.log", mark) as process:
        deadline = time.monotonic() + PROBE_TIMEOUT_S
        while version is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_S)
            version = server_version(f"http://{address.text}:{ports.http}")
    return version
