"""The error of evaluating an engine."""

from __future__ import annotations

from export.errors import MoeshipError


class EvaluationError(MoeshipError):
    """A task cannot be read or loaded, or asks for what this evaluation does not do."""
