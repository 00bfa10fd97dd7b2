"""What a model loses without some of its experts: the reference without them against the reference of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from export.families import Model
from export.reference.model import Reference
from export.reference.remaining import RemainingReference
from trt_build.comparison.evaluation_text import EvaluationText
from trt_build.comparison.parity import FloatArray, WindowSums, measure


class _Reference(Protocol):
    def run(
        self, windows: Sequence[Sequence[int]], progress: Callable[[str], None]
    ) -> Iterator[tuple[FloatArray, FloatArray | None]]: ...


@dataclass(frozen=True, kw_only=True)
class DroppingPrice:
    """The model without the dropped experts against the whole, both in float32, over `num_tokens` tokens of a text."""

    text: tuple[str, ...]  # its names
    sha256: str
    num_tokens: int
    mean_kl: float  # nats
    top1_agreement: float
    perplexity_increase: float

    @property
    def words(self) -> str:
        return (
            f"KL {self.mean_kl:.2g} nats, top-1 {self.top1_agreement:.1%}, perplexity {self.perplexity_increase:+.2%} "
            f"over {self.num_tokens} tokens of {', '.join(self.text)}"
        )


class PricedReference:
    """The reference of a model without some experts, layer -> experts. While it runs it is compared with the whole
    model's, `whole`."""

    def __init__(self, model: Model, dropped: Mapping[int, Sequence[int]], whole: _Reference) -> None:
        self._whole = whole
        self._remaining = RemainingReference(Reference(model), model.architecture.mixture_layers, dropped)
        self._sums: list[WindowSums] = []

    def run(
        self, windows: Sequence[Sequence[int]], progress: Callable[[str], None]
    ) -> Iterator[tuple[FloatArray, FloatArray | None]]:
        """Yield for each window of S token ids the logits [S, V] and router logits [M, S, E] without the experts."""
        both = zip(windows, self._remaining.run(windows, progress), self._whole.run(windows, progress), strict=True)
        for window, (logits, routed), (expected, _) in both:
            self._sums.append(measure(logits, expected, window))
            del expected
            yield logits, routed

    def price(self, text: EvaluationText) -> DroppingPrice:
        """The price over the windows that were run, of `text`. Rounded, so that engine.json has the same figures
        wherever the last bits of a sum differ."""
        kl = np.concatenate([one.kl for one in self._sums])
        same = np.concatenate([one.same_top1 for one in self._sums])
        lost = sum(one.engine_loss - one.reference_loss for one in self._sums)
        return DroppingPrice(
            text=text.names,
            sha256=text.sha256,
            num_tokens=len(kl),
            mean_kl=float(f"{max(0.0, kl.mean()):.4g}"),
            top1_agreement=round(float(same.mean()), 5),
            perplexity_increase=round(float(np.exp(lost / (len(kl) - len(self._sums))) - 1), 5),
        )


def price_of(
    model: Model,
    dropped: Mapping[int, Sequence[int]],
    windows: Sequence[Sequence[int]],
    text: EvaluationText,
    progress: Callable[[str], None] = lambda _: None,
) -> DroppingPrice:
    """The price of dropping experts, layer -> experts, over windows of a text."""
    priced = PricedReference(model, dropped, Reference(model))
    for _ in priced.run(windows, progress):
        pass
    return priced.price(text)
