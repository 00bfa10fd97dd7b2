"""How far a model's logits are from the reference's over the same positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
_POSITIONS = 256  # compared at a time


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Mean KL divergence from the reference in nats, its standard error over positions, and the share of positions with
    the same most likely token."""

    kl: float
    kl_error: float
    top1: float


def distance(found: FloatArray, expected: FloatArray) -> Distance:
    """Compare logits [T, V] with the reference's."""
    divergences = []
    for start in range(0, len(expected), _POSITIONS):
        ours, theirs = (_logs(logits[start : start + _POSITIONS]) for logits in (found, expected))
        divergences.append((np.exp(theirs) * (theirs - ours)).sum(axis=-1))
    each = np.concatenate(divergences)
    return Distance(
        kl=float(each.mean()),
        kl_error=float(each.std() / np.sqrt(len(each))),
        top1=float((found.argmax(axis=-1) == expected.argmax(axis=-1)).mean()),
    )


def perplexity(logits: FloatArray, windows: list[list[int]]) -> float:
    """exp of the mean next-token loss of logits [T, V] over all windows."""
    losses, first = [], 0
    for window in windows:
        own = _logs(logits[first : first + len(window) - 1])
        losses.append(-own[np.arange(len(own)), window[1:]])
        first += len(window)
    return float(np.exp(np.concatenate(losses).mean()))


def _logs(logits: FloatArray) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    logs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs
