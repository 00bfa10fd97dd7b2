"""The answer to one question that `moeship verify` asks of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_FAILURES = 12  # failures that an answer lists one by one


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was asked, what was measured, and what is wrong: one sentence a failure, with found and expected. `unasked`
    is the reason for which a question was not asked, None if it was."""

    question: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    unasked: str | None = None

    @property
    def passed(self) -> bool | None:
        """None for a question that was not asked."""
        return None if self.unasked is not None else not self.failures

    def to_json(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "passed": self.passed,
            **({"unasked": self.unasked} if self.unasked is not None else {}),
            **self.figures,
            "failures": list(self.failures),
        }


def listed(failures: list[str]) -> tuple[str, ...]:
    """The first MOST_FAILURES of the failures, and how many more there are."""
    rest = len(failures) - MOST_FAILURES
    return tuple(failures[:MOST_FAILURES]) + ((f"and {rest} more",) if rest > 0 else ())
