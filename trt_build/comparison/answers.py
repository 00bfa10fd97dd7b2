"""The answer to one question that `moeship verify` asks of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OF_INT8_CACHE = "What do keys and values in int8 cost?"
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


def first_layer(layers: Sequence[int], differences: Sequence[float], limit: float) -> str | None:
    """Where a difference begins, by the routers of `layers`, whose logits differ by `differences`, relative to the
    largest: a sentence on the first that differs by more than `limit`. None if no router does. NaN differs."""
    number = next((number for number, found in enumerate(differences) if not found <= limit), None)
    if number is None:
        return None
    parts = f"attention, norms or router of layer {layers[number]}"
    begin = f"the experts of layer {layers[number - 1]}, or in {parts}" if number else f"the embedding, or in {parts}"
    return (
        f"the router logits of layer {layers[number]} are the first that differ, so it begins in {begin}: "
        f"{off(differences[number], limit)}"
    )


def first_part(names: Sequence[str], differences: Sequence[float], limit: float, *, rounded: bool) -> str:
    """Where a difference begins, by what the parts of layers called `names` give, which differs by `differences`,
    relative to the largest, with float32 activations: a sentence on the first that differs by more than `limit`. NaN
    differs. `rounded`: the difference was found with rounded activations."""
    number = next((number for number, found in enumerate(differences) if not found <= limit), None)
    if number is None:
        where = "in how activations are rounded, in the last norm or in the head" if rounded else "behind the layers"
        return f"what the layers give differs by no more than {limit:.0e} of the largest, so it begins {where}"
    return f"it begins in the {names[number]}, norms included: {off(differences[number], limit)}"


def behind_routers(layers: Sequence[int]) -> str:
    """Where a difference begins that no router shows."""
    return f"no router's do, so it begins in the experts of layer {layers[-1]} or behind them"


def off(found: float, limit: float) -> str:
    """A difference relative to the largest value, with its limit."""
    return f"found {found:.2e} of the largest, allowed {limit:.0e}"
