"""The questions about an engine's logits.

Second question: does the graph compute what the codes say? An engine's logits are compared with the streamed reference
on the dequantised weights of its rank files, so the quantiser's error is on both sides. An engine shows neither hidden
states nor router logits, so a failure cannot name a layer; the first question does that for the weights.

Third question: what did the quantiser cost? The reference on the dequantised weights against the reference on the
checkpoint's own.

Fourth question: is what is served what was scored? Logits of tokens that the engine generated one by one, through its
cache, against the logits that it gives when the same tokens are a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_build.comparison.answers import Answer
from trt_build.comparison.parity import Thresholds, WindowSums, combine, near_ties
from trt_build.comparison.read_back import FloatArray
from trt_build.comparison.serving_ways import ServingLimits, Way

OF_LOGITS = "Does the graph compute what the codes say?"
OF_COST = "What did the quantiser cost?"
LOGITS_TOKENS = 256  # tokens of the text for the second question


@dataclass(frozen=True, kw_only=True)
class LogitsLimits:
    """The largest allowed differences from the reference on the same weights, each relative to the largest logit."""

    largest: float  # of a position at which no router logits are nearly equal
    mean: float  # mean over positions of the largest difference of a position


# float32 differs by the order of summation, as in an engine of ONNX Runtime. The others were measured through the
# stand-in of tests/trtllm, which rounds what operations hand on to the dtype and sums in float32 (docs/quality.md has
# the figures). A GPU's attention may sum in float16 where the stand-in does not, which was not measured, hence three
# times the mean and ten times the largest; bfloat16 has three bits less than float16.
LOGITS_LIMITS: Mapping[str, LogitsLimits] = {
    "float32": LogitsLimits(largest=1e-4, mean=1e-4),
    "float16": LogitsLimits(largest=1e-2, mean=2e-3),
    "bfloat16": LogitsLimits(largest=8e-2, mean=1.6e-2),
}
# Of two computations that both keep the limits above, the mean difference is at most twice theirs. The largest leaves
# room for a position at which the two choose other experts.
GENERATION_LIMITS: Mapping[str, ServingLimits] = {
    "float32": ServingLimits(largest=1e-4, mean=1e-4),
    "float16": ServingLimits(largest=0.05, mean=2e-3),
    "bfloat16": ServingLimits(largest=0.2, mean=1.6e-2),
}


def ask_about_logits(
    found: FloatArray, expected: FloatArray, routers: FloatArray | None, experts_per_token: int, dtype: str
) -> Answer:
    """Compare an engine's logits [S, V] with the reference on its rank files, whose router logits are [M, S, E] (None
    for a dense model). A position is a near tie from the first layer on in which rounding may choose another expert;
    such positions count for the mean alone."""
    limits = LOGITS_LIMITS[dtype]
    scale = float(np.abs(expected).max())
    differences = np.abs(found.astype(np.float64) - expected).max(axis=-1) / scale
    near = near_ties(routers, experts_per_token, limits.mean, len(found))
    clear = differences[~near]
    largest, mean = float(clear.max()) if len(clear) else 0.0, float(differences.mean())
    figures: dict[str, Any] = {
        "num_tokens": len(found), "allowed": limits.largest, "logits": largest, "near_ties": int(near.sum()),
        "mean": mean, "allowed_mean": limits.mean,
    }  # fmt: skip
    failures = []
    if not largest <= limits.largest:
        place = int(np.flatnonzero(~near & ~(differences <= limits.largest))[0])
        failures.append(
            f"the logits differ, first at position {place}: found {largest:.2e} of the largest, allowed "
            f"{limits.largest:.0e}; {_NO_LAYER}"
        )
    if not mean <= limits.mean:
        failures.append(
            f"the logits differ by {mean:.2e} of the largest on average, allowed {limits.mean:.0e}; {_NO_LAYER}"
        )
    return Answer(question=OF_LOGITS, figures=figures, failures=tuple(failures))


_NO_LAYER = "an engine of TensorRT-LLM shows no layer, so the network or its build is to be looked at"


def ask_about_cost(sums: Sequence[WindowSums], limits: Thresholds) -> Answer:
    """The figures of the reference on the dequantised weights (as the engine) against that on the checkpoint's."""
    report = combine(sums, sums[0])
    keys = (
        "mean_kl", "p99_kl", "max_kl", "top1_agreement", "near_ties", "clear_top1_agreement", "reference_perplexity",
        "engine_perplexity", "routing_agreement",
    )  # fmt: skip
    figures = {key: value for key, value in dataclasses.asdict(report).items() if key in keys}
    figures = {**figures, "perplexity_increase": report.perplexity_increase, "num_tokens": report.num_tokens}
    # A comparison of two references has no cache.
    failures = tuple(text for text in report.failures(limits) if "decoded" not in text)
    return Answer(question=OF_COST, figures=figures, failures=failures)


def ask_about_generation(
    decoded: FloatArray, context: FloatArray, first: int, near: npt.NDArray[np.bool_] | None = None
) -> Way:
    """Compare the logits [n, V] of generated tokens with those of the same tokens as a prompt; `first` is the position
    of the first of them, and `near` says which are near ties (None: none)."""
    scale = float(np.abs(context).max())
    differences = np.abs(decoded.astype(np.float64) - context).max(axis=-1) / scale
    places = tuple(f"position {first + step}" for step in range(len(decoded)))
    return Way(name="generation", differences=differences, places=places, ties=near)
