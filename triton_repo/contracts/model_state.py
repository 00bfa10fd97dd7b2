"""The state of one version of a model, as Triton's repository index has it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """`state` is READY, UNAVAILABLE, LOADING or UNLOADING, and empty for a version that was never loaded; `reason` says
    why the model is not ready.
    """

    name: str
    version: str
    state: str
    reason: str = ""

    @property
    def ready(self) -> bool:
        """Whether the model answers requests."""
        return self.state == "READY"

    def __str__(self) -> str:
        version = f" version {self.version}" if self.version else ""
        return f"{self.name}{version} {self.state or 'not loaded'}{f' ({self.reason})' if self.reason else ''}"
