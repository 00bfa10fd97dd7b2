"""The figures of a comparison of an engine with its reference: logits, KL divergence, top-1, perplexity and routing.

Each figure has a threshold by precision. Each backend computes the logits of its engines itself, in its `verify.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trt_build.comparison.answers import Answer
from trt_build.comparison.cost import Cost
from trt_build.comparison.evaluation_text import EvaluationText
from trt_build.comparison.serving_ways import Way, ways_to_json

if TYPE_CHECKING:
    from trt_build.comparison.cost.dropping import DroppingPrice

FloatArray = npt.NDArray[np.float32]

WINDOW_TOKENS = 512
SLICE_TOKENS = 256  # positions compared at a time: a limit on the size of the float64 copies of logits
MIN_TOKENS = 4
# Sound int8 and int4 engines of both trained examples, over 4,096 tokens of the held-out text: of windows of 1,024
# tokens one in four misses a limit; of 2,048 tokens one in 36 does (perplexity at int8), and the text's first none.
JUDGED_TOKENS = 2048
# Of fewer tokens KL, top-1 and routing are past a limit for certain if they are so by five standard errors of a mean,
# from 16 tokens on: no window of these engines is, of 16,000 with 16 to 1,024 tokens. Perplexity is not judged there,
# since its error is that of kinds of text rather than of tokens: in 1 of 121 windows of 256 it is five errors past.
CERTAIN_ERRORS, CERTAIN_TOKENS = 5.0, 16


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The limits that an engine of one precision must keep. A figure whose limit is None is reported and not judged.

    fp32 differs from the reference only by the order of summation. fp16 rounds activations between matrices to 11
    bits: a logit moves by 1e-3 on average, and by more where two experts have nearly equal logits and the engine
    chooses the other one. int8 and int4 have to reach what their quantisation grids reach on trained models; their
    individual logits are not compared. Measured on the two trained examples, 2,048 and 8,192 tokens of the held-out
    text, with the kernels of moeship and of ONNX Runtime, the worst of all: int8 mean KL 1.3e-3, top-1 97.5 %,
    perplexity +0.14 %, routing 99.5 %; int4 mean KL 0.049, top-1 80.5 %, perplexity +2.6 %, routing 96.1 %. Most of
    the text is of kinds that the examples never saw: there the best logits are close together, and a top choice
    changes more often than on text like their training's, 98.4 % and 88.3 %. The presets with 2, 3, 5 and 6 bits were
    measured so by rounding with a search alone, which costs more than codes that were solved over a text
    (docs/quality.md has the figures).
    """

    max_logit_difference: float | None
    mean_kl: float  # mean KL divergence of the engine from the reference, in nats
    perplexity_increase: float  # (engine's perplexity - reference's) / reference's
    top1_agreement: float  # share of positions with the same most likely token
    routing_agreement: float  # share of (layer, position) pairs with the same set of K experts
    judged_tokens: int = 0  # of fewer tokens, a figure misses its limit only where that is certain


