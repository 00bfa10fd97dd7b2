"""What the quantiser cost, part by part: the KL divergence with one part of the model as an engine stores it.

Everything else of the model is the checkpoint's, and so are the activations, in float32. The parts' figures do not add
up to that of all parts together, since errors in one layer meet those of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

QUESTION = "What did the quantiser cost?"


class Grain(StrEnum):
    """How finely the cost is told apart."""

    LAYERS = "layers"  # each layer's attention and experts, embedding, head
    EXPERTS = "experts"  # also each expert of each layer


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """The KL divergence, in nats, of the model with one part's weights as stored. `role` is a role of the tensor table,
    or "all"."""

    role: str
    layer: int | None = None
    expert: int | None = None
    mean_kl: float
    standard_error: float  # of the mean over positions: their standard deviation over the root of their number
    max_kl: float

    def words(self) -> str:
        """The part in words, such as "the experts of layer 3"."""
        role = {"expert": "experts", "ffn": "MLP"}.get(self.role, self.role)
        layer = "" if self.layer is None else f" of layer {self.layer}"
        return f"the {role}{layer}" if self.expert is None else f"expert {self.expert}{layer}"

    def to_json(self) -> dict[str, Any]:
        return {
            "role": self.role,
            **({} if self.layer is None else {"layer": self.layer}),
            **({} if self.expert is None else {"expert": self.expert}),
            "mean_kl": self.mean_kl,
            "standard_error": self.standard_error,
            "max_kl": self.max_kl,
        }


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The costs of all parts over `num_tokens` positions in `num_windows` windows. `unasked` is the reason for which
    there are none; `choice` says how many tokens were taken, and why."""

    grain: Grain
    num_tokens: int = 0
    num_windows: int = 0
    choice: str = ""
    whole: PartCost | None = None  # all stored weights together
    parts: tuple[PartCost, ...] = ()
    unasked: str | None = None

    def dearest(self, allowed: float) -> str | None:
        """A sentence on the part that costs most, for a failure whose limit of the mean KL is `allowed`, in nats. None
        if no cost was measured."""
        if self.whole is None or not self.parts:
            return None
        part = max(self.parts, key=lambda part: np.nan_to_num(part.mean_kl, nan=np.inf))
        if self.whole.mean_kl <= allowed:
            return (
                f"all weights as the engine stores them cost {self.whole.mean_kl:.2g} nats of mean KL over "
                f"{self.num_tokens} tokens, within the limit: what is past it comes from the graph, or from rounded "
                "activations"
            )
        return (
            f"the part that costs most is {part.words()}: {part.mean_kl:.2g} nats of mean KL over {self.num_tokens} "
            f"tokens, with all else the checkpoint's; all parts together {self.whole.mean_kl:.2g}"
        )

    def to_json(self, experts: bool = True) -> dict[str, Any]:
        """Everything, or without the single experts."""
        if self.unasked is not None:
            return {"question": QUESTION, "unasked": self.unasked}
        parts = [part.to_json() for part in self.parts if experts or part.expert is None]
        return {
            "question": QUESTION,
            "grain": str(self.grain),
            "tokens": self.num_tokens,
            "windows": self.num_windows,
            "choice": self.choice,
            "whole": None if self.whole is None else self.whole.to_json(),
            "parts": parts,
        }

    def lines(self) -> list[str]:
        """The costs as lines of text: embedding, head, then a line a layer."""
        if self.unasked is not None:
            return [f"{QUESTION} not asked: {self.unasked}"]
        found = [f"{QUESTION} Mean KL, nats, with one part as stored and all else the checkpoint's", f"  {self.choice}"]
        if self.whole is not None:
            found.append(f"  all together {self.whole.mean_kl:.2e} (standard error {self.whole.standard_error:.0e})")
        ends = [part for part in self.parts if part.layer is None]
        if ends:
            found.append(f"  {', '.join(f'{part.role} {part.mean_kl:.2e}' for part in ends)}")
        found += [f"  {line}" for line in _layer_lines(self.parts)]
        return found


def _layer_lines(parts: Sequence[PartCost]) -> Iterator[str]:
    for layer in sorted({part.layer for part in parts if part.layer is not None}):
        own = [part for part in parts if part.layer == layer]
        words = [f"{part.role} {part.mean_kl:.2e}" for part in own if part.expert is None]
        single = ", ".join(f"{part.expert}: {part.mean_kl:.1e}" for part in own if part.expert is not None)
        yield f"layer {layer}: {', '.join(words)}" + (f" (expert {single})" if single else "")
