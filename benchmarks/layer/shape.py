"""The shape of the layer: the experts of phixtral-4x2_8 in int4."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

HIDDEN, WIDTH, EXPERTS, CHOSEN = 2560, 10240, 4, 2
MATRICES = {"fc1": (WIDTH, HIDDEN), "fc2": (HIDDEN, WIDTH)}  # rows, features
WEIGHTS = 2 * HIDDEN * WIDTH * CHOSEN  # number of weights that one row is multiplied by
PAIRS = ((3, 2), (0, 1))  # pairs of experts, the more probable first; calls alternate between the pairs

Rows = npt.NDArray[np.float32]


class Layer(Protocol):
    """The layer in one runtime, with weights in the runtime's format."""

    num_bytes: int  # bytes of the weights of the two chosen experts

    def run(self, rows: Rows, pair: tuple[int, int]) -> None:
        """Multiply float32 rows [T, H] with a pair of experts, in one call of the runtime."""

    def facts(self) -> str:
        """What the runtime reports about itself."""