# int4 of moeship's kernels has more bits where they count, and codes that were solved over a text have a third of the
# KL: each has limits of its own (docs/quality.md). From so many tokens of calibration on the latter are those.
OWN_INT4, SOLVED_INT4, SOLVED_OWN_INT4 = "int4, moeship's kernels", "int4, solved", "int4, moeship's kernels, solved"
SOLVED_TOKENS = 4096
# Name -> mean KL, perplexity increase, top-1 agreement, routing agreement. The names are presets, and recipes that are
# none, by the fewest bits of their codes: these have the limits of all matrices at so many bits.
_BY_BITS: Mapping[str, tuple[float, float, float, float]] = {
    "int8": (2e-3, 0.003, 0.96, 0.97), "int4": (0.06, 0.03, 0.78, 0.9), "int2": (0.7, 0.4, 0.5, 0.8),
    OWN_INT4: (0.04, 0.03, 0.81, 0.94), SOLVED_INT4: (0.04, 0.03, 0.83, 0.94),
    SOLVED_OWN_INT4: (0.02, 0.03, 0.86, 0.95),
    "q8": (2e-3, 0.003, 0.96, 0.97), "q6": (7e-3, 0.02, 0.92, 0.95), "q5": (0.012, 0.025, 0.89, 0.94),
    "q4": (0.025, 0.03, 0.86, 0.93), "q3": (0.08, 0.06, 0.76, 0.88), "q2": (0.3, 0.2, 0.58, 0.85),
    "8 bits": (2e-3, 0.003, 0.96, 0.97), "6 bits": (0.012, 0.02, 0.9, 0.94), "5 bits": (0.02, 0.03, 0.85, 0.9),
    "4 bits": (0.1, 0.06, 0.7, 0.8), "3 bits": (0.3, 0.25, 0.55, 0.75), "2 bits": (1.5, 2.0, 0.25, 0.6),
}  # fmt: skip
THRESHOLDS = {
    "fp32": Thresholds(
        max_logit_difference=1e-4, mean_kl=1e-6, perplexity_increase=1e-5, top1_agreement=0.999,
        routing_agreement=0.999,
    ),
    "fp16": Thresholds(
        max_logit_difference=None, mean_kl=1e-4, perplexity_increase=0.001, top1_agreement=0.99, routing_agreement=0.99,
        judged_tokens=JUDGED_TOKENS,
    ),
    **{
        name: Thresholds(
            max_logit_difference=None, mean_kl=kl, perplexity_increase=perplexity, top1_agreement=top1,
            routing_agreement=routing, judged_tokens=JUDGED_TOKENS,
        )
        for name, (kl, perplexity, top1, routing) in _BY_BITS.items()
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Missed:
    """A figure that is past its limit, in words, and whether that is certain."""

    text: str
    certain: bool


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """The result of a comparison over `num_tokens` scored and `num_decoded_tokens` decoded positions.

    A near tie is a position at which the reference's two largest logits differ by less than twice the engine's mean
    |logit difference|. An error of the usual size in both of them can exchange them, so that another most likely token
    there says little.
    """

    num_tokens: int
    num_decoded_tokens: int
    max_logit_difference: float
    mean_logit_difference: float
    max_decoded_difference: float
    mean_kl: float
    mean_decoded_kl: float  # mean KL divergence of the serving graph with its cache, in nats; same limit as mean_kl
    p99_kl: float  # 99 % of the scored positions have at most this KL divergence, in nats
    max_kl: float
    top1_agreement: float
    near_ties: int
    clear_top1_agreement: float | None  # top-1 agreement without the near ties; None if all positions are near ties
    engine_perplexity: float
    reference_perplexity: float
    routing_agreement: float | None
    tied_routings: int | None  # number of (layer, position) pairs whose K-th and K+1-th router logits are equal
    routing_by_layer: tuple[float, ...] | None = None  # of the layers that have experts, the share of positions
    kl_error: float = 0.0  # standard error of mean_kl: the deviation of positions over the root of their number
    decoded_kl_error: float = 0.0

    @property
    def perplexity_increase(self) -> float:
        return self.engine_perplexity / self.reference_perplexity - 1

    def failures(self, limits: Thresholds) -> list[str]:
        """One message for each figure that misses its threshold, with found and expected. NaN misses each threshold. Of
        too few tokens, a figure misses its threshold where that is certain."""
        return [missed.text for missed in self._missed(limits) if missed.certain]

    def findings(self, num_text_ids: int, limits: Thresholds) -> tuple[str, ...]:
        """Sentences on figures that are past their limits over too few tokens, and on a reference whose perplexity is
        above `num_text_ids`, the number of token ids that stand for text. Guessing each of them with the same
        probability has that perplexity."""
        found = []
        unjudged = [missed.text for missed in self._missed(limits) if not missed.certain]
        if unjudged:
            found.append(
                f"too few tokens to judge: {self.num_tokens}, at least {limits.judged_tokens}: {'; '.join(unjudged)}. "
                "A sound engine may be past a limit over so few; take more --tokens, and a longer text if it has fewer"
            )
        if not self.reference_perplexity <= num_text_ids:
            found.append(
                f"the reference's perplexity is {self.reference_perplexity:.0f}, worse than guessing among the "
                f"{num_text_ids} token ids of the tokenizer: the tokenizer and the weights are of different models, "
                "the weights are random, or the model never saw text of this kind; look at where the checkpoint's "
                "tokenizer files come from, and try --text with a text that the model should know"
            )
        return tuple(found)

    def _missed(self, limits: Thresholds) -> Iterator[_Missed]:
        """Each figure that is past its limit."""
        few = self.num_tokens < limits.judged_tokens

        def past(text: str, excess: float, error: float | None) -> Iterator[_Missed]:
            """A figure by how much it is past its limit; `error` is its standard error, None if it has none."""
            if excess <= 0:
                return
            certain = not few or np.isnan(excess)
            if few and error is not None and self.num_tokens >= CERTAIN_TOKENS:
                certain = not excess <= CERTAIN_ERRORS * error
            yield _Missed(text=text, certain=bool(certain))

        def of_share(limit: float) -> float:
            return float(np.sqrt(limit * (1 - limit) / self.num_tokens))

        if limits.max_logit_difference is not None:
            worst = float(np.maximum(self.max_logit_difference, self.max_decoded_difference))  # max may drop NaN
            if not worst <= limits.max_logit_difference:
                text = f"max |logit difference| {worst:.3g}, allowed {limits.max_logit_difference:.3g}"
                yield _Missed(text=text, certain=True)
        text = f"mean KL {self.mean_kl:.3g} nats, allowed {limits.mean_kl:.3g}"
        yield from past(text, self.mean_kl - limits.mean_kl, self.kl_error)
        text = f"mean KL of decoded tokens {self.mean_decoded_kl:.3g} nats, allowed {limits.mean_kl:.3g}"
        yield from past(text, self.mean_decoded_kl - limits.mean_kl, self.decoded_kl_error)
        text = f"perplexity {self.perplexity_increase:+.3%}, allowed {limits.perplexity_increase:+.3%}"
        yield from past(text, self.perplexity_increase - limits.perplexity_increase, None)
        text = f"top-1 agreement {self.top1_agreement:.2%}, expected {limits.top1_agreement:.2%}"
        yield from past(text, limits.top1_agreement - self.top1_agreement, of_share(limits.top1_agreement))
        if self.routing_agreement is not None:
            text = f"routing agreement {self.routing_agreement:.2%}, expected {limits.routing_agreement:.2%}"
            yield from past(text, limits.routing_agreement - self.routing_agreement, of_share(limits.routing_agreement))

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "perplexity_increase": self.perplexity_increase}


@dataclass(frozen=True, kw_only=True)
class WindowSums:
    """The figures of one window of S tokens: of each position, or summed over them. The next-token loss has S - 1
    terms."""

    num_tokens: int
    max_difference: float
    sum_difference: float  # sum over positions of the mean absolute logit difference
    kl: npt.NDArray[np.float64]  # [S], nats
    same_top1: npt.NDArray[np.bool_]  # [S]
    lead: FloatArray  # [S], the reference's largest logit minus its second largest
    engine_loss: float
    reference_loss: float
    routing: tuple[int, int, int] | None  # numbers of (layer, position) pairs: agreeing, tied, all
    same_experts: npt.NDArray[np.int64] | None = None  # [M], positions that agree in each layer that has experts
    choices: npt.NDArray[np.int64]  # [2, S], the most likely token of the engine, and of the reference
    probabilities: npt.NDArray[np.float64]  # [2, S], the engine's of its choice, and the reference's of its own


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What an engine and the reference would say next at each of N scored positions, and how far apart they are.
    `windows` holds the token ids that were scored; position i is behind the i-th of all their tokens."""

    windows: tuple[tuple[int, ...], ...]
    kl: npt.NDArray[np.float64]  # [N], nats
    choices: npt.NDArray[np.int64]  # [2, N], the most likely token of the engine, and of the reference
    probabilities: npt.NDArray[np.float64]  # [2, N], the engine's of its choice, and the reference's of its own


@dataclass(frozen=True, kw_only=True)
class Verification:
    """A report, the thresholds that it misses, and whether the reference was read from the files that the engine was
    built from. `findings` are sentences on what is out of reason and fails no engine, such as a reference that knows
    less than nothing of the text."""

    report: ParityReport
    failures: tuple[str, ...]
    findings: tuple[str, ...]
    reference: str
    reference_is_the_source: bool
    text: EvaluationText
    windows: tuple[int, ...]  # number of tokens of each window
    questions: tuple[Answer, ...] = ()  # what was asked of the weights and of the graph
    serving: tuple[Way, ...] = ()  # the serving graph against the scoring graph; empty where an engine has one graph
    cost: Cost | None = None  # None if it was not asked for
    positions: Positions | None = None  # for a report; not in JSON
    dropping: DroppingPrice | None = None  # of an engine that lacks experts of its model
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by part, in the order of the parts

    def to_json(self, brief: bool = False) -> dict[str, Any]:
        """Everything, or with `brief`, as engine.json has it, without the cost of single experts and the seconds."""
        return {
            **self.report.to_json(),
            "failures": list(self.failures),
            "findings": list(self.findings),
            "reference": self.reference,
            "reference_is_the_source": self.reference_is_the_source,
            "text": {**self.text.to_json(), "tokens": sum(self.windows), "windows": len(self.windows)},
            "questions": [answer.to_json() for answer in self.questions],
            "serving": ways_to_json(self.serving),
            **({} if self.cost is None else {"cost": self.cost.to_json(experts=not brief)}),
            **({} if self.dropping is None else {"dropping": dataclasses.asdict(self.dropping)}),
            **({} if brief else {"seconds": {part: round(took, 1) for part, took in self.seconds.items()}}),
        }


def log_softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    """Natural-log probabilities over the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def chosen_experts(logits: FloatArray, experts_per_token: int) -> npt.NDArray[np.int64]:
    """The indices of the K experts with the largest router logits [..., E], in ascending order. Among equal logits the
    lowest index is chosen."""
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :experts_per_token]
    return np.sort(order, axis=-1)


