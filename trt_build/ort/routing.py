"""Which experts the tokens of a step choose, by the logits of the routers.

routing = session.routing                                # None: no step gives router logits
room = routing.room(num_tokens=130)
session.step(cache, rows, room)
counts = routing.count_chosen(room)                      # [M, E]: tokens that chose each expert
experts, weights = routing.chosen(room)                  # [T, M, K] each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from export.architecture import Router
from export.reference.mixture import route
from export.routing import below_the_kept

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The routers of an engine: M layers with E experts."""

    layers: tuple[int, ...]  # numbers of the layers that have experts
    expert_order: tuple[int, ...]  # of engine.json: the expert at each place of a router's logits
    experts_per_token: int  # K
    dropped: tuple[tuple[int, ...], ...] = field(default=())  # of each router, the experts that the engine lacks
    router: Router = field(default_factory=Router)  # the rule of all of them

    def room(self, num_tokens: int) -> Floats:
        """Room for the router logits of a step, [M, T, E], with whatever is in the memory."""
        return np.empty((len(self.layers), num_tokens, len(self.expert_order)), dtype=np.float32)

    def count_chosen(self, router_logits: Floats) -> npt.NDArray[np.int64]:
        """How many tokens chose each expert, [M, E] in the checkpoint's order, from router logits [M, T, E] in the
        engine's. A token chooses the experts with the K largest logits; of equal logits, those with the lowest
        index."""
        logits = self.in_checkpoint_order(router_logits)
        chosen = np.argsort(-logits, axis=-1, kind="stable")[..., : self.experts_per_token]
        num_routers, _, num_experts = logits.shape
        numbered = chosen + num_experts * np.arange(num_routers)[:, None, None]
        return np.bincount(numbered.ravel(), minlength=num_routers * num_experts).reshape(num_routers, num_experts)

    def chosen(self, router_logits: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
        """The experts that each token chose, in the checkpoint's numbers and the heaviest first, and their weights:
        [T, M, K] each, from router logits [M, T, E] in the engine's order."""
        num_routers, num_tokens, num_experts = router_logits.shape
        logits = self.in_checkpoint_order(router_logits).transpose(1, 0, 2).reshape(-1, num_experts)
        experts, weights = route(logits, self.router, self.experts_per_token)
        shape = (num_tokens, num_routers, self.experts_per_token)
        return experts.reshape(shape), weights.reshape(shape)

    def in_checkpoint_order(self, router_logits: Floats) -> Floats:
        """`in_checkpoint_order` for this engine."""
        return in_checkpoint_order(router_logits, self.expert_order, self.dropped)


def in_checkpoint_order(
    router_logits: Floats, expert_order: Sequence[int], dropped: Sequence[Sequence[int]] = ()
) -> Floats:
    """Router logits [M, T, E] with the experts in the checkpoint's order. `expert_order` has the engine's order, as
    engine.json does. Logits of experts that were `dropped` from a router (empty: none from any) lie below the others'
    there, since the engine routes without them."""
    ordered = router_logits[..., np.argsort(expert_order)]
    if not any(dropped):
        return ordered
    return np.stack([below_the_kept(*both) for both in zip(ordered, dropped, strict=True)])
