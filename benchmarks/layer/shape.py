"""The layer: a phixtral-4x2_8's experts, int4."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

HIDDEN, WIDTH, EXPERTS, CHOSEN = 2560, 10240, 4, 2
MATRICES = {"fc1": (WIDTH, HIDDEN), "fc2": (HIDDEN, WIDTH)}  # rows, features
WEIGHTS = 2 * HIDDEN * WIDTH * CHOSEN  # that one row is multiplied by
PAIRS = ((3, 2), (0, 1))  # experts, the more probable first; calls take them in turn

Rows = npt.NDArray[np.float32]


class Layer(Protocol):
    """One runtime's layer on weights of its own."""

    num_bytes: int  # of the two chosen experts' weights

    def run(self, rows: Rows, pair: tuple[int, int]) -> None:
        """Multiply float32 rows [T, H] with a pair of experts, in one call of the runtime."""

    def facts(self) -> str:
        """What the runtime says of itself."""