def near_ties(
    routers: FloatArray | None, experts_per_token: int, share: float, num_tokens: int
) -> npt.NDArray[np.bool_]:
    """Positions [S] whose K-th and K+1-th router logit of a layer differ by no more than `share` of that layer's
    largest."""
    if routers is None or routers.shape[-1] <= experts_per_token:
        return np.zeros(num_tokens, dtype=bool)
    ordered = -np.sort(-routers, axis=-1)
    gap = ordered[..., experts_per_token - 1] - ordered[..., experts_per_token]
    near: npt.NDArray[np.bool_] = (gap <= share * np.abs(routers).max(axis=(1, 2), keepdims=True)[..., 0]).any(axis=0)
    return near


def split_windows(token_ids: Sequence[int], size: int, num_tokens: int) -> Iterator[Sequence[int]]:
    """Consecutive windows of `size` tokens until `num_tokens` are covered or the text ends."""
    limit = min(num_tokens, len(token_ids))
    for start in range(0, limit, size):
        window = token_ids[start : min(start + size, limit)]
        if len(window) > 1:
            yield window


def measure(
    found: FloatArray,
    expected: FloatArray,
    window: Sequence[int],
    found_routing: FloatArray | None = None,
    expected_routing: FloatArray | None = None,
    experts_per_token: int = 0,
) -> WindowSums:
    """Sums over one window of S token ids, from the logits `found` and `expected` [S, V] of engine and reference, and
    from their router logits [L, S, E] if both are given."""
    routing = same_experts = None
    if found_routing is not None and expected_routing is not None:
        same_sets = _same_sets(found_routing, expected_routing, experts_per_token)
        routing, same_experts = _routing(same_sets, expected_routing, experts_per_token), same_sets.sum(axis=-1)
    following = np.asarray(window[1:])
    totals: dict[str, float] = dict.fromkeys(("difference", "engine_loss", "reference_loss"), 0.0)
    largest, kl, lead = 0.0, np.empty(len(window)), np.empty(len(window))
    choices, probabilities = np.empty((2, len(window)), dtype=np.int64), np.empty((2, len(window)))
    for rows in (slice(start, start + SLICE_TOKENS) for start in range(0, len(window), SLICE_TOKENS)):
        difference = np.abs(found[rows] - expected[rows])
        largest = float(np.maximum(largest, difference.max()))  # np.maximum keeps NaN; Python's max may drop it
        found_log, expected_log = log_softmax(found[rows]), log_softmax(expected[rows])
        totals["difference"] += float(difference.mean(axis=-1, dtype=np.float64).sum())
        kl[rows] = (np.exp(expected_log) * (expected_log - found_log)).sum(axis=-1)
        for own, logits, logs in zip((0, 1), (found, expected), (found_log, expected_log), strict=True):
            choices[own, rows] = logits[rows].argmax(axis=-1)
            probabilities[own, rows] = np.exp(logs[np.arange(len(logs)), choices[own, rows]])
        two = np.partition(expected[rows], -2, axis=-1)[:, -2:]
        lead[rows] = two[:, 1] - two[:, 0]
        totals["engine_loss"] += next_token_loss(found_log, following[rows])
        totals["reference_loss"] += next_token_loss(expected_log, following[rows])
    return WindowSums(
        num_tokens=len(window),
        max_difference=largest,
        sum_difference=totals["difference"],
        kl=kl,
        same_top1=choices[0] == choices[1],
        lead=lead.astype(np.float32),
        engine_loss=totals["engine_loss"],
        reference_loss=totals["reference_loss"],
        routing=routing,
        same_experts=same_experts,
        choices=choices,
        probabilities=probabilities,
    )


