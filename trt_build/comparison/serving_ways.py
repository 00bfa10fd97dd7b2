"""The answer to the question whether what is served is what was scored, and the limits that it is judged by.

Differences are relative to the largest |logit| of the window that a position belongs to. Both graphs read the same
weights, so the quantiser's error cancels, and what is left is the order of summation. Measured on both trained examples
with the kernels of moeship and of ONNX Runtime, sixteen windows of 512 tokens, half of them of the held-out text and
half of Python: the largest difference of all, and the largest mean of a way.

precision  largest  mean     reason of the limits
fp32       1.6e-6   5.3e-7   three and four times what was measured
fp16       9.5e-4   4.6e-4   every graph for CUDA, whose activations are float16 at any precision, through the CPU's
                             kernels: 132 engines of both families, 20 seeds and the trained examples. The mean allowed
                             is four times the worst. A GPU's kernels sum in another order, which was not measured: a
                             graph differs from exact arithmetic by 1.5e-3 of the largest logit at most, and two orders
                             from each other by at most twice that
int8       7.0e-3   2.7e-3   activations are rounded to 8 bits, so that a last bit which differs can move one by a step.
                             The mean allowed is twice the worst. The largest allowed, a tenth, leaves room for a token
                             whose router logits are nearly equal, where the two graphs choose other experts
int4       3.3e-2   4.8e-3   the same

Attention scaled by 1.03 in the serving graph alone has a mean of 8e-3 at fp32 and 1.1e-2 at int8 and int4, which is
hardly more than rounded activations make. So quantised engines for the CPU are compared once more with float32
activations in both graphs. The limit of 1e-4 is that of the question about the scoring graph; measured: 3.5e-7 at most,
and 8e-3 for attention scaled by 1.03. ci/engine_faults.py measures sound engines of random weights, and faults.

Where router logits are nearly equal, the two graphs may choose other experts, and the token's logits differ by any
amount: by 0.32 in one of 200 sound engines. Such positions are counted and not judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_build.comparison.answers import behind_routers, first_layer, first_part


@dataclass(frozen=True, kw_only=True)
class ServingLimits:
    """The largest allowed differences of the serving graph from the scoring graph, relative to the largest logit."""

    largest: float  # of any logit
    mean: float  # mean over positions of the largest difference of a position


SERVING_LIMITS: Mapping[str, ServingLimits] = {
    "fp32": ServingLimits(largest=5e-6, mean=2e-6),
    "fp16": ServingLimits(largest=0.05, mean=2e-3),
    "int8": ServingLimits(largest=0.1, mean=6e-3),
    "int4": ServingLimits(largest=0.1, mean=0.01),
    # Activations are rounded alike at every number of bits.
    **dict.fromkeys(("int2", "q2", "q3", "q4", "q5", "q6"), ServingLimits(largest=0.1, mean=0.01)),
    **dict.fromkeys(("2 bits", "3 bits", "4 bits", "5 bits", "6 bits"), ServingLimits(largest=0.1, mean=0.01)),
    **dict.fromkeys(("q8", "8 bits"), ServingLimits(largest=0.1, mean=6e-3)),
}


# Router logits that differ by this part of the largest are nearly equal: activations rounded to 8 bits move them by
# about a hundredth, and the order of summation by 1e-6.
NEAR_ROUNDED, NEAR_PRECISE = 0.03, 1e-4
MOST_TIES = 0.1  # part of the positions of a way that may be near ties
FLOAT32_LIMITS = ServingLimits(largest=0.1, mean=1e-4)


def serving_limits(precision: str, provider: str) -> ServingLimits:
    """The limits of an engine of ONNX Runtime. Graphs for CUDA have float16 activations at every precision, and round
    none to 8 bits."""
    return SERVING_LIMITS[precision if provider == "cpu" else "fp16"]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run the serving graph: the largest difference of each compared position [P], relative to the largest
    logit of its window, and a name for each position. `ties` [P]: the positions at which the two graphs chose other
    experts whose router logits are nearly equal; they are not judged, unless they are more than MOST_TIES of all.
    `exact`: with float32 activations, in both graphs.

    `routers` [M, P]: how far the router logits of each of `layers` differ at each position, relative to the layer's
    largest; a router differs where that is more than `near`. None if the steps give no router logits.

    `parts` [K, P]: how far the parts of layers called `part_names` differ, with float32 activations in both graphs,
    relative to the largest of a part; a part differs where that is more than `part_limit`. They are looked at where a
    way fails and say more than routers (None: they were not). `unseen`: why nothing can be said of layers."""

    name: str
    differences: npt.NDArray[np.float64]
    places: tuple[str, ...]
    ties: npt.NDArray[np.bool_] | None = None
    exact: bool = False
    routers: npt.NDArray[np.float64] | None = None
    layers: tuple[int, ...] = ()
    near: float = 0.0
    parts: npt.NDArray[np.float64] | None = None
    part_names: tuple[str, ...] = ()
    part_limit: float = 0.0
    unseen: str | None = None

    @property
    def judged(self) -> npt.NDArray[np.bool_]:
        """The positions that are judged, [P]."""
        if self.ties is None or self.ties.mean() > MOST_TIES:
            return np.ones(len(self.differences), dtype=np.bool_)
        return ~self.ties

    @property
    def largest(self) -> float:
        return float(self.differences[self.judged].max(initial=0.0))

    @property
    def mean(self) -> float:
        """The mean over the positions that are judged."""
        judged = self.differences[self.judged]
        return float(judged.mean()) if len(judged) else 0.0

    def limits(self, served: ServingLimits) -> ServingLimits:
        """The limits of this way; `served` are those of the engine's precision."""
        return FLOAT32_LIMITS if self.exact else served

    def begins_at(self, limits: ServingLimits) -> int | None:
        """The position that a failure looks for its beginning at: the first past the limit of any, or the worst where
        the mean is past its own. None if no limit is missed. NaN misses each."""
        wrong = np.flatnonzero(~(self.differences <= limits.largest) & self.judged)
        if len(wrong):
            return int(wrong[0])
        return None if self.mean <= limits.mean else int(np.argmax(np.where(self.judged, self.differences, 0.0)))

    def failure(self, limits: ServingLimits) -> str | None:
        """A sentence if a limit is missed: which way, where, found and allowed, and the layer where it begins."""
        position = self.begins_at(limits)
        if position is None:
            return None
        wrong = np.flatnonzero(~(self.differences <= limits.largest) & self.judged)
        if len(wrong):
            worst = int(wrong[np.argmax(np.nan_to_num(self.differences[wrong], nan=np.inf))])
            return (
                f"served in {self.name}, {len(wrong)} of {len(self.places)} positions differ from the scoring graph, "
                f"first {self.places[position]}; the largest difference is {self.differences[worst]:.1e} of the "
                f"largest logit, allowed {limits.largest:.1e}{self._begin(position)}"
            )
        return (
            f"served in {self.name}, positions differ from the scoring graph by {self.mean:.1e} of the largest logit "
            f"on average, allowed {limits.mean:.1e}{self._begin(position)}"
        )

    def _begin(self, position: int) -> str:
        """Where in the model the difference at one of the positions begins, as the end of a sentence."""
        if self.parts is not None and self.part_names:
            differences = self.parts[:, position].tolist()
            rounded = self.near > NEAR_PRECISE
            part = first_part(self.part_names, differences, self.part_limit, rounded=rounded)
            return f"; at {self.places[position]} {part}"
        if self.routers is None or not self.layers:
            return "" if self.unseen is None else f"; {self.unseen}"
        where = first_layer(self.layers, self.routers[:, position].tolist(), self.near)
        if where is None:
            # Rounded activations hide what is less, so nothing follows from routers that are as they should be.
            precise = self.near <= NEAR_PRECISE
            where = (
                f"the logits differ, and {behind_routers(self.layers)}"
                if precise
                else f"no router logits differ by more than {self.near:.0e} of the largest"
            )
        return f"; at {self.places[position]} {where}"


def ways_to_json(ways: Sequence[Way]) -> dict[str, Any]:
    """For each way the number of compared positions, the largest and the mean difference, how many positions were near
    ties, and whether the way is exact."""
    return {
        way.name: {
            "positions": len(way.places), "largest": way.largest, "mean": way.mean,
            "near_ties": len(way.places) - int(way.judged.sum()), "exact": way.exact,
        }
        for way in ways
    }  # fmt: skip
