"""What a running Triton says of itself over HTTP: whether it listens, and the state of each of its models."""

from __future__ import annotations

import json
import socket
import urllib.request
from dataclasses import dataclass

from triton_repo.errors import ServerError

_TIMEOUT_S = 10


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """One model as the repository index has it: `state` is READY, UNAVAILABLE or on the way between; `reason` says why
    it is not ready.
    """

    name: str
    version: str
    state: str
    reason: str

    @property
    def ready(self) -> bool:
        return self.state == "READY"


def is_listening(host: str, port: int) -> bool:
    """Whether something accepts TCP connections there."""
    try:
        with socket.create_connection((host, port), timeout=_TIMEOUT_S):
            return True
    except OSError:
        return False


def model_states(http_url: str) -> tuple[ModelState, ...]:
    """The repository index of a server. Raises ServerError when it does not answer as Triton does."""
    request = urllib.request.Request(f"{http_url}/v2/repository/index", data=b"{}", method="POST")
    # A server of this machine is never asked through a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as response:
            entries = json.load(response)
    except (OSError, ValueError) as error:
        raise ServerError(f"asking {http_url} for its models: {error}; is it a Triton server?") from error
    return tuple(
        ModelState(
            name=entry["name"],
            version=entry.get("version", ""),
            state=entry.get("state", "UNAVAILABLE"),
            reason=entry.get("reason", ""),
        )
        for entry in entries
        if not entry["name"].startswith(".")  # Triton lists hidden folders, which are no models
    )