def positions_of(windows: Sequence[Sequence[int]], sums: Sequence[WindowSums]) -> Positions:
    """The scored positions of all windows of token ids."""
    return Positions(
        windows=tuple(map(tuple, windows)),
        kl=np.concatenate([window.kl for window in sums]),
        choices=np.concatenate([window.choices for window in sums], axis=1),
        probabilities=np.concatenate([window.probabilities for window in sums], axis=1),
    )


def next_token_loss(log_probs: npt.NDArray[np.float64], following: npt.NDArray[np.int64]) -> float:
    """Sum of -log p over the tokens in `following`. The window's last row has no following token and is not counted."""
    return float(-log_probs[np.arange(len(following)), following].sum())


def _same_sets(found: FloatArray, expected: FloatArray, experts_per_token: int) -> npt.NDArray[np.bool_]:
    """Where engine and reference choose the same experts, bool [L, S]."""
    same: npt.NDArray[np.bool_] = (
        chosen_experts(found, experts_per_token) == chosen_experts(expected, experts_per_token)
    ).all(axis=-1)
    return same


def _routing(same: npt.NDArray[np.bool_], expected: FloatArray, experts_per_token: int) -> tuple[int, int, int]:
    ordered = -np.sort(-expected, axis=-1)
    tied = 0
    if expected.shape[-1] > experts_per_token:
        tied = int((ordered[..., experts_per_token - 1] == ordered[..., experts_per_token]).sum())
    return int(same.sum()), tied, same.size


