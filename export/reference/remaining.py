"""The reference of a mixture without some of its experts: each token is routed among those that remain.

    remaining = RemainingReference(Reference(model), model.architecture.mixture_layers, {3: (0, 5)})
    for logits, router_logits in remaining.run(windows): ...

The router's logits are those of the whole model; of the remaining experts the K with the largest logits are chosen, and
their weights are the softmax over these K. That is what transformers computes for a model whose gates and experts lack
those rows. It holds for routers whose weights depend on the chosen experts' logits alone
(`export.architecture.Router.reads_chosen_logits_alone`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from export.reference.model import Choose, Observe, Reference, Windows
from export.reference.operations import FloatArray
from export.routing import below_the_kept


class RemainingReference:
    """A reference without some experts. `layers` are the numbers of the layers that have experts; `dropped`: number of
    a layer -> the experts that it lacks."""

    def __init__(self, reference: Reference, layers: Sequence[int], dropped: Mapping[int, Sequence[int]]) -> None:
        self._reference = reference
        self._dropped = [tuple(dropped.get(layer, ())) for layer in layers]

    def run(
        self, windows: Windows, progress: Callable[[str], None] = lambda _: None, choose: Choose | None = None
    ) -> Iterator[tuple[FloatArray, FloatArray | None]]:
        """As `Reference.run`; the router logits of experts that are lacking lie below those of the others."""
        for logits, routed in self._reference.run(windows, progress, choose, self._adjust):
            assert routed is not None  # a mixture has routers
            yield logits, np.stack([below_the_kept(*both) for both in zip(routed, self._dropped, strict=True)])

    def observe(
        self,
        windows: Windows,
        observe: Observe,
        progress: Callable[[str], None] = lambda _: None,
        choose: Choose | None = None,
    ) -> Iterator[int]:
        """As `Reference.observe`."""
        return self._reference.observe(windows, observe, progress, choose, self._adjust)

    def _adjust(self, mixture: int, _x: FloatArray, logits: FloatArray) -> FloatArray:
        return below_the_kept(logits, self._dropped[mixture])
