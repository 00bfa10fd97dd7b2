"""KL divergences from logits that arrive in slices of the vocabulary, so that no whole row of them is held."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


class StreamedDivergence:
    """KL(p || q) = sum p * (log p - log q) of V distributions q from one distribution p, for T positions each, in nats.

    With logits a of p and b of q it is sum e^a (a - b) / Z_a - log Z_a + log Z_b, where Z_a = sum e^a. Each sum is kept
    relative to the largest logit so far. Differences and sums are float64, since the terms are large beside the result.
    """

    def __init__(self, num_variants: int, num_positions: int) -> None:
        self._largest = np.full((1 + num_variants, num_positions), -np.inf)  # of p, then of every q
        self._sums = np.zeros((1 + num_variants, num_positions))
        self._products = np.zeros((num_variants, num_positions))  # sum of e^(a - largest a) * (a - b)

    def add(self, logits: npt.NDArray[np.float32]) -> None:
        """Add the logits [1 + V, T, n] of n tokens of the vocabulary, those of p first."""
        expected = logits[0].astype(np.float64)
        weights, rescaled = self._add(0, expected)
        self._products *= rescaled
        for row in range(1, len(logits)):
            found = logits[row].astype(np.float64)
            self._add(row, found)
            self._products[row - 1] += np.einsum("tn,tn->t", weights, expected - found)

    def _add(self, row: int, logits: Doubles) -> tuple[Doubles, Doubles]:
        """Add logits [T, n] to one distribution's sum. Returns e^(logits - largest), and the factor [T] by which
        earlier sums became smaller."""
        largest = np.maximum(self._largest[row], logits.max(axis=-1))
        factor = np.exp(self._largest[row] - largest)
        weights = np.exp(logits - largest[:, None])
        self._sums[row] = self._sums[row] * factor + weights.sum(axis=-1)
        self._largest[row] = largest
        return weights, factor

    def result(self) -> Doubles:
        """The divergences [V, T] of the slices so far."""
        logs = self._largest + np.log(self._sums)
        divergences: Doubles = self._products / self._sums[0] - logs[0] + logs[1:]
        return divergences