def combine(sums: Sequence[WindowSums], decoded: WindowSums) -> ParityReport:
    """The report over all scored windows and the decoded window, whose first row comes from the prefill."""
    num_tokens = sum(window.num_tokens for window in sums)
    num_losses = num_tokens - len(sums)
    routings = [window.routing for window in sums if window.routing is not None]
    kl, same, lead = (
        np.concatenate([getattr(window, name) for window in sums]) for name in ("kl", "same_top1", "lead")
    )
    mean_difference = sum(window.sum_difference for window in sums) / num_tokens
    clear = lead >= 2 * mean_difference
    by_layer = [window.same_experts for window in sums if window.same_experts is not None]
    return ParityReport(
        num_tokens=num_tokens,
        num_decoded_tokens=decoded.num_tokens - 1,  # the first row comes from the prefill
        max_logit_difference=float(np.max([window.max_difference for window in sums])),
        mean_logit_difference=mean_difference,
        max_decoded_difference=decoded.max_difference,
        mean_kl=float(kl.mean()),
        p99_kl=float(np.quantile(kl, 0.99)),
        max_kl=float(kl.max()),
        mean_decoded_kl=float(decoded.kl.mean()),
        top1_agreement=float(same.mean()),
        near_ties=int((~clear).sum()),
        clear_top1_agreement=float(same[clear].mean()) if clear.any() else None,
        engine_perplexity=float(np.exp(sum(window.engine_loss for window in sums) / num_losses)),
        reference_perplexity=float(np.exp(sum(window.reference_loss for window in sums) / num_losses)),
        routing_agreement=sum(r[0] for r in routings) / sum(r[2] for r in routings) if routings else None,
        tied_routings=sum(r[1] for r in routings) if routings else None,
        routing_by_layer=tuple((np.sum(by_layer, axis=0) / num_tokens).tolist()) if by_layer else None,
        kl_error=float(kl.std() / np.sqrt(len(kl))),
        decoded_kl_error=float(decoded.kl.std() / np.sqrt(len(decoded.kl))),
    )
