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
LOGITS_TOKENS = 256  # tokens of each window for the second question


@dataclass(frozen=True, kw_only=True)
class LogitsLimits:
    """The largest allowed differences from the reference on the same weights, each relative to the largest logit.

    `near`: router logits that differ by this part of a layer's largest are nearly equal, since rounding moves them so
    far. There either choice of experts is right, and what follows attends to the position that chose otherwise.
    """

    largest: float  # of any position
    mean: float  # mean over positions of the largest difference of a position
    near: float


# float32 differs by the order of summation, as in an engine of ONNX Runtime. The others were measured through the
# stand-in of tests/trtllm, which rounds what operations hand on to the dtype and sums in float32 (docs/quality.md has
# the figures). A GPU's attention may sum in float16 where the stand-in does not, which was not measured, hence three
# times the mean and ten times the largest; bfloat16 has three bits less than float16.
LOGITS_LIMITS: Mapping[str, LogitsLimits] = {
    "float32": LogitsLimits(largest=1e-4, mean=1e-4, near=1e-4),
    "float16": LogitsLimits(largest=1e-2, mean=2e-3, near=1e-3),
    "bfloat16": LogitsLimits(largest=8e-2, mean=1.6e-2, near=8e-3),
}
# Of two computations that both keep the limits above, the mean difference is at most twice theirs. The largest leaves
# room for a position at which the two choose other experts.
GENERATION_LIMITS: Mapping[str, ServingLimits] = {
    "float32": ServingLimits(largest=1e-4, mean=1e-4),
    "float16": ServingLimits(largest=0.05, mean=2e-3),
    "bfloat16": ServingLimits(largest=0.2, mean=1.6e-2),
}


def judged_differences(
    found: FloatArray, expected: FloatArray, routers: FloatArray | None, experts_per_token: int, dtype: str
) -> npt.NDArray[np.float64]:
    """The differences of an engine's logits [S, V] from the reference on its rank files, whose router logits are [M, S,
    E] (None for a dense model): of the positions before the first near tie that differs by more than the mean
    allowed."""
    limits = LOGITS_LIMITS[dtype]
    differences = np.abs(found.astype(np.float64) - expected).max(axis=-1) / np.abs(expected).max()
    other = near_ties(routers, experts_per_token, limits.near, len(found)) & (differences > limits.mean)
    judged: npt.NDArray[np.float64] = differences[: int(other.argmax()) if other.any() else len(found)]
    return judged


def ask_about_logits(windows: Sequence[npt.NDArray[np.float64]], num_tokens: int, dtype: str) -> Answer:
    """The answer from the `judged_differences` of windows that have `num_tokens` together."""
    limits, judged = LOGITS_LIMITS[dtype], np.concatenate(windows)
    if not len(judged):
        return Answer(question=OF_LOGITS, unasked="each window begins with a near tie; take more --tokens")
    largest, mean = float(judged.max()), float(judged.mean())
    figures: dict[str, Any] = {
        "num_tokens": len(judged), "allowed": limits.largest, "logits": largest, "mean": mean,
        "allowed_mean": limits.mean, "behind_near_ties": num_tokens - len(judged),
    }  # fmt: skip
    failures = []
    if not largest <= limits.largest:
        index = next(index for index, found in enumerate(windows) if not (found <= limits.largest).all())
        place = int(np.flatnonzero(~(windows[index] <= limits.largest))[0])
        failures.append(
            f"the logits differ, first at position {place} of window {index + 1}: found {largest:.2e} of the largest, "
            f"allowed {limits.largest:.0e}; {_NO_LAYER}"
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
    return Way(name="generation", differences=differences, places=places, ties=near, unseen=_NO_LAYER)
