"""The state of one version of a model, as Triton's repository index has it."""

from __future__ import annotations

from dataclasses import dataclass

from export.errors import MoeshipError


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """`state` is READY, UNAVAILABLE, LOADING or UNLOADING, and empty for a version that was never loaded; `reason` says
    why the model is not ready, as Triton writes it: a status, the error of Python, and its stack.
    """

    name: str
    version: str
    state: str
    reason: str = ""

    @property
    def ready(self) -> bool:
        """Whether the model answers requests."""
        return self.state == "READY"

    @property
    def own_words(self) -> str | None:
        """The words of the error of moeship that kept the model from loading; None for another reason."""
        words, stack, _ = self._parts()
        name, colon, text = words.partition(": ")
        return text if stack and colon and name in _names_of_errors(MoeshipError) else None

    @property
    def words(self) -> str:
        """The reason without Triton's status and without a stack, in one line where it has one; empty without one."""
        return self.own_words or self._parts()[0]

    def _parts(self) -> tuple[str, str, str]:
        return self.reason.removeprefix("Internal: ").partition("\n\nAt:\n")

    def __str__(self) -> str:
        version = f" version {self.version}" if self.version else ""
        return f"{self.name}{version} {self.state or 'not loaded'}{f' ({self.words})' if self.reason else ''}"


def _names_of_errors(kind: type[MoeshipError]) -> set[str]:
    return {kind.__name__}.union(*(_names_of_errors(own) for own in kind.__subclasses__()))
