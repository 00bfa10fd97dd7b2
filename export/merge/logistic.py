"""Multinomial logistic regression with soft targets, by L-BFGS: rows of a gate from the inputs of a router.

The loss of rows W [E, H] over T inputs x and targets p [T, E] is

    mean over t of -sum over e of p[t, e] * log softmax(W x[t])[e]  +  penalty / 2 * |W|^2

where x is scaled to a mean square of 1, so that one penalty fits every layer. It is convex, the rows begin at zero, and
nothing is random: the same inputs give the same rows. Source: Nocedal and Wright, Numerical Optimization, 2006, section
7.2, with the step halved until the loss falls by Armijo's rule (3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_KEPT_STEPS = 10  # of which L-BFGS makes its estimate of the curvature
_ENOUGH = 1e-6  # a step that lowers the loss by less ends the fit
_SUFFICIENT = 1e-4  # Armijo's constant
_SMALLEST_STEP = 2.0**-30

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The rows that were fitted, float32 [E, H], the loss there without the penalty, and the number of steps."""

    rows: npt.NDArray[np.float32]
    loss: float
    steps: int


def fit_rows(inputs: npt.NDArray[np.float32], targets: Doubles, *, penalty: float, most_steps: int) -> Fit:
    """Fit rows to inputs [T, H] and targets [T, E], whose rows sum to 1, in at most `most_steps` steps.

    Holds, in values of 8 bytes, 3*T*E + 25*E*H, and a float32 copy of the inputs.
    """
    scale = float(np.sqrt(np.mean(np.square(inputs), dtype=np.float64))) or 1.0
    x = inputs / np.float32(scale)

    def loss_of(rows: Doubles) -> tuple[float, Doubles, float]:
        logits = (x @ rows.T.astype(np.float32)).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        own = -float((targets * logits).sum()) / len(x)
        errors = ((np.exp(logits) - targets) / len(x)).astype(np.float32)
        gradient = (errors.T @ x).astype(np.float64) + penalty * rows
        return own + penalty / 2 * float((rows**2).sum()), gradient, own

    rows, loss, steps = _minimise(loss_of, np.zeros((targets.shape[1], x.shape[1])), most_steps)
    return Fit(rows=(rows / scale).astype(np.float32), loss=loss, steps=steps)


def _minimise(
    loss_of: Callable[[Doubles], tuple[float, Doubles, float]], rows: Doubles, most_steps: int
) -> tuple[Doubles, float, int]:
    """The rows at which the first value of `loss_of` is smallest, its third value there, and the number of steps."""
    value, gradient, own = loss_of(rows)
    memory: list[tuple[Doubles, Doubles, float]] = []
    for step in range(most_steps):
        direction = _direction(gradient, memory)
        slope = float((direction * gradient).sum())
        length = 1.0
        while length >= _SMALLEST_STEP:
            found, at, own_there = loss_of(rows + length * direction)
            if found <= value + _SUFFICIENT * length * slope:
                break
            length /= 2
        else:
            return rows, own, step
        moved, turned = length * direction, at - gradient
        curvature = float((moved * turned).sum())
        if curvature > 0:
            memory = [*memory, (moved, turned, 1 / curvature)][-_KEPT_STEPS:]
        gained, rows, value, gradient, own = value - found, rows + moved, found, at, own_there
        if gained < _ENOUGH:
            return rows, own, step + 1
    return rows, own, most_steps


def _direction(gradient: Doubles, memory: list[tuple[Doubles, Doubles, float]]) -> Doubles:
    """L-BFGS' two loops: minus the inverse curvature times the gradient."""
    direction = gradient.copy()
    factors = []
    for moved, turned, inverse in reversed(memory):
        factors.append(inverse * float((moved * direction).sum()))
        direction -= factors[-1] * turned
    if memory:
        _, turned, inverse = memory[-1]
        direction /= inverse * float((turned * turned).sum())
    for (moved, turned, inverse), factor in zip(memory, reversed(factors), strict=True):
        direction += (factor - inverse * float((turned * direction).sum())) * moved
    return -direction
