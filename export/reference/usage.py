"""Measures how a text's tokens use the experts: load, entropy of the routers, ties, and which experts go together.

    usage = measure_usage(model, windows)
    usage.layers[3].load                # (0.31, 0.02, ...): each expert's share of the layer's places, K a token

The reference computes the routers' logits. Only one layer's logits are held at a time: T*E values of 4 bytes, beside
what `export/reference/model.py` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.architecture import Architecture, Router
from export.errors import ConfigError, named
from export.families import Model
from export.reference.mixture import route
from export.reference.model import Reference, Windows
from export.reference.operations import FloatArray

# Two logits that differ by less than this give the two experts weights within 1 % of each other. Errors of quantised
# weights are as large: which of the two is chosen is then little more than chance.
NEAR_TIE = 0.01
_ROUNDS = 500  # of the fit in `independent_pairs`
_CLOSE = 1e-9  # its error, relative to the number of tokens

Counts = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LayerUsage:
    """How T tokens use the E experts of a layer, K of them each. The arrays have the checkpoint's order of experts.

    - `chosen`: [E], tokens that choose each expert; `weight_shares`: [E], shares of the sum of all weights.
    - `entropy`: the mean over tokens of the entropy, in nats, of the distribution that the router gives over all E
      experts. A sigmoid router's scores count divided by their sum.
    - `equal`: tokens whose K-th and K+1-th logits are equal; `near_ties`: tokens for which these differ by at most
      NEAR_TIE, the equal ones included. Both are 0 where K is E.
    - `together`: [E, E], tokens that choose both experts; `independent`: what `independent_pairs` gives for the loads.
    """

    layer: int
    num_tokens: int
    experts_per_token: int
    chosen: Counts
    weight_shares: Doubles
    entropy: float
    equal: int
    near_ties: int
    together: Counts
    independent: Doubles

    @property
    def load(self) -> Doubles:
        """Each expert's share of the layer's T*K places, [E]; they sum to 1."""
        return self.chosen / (self.num_tokens * self.experts_per_token)

    @property
    def relative_entropy(self) -> float:
        """The entropy as a share of that of equal chances, ln E."""
        return self.entropy / float(np.log(len(self.chosen))) if len(self.chosen) > 1 else 0.0

    def strongest_pair(self) -> tuple[int, int, float] | None:
        """The pair of experts that deviates most from independence, and its count over that of independence. The
        deviation is measured in standard deviations of a Poisson count, |n - m| / sqrt(m). None without pairs."""
        first, second = np.triu_indices(len(self.chosen), 1)
        expected = self.independent[first, second]
        found = self.together[first, second]
        likely = np.flatnonzero(expected >= 1)
        if not len(likely):
            return None
        place = likely[np.argmax(np.abs(found[likely] - expected[likely]) / np.sqrt(expected[likely]))]
        return int(first[place]), int(second[place]), float(found[place] / expected[place])

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "chosen": self.chosen.tolist(),
            "load": self.load.tolist(),
            "weight_shares": self.weight_shares.tolist(),
            "entropy": self.entropy,
            "relative_entropy": self.relative_entropy,
            "equal": self.equal,
            "near_ties": self.near_ties,
            "together": self.together.tolist(),
            "independent": self.independent.tolist(),
        }


@dataclass(frozen=True, kw_only=True)
class Usage:
    """The use of all layers that have experts, over `num_tokens` tokens in `num_windows` windows."""

    num_experts: int
    experts_per_token: int
    num_tokens: int
    num_windows: int
    layers: tuple[LayerUsage, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "num_experts": self.num_experts,
            "experts_per_token": self.experts_per_token,
            "num_tokens": self.num_tokens,
            "num_windows": self.num_windows,
            "near_tie": NEAR_TIE,
            "layers": [layer.to_json() for layer in self.layers],
        }


def require_mixture(facts: Architecture, name: str, doing: str) -> None:
    """Raise ConfigError for the dense model `name`; `doing` begins the message."""
    if not facts.is_moe:
        raise ConfigError(
            f"{doing}: {named(name)} is a dense {facts.family}: it has no experts, and no router that chooses among "
            "them; name a mixture"
        )


def measure_usage(model: Model, windows: Windows, progress: Callable[[str], None] = lambda _: None) -> Usage:
    """Route the windows' tokens by the reference and count. Raises ConfigError for a dense model, ExportError for a
    router that the reference does not compute, and CheckpointError as `Reference.run` does."""
    require_mixture(model.architecture, model.weights.checkpoint.identity, "measuring the use of experts")
    return usage_of(model.architecture, Reference(model).router_logits(windows, progress), windows)


def usage_of(facts: Architecture, router_logits: Iterable[FloatArray], windows: Windows) -> Usage:
    """The use of a model's experts by the router logits [T, E] of each layer that has experts, in order; T are the
    tokens of all windows."""
    layers = tuple(
        layer_usage(layer, logits, facts.router, facts.experts_per_token)
        for layer, logits in zip(facts.mixture_layers, router_logits, strict=True)
    )
    return Usage(
        num_experts=facts.num_experts,
        experts_per_token=facts.experts_per_token,
        num_tokens=sum(map(len, windows)),
        num_windows=len(windows),
        layers=layers,
    )


def layer_usage(layer: int, logits: FloatArray, router: Router, experts_per_token: int) -> LayerUsage:
    """The use of a layer's experts by the router's logits [T, E]."""
    num_tokens, num_experts = logits.shape
    chosen, weights = route(logits, router, experts_per_token)
    counts = np.bincount(chosen.ravel(), minlength=num_experts)
    mass = np.bincount(chosen.ravel(), weights=weights.ravel(), minlength=num_experts)
    taken = np.zeros((num_tokens, num_experts), dtype=np.float32)
    np.put_along_axis(taken, chosen, np.float32(1), axis=-1)
    together = np.rint(taken.T @ taken).astype(np.int64)  # exact: whole numbers below 2^24
    np.fill_diagonal(together, 0)
    gap = np.full(num_tokens, np.inf)
    if experts_per_token < num_experts:
        ordered = -np.sort(-logits, axis=-1)
        gap = ordered[:, experts_per_token - 1] - ordered[:, experts_per_token]
    return LayerUsage(
        layer=layer,
        num_tokens=num_tokens,
        experts_per_token=experts_per_token,
        chosen=counts,
        weight_shares=mass / mass.sum(),
        entropy=float(_entropy(logits, router).mean()),
        equal=int((gap == 0).sum()),
        near_ties=int((gap <= NEAR_TIE).sum()),
        together=together,
        independent=independent_pairs(counts, experts_per_token, num_tokens),
    )


def _entropy(logits: FloatArray, router: Router) -> Doubles:
    """The entropy in nats, [T], of what a router gives over all experts for logits [T, E]."""
    wide = logits.astype(np.float64)
    if router.score == "sigmoid":
        scores = 1 / (1 + np.exp(-wide))
        shares = scores / scores.sum(axis=-1, keepdims=True)
    else:
        wide -= wide.max(axis=-1, keepdims=True)
        shares = np.exp(wide)
        shares /= shares.sum(axis=-1, keepdims=True)
    terms = shares * np.log(np.where(shares > 0, shares, 1.0))
    found: Doubles = -terms.sum(axis=-1)
    return found


def independent_pairs(chosen: Counts, experts_per_token: int, num_tokens: int) -> Doubles:
    """The tokens [E, E] that would choose both of two experts if the loads `chosen` [E] alone decided.

    A token chooses no expert twice, so the product of two loads over T is too large. The model is that of
    quasi-independence: m_ij = a_i * a_j for i != j and 0 on the diagonal, with the row sums n_i * (K - 1) that were
    counted. The a_i are found by iterative proportional fitting. Source: Goodman, The Analysis of Cross-Classified
    Data: Independence, Quasi-Independence, 1968.
    """
    wanted = chosen.astype(np.float64) * (experts_per_token - 1)
    if not wanted.any():
        return np.zeros((len(chosen), len(chosen)))
    factors = np.sqrt(wanted)
    for _ in range(_ROUNDS):
        sums = factors * (factors.sum() - factors)
        if np.abs(sums - wanted).max() <= _CLOSE * num_tokens:
            break
        factors = factors * np.sqrt(np.divide(wanted, sums, out=np.zeros_like(sums), where=sums > 0))
    pairs: Doubles = factors[:, None] * factors[None, :]
    np.fill_diagonal(pairs, 0.0)
    return pairs
