"""Which experts the tokens of a step choose, by the logits of the routers.

routing = session.routing                                # None: no step gives router logits
room = routing.room(num_tokens=130)
session.step(cache, rows, room)
counts = routing.count_chosen(room)                      # [M, E]: tokens that chose each expert
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The routers of an engine: M layers with E experts."""

    layers: tuple[int, ...]  # numbers of the layers that have experts
    expert_order: tuple[int, ...]  # of engine.json: the expert at each place of a router's logits
    experts_per_token: int  # K

    def room(self, num_tokens: int) -> Floats:
        """Room for the router logits of a step, [M, T, E], with whatever is in the memory."""
        return np.empty((len(self.layers), num_tokens, len(self.expert_order)), dtype=np.float32)

    def count_chosen(self, router_logits: Floats) -> npt.NDArray[np.int64]:
        """How many tokens chose each expert, [M, E] in the checkpoint's order, from router logits [M, T, E] in the
        engine's. A token chooses the experts with the K largest logits; of equal logits, those with the lowest
        index."""
        logits = in_checkpoint_order(router_logits, self.expert_order)
        chosen = np.argsort(-logits, axis=-1, kind="stable")[..., : self.experts_per_token]
        num_routers, _, num_experts = logits.shape
        numbered = chosen + num_experts * np.arange(num_routers)[:, None, None]
        return np.bincount(numbered.ravel(), minlength=num_routers * num_experts).reshape(num_routers, num_experts)


def in_checkpoint_order(router_logits: Floats, expert_order: Sequence[int]) -> Floats:
    """Router logits [..., E] with the experts in the checkpoint's order. `expert_order` has the engine's order, as
    engine.json does."""
    return router_logits[..., np.argsort(expert_order)]
