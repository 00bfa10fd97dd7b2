"""Chooses the next token of each sequence from logits: bias, penalties, temperature, cuts and a seeded draw.

    samplers = [Sampler(plan, num_tokens=tokenizer.size) for plan in plans]      # one for each sequence
    for choice in choose_all(logits, samplers):                                  # logits float32 [R, V]
        choice.token_id, choice.log_prob        # or an error, which concerns that row alone

The steps, in order: the guide; logit bias; repetition, presence and frequency penalty; min_length and banned tokens;
temperature, min-p, top-k, top-p. This is the order of vLLM (vllm/v1/sample/sampler.py), except that tokens are excluded
after penalties instead of before, which gives the same scores. The repetition penalty counts tokens of prompt and
output, the other two only those of the output. Ids at and above the tokenizer's size are padding rows of the embedding.
They are cut off first, so they are never chosen and have no probability. A greedy choice among equal scores takes the
lowest id. Log-probabilities are those of the model: they are computed from the logits before guide, bias, penalties,
temperature and cuts.

No computation mixes rows, so a row's choice is the same to the bit whatever other rows a step has. A greedy row without
bias, penalties and bans costs one argmax, which finds NaN and infinity as well. Only other rows are copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from triton_repo.contracts.piece import TokenRouting
from triton_repo.errors import RequestError
from triton_repo.runtime.options import SamplingPlan

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Bits = npt.NDArray[np.bool_]

_NUCLEUS_START = 256  # how many of the likeliest tokens top-p sorts first
_NUCLEUS_GROWTH = 8
_FIRST_REFUSED = 64  # how many of the likeliest tokens are checked after one was refused
_REFUSED_GROWTH = 4
_FEWEST_GROUPS = 256  # groups of scores whose maxima bound the highest scores
_LEAST_DEPTH = 4  # scores in a group; below that a partition of all scores is as fast
_DRAW_BLOCK = 512  # weights whose sum is looked at first when a draw is laid on many weights


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A chosen token. Log-probabilities are natural logarithms; those that the request did not ask for are None or
    absent."""

    token_id: int
    log_prob: float | None
    top_log_probs: tuple[tuple[int, float], ...] = ()  # the likeliest ids and their log-probabilities, best first
    # What the routers chose where these logits were computed, and of how many experts a layer; the engine adds it.
    routing: TokenRouting = ()
    num_experts: int | None = None


class Guide(Protocol):
    """Keeps one sequence to a grammar (`triton_repo.runtime.guided.guides.Guide`)."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing may follow."""

    def is_ready(self, wait_s: float = 0.0) -> bool:
        """Whether `allowed` gives its answer at once. Waits for that as long as `wait_s`."""

    def allowed(self) -> Bits:
        """Whether each token may come next, bool [V]. Raises RequestError."""

    def take(self, token: int) -> None:
        """Move on by a token. Raises RequestError."""

    def num_taken(self, tokens: Sequence[int]) -> int:
        """How many of the tokens the grammar would take, one after the other. Moves nothing."""


class Sampler:
    """Chooses the tokens of one sequence. Holds its random generator and the tokens that its penalties count.

    `refuses` says whether a token that is about to be chosen must not be. `banned` gives ids that the next choice must
    not take; it is called before each choice. Neither of them excludes end tokens: `refuses` by its own choice,
    `banned` by that of this class. `guide` says which tokens may come at all, end tokens included.

    The sequences of one request have different `sequence_index`, and so different draws under the same seed. The draws
    of sequence 0 are those of the seed itself.
    """

    def __init__(
        self,
        plan: SamplingPlan,
        num_tokens: int,
        *,
        refuses: Callable[[int], bool] | None = None,
        banned: Callable[[], Sequence[Ids]] | None = None,
        sequence_index: int = 0,
        guide: Guide | None = None,
    ) -> None:
        options = plan.options
        self._options = options
        self._temperature = options.sampling_temperature
        self._num_tokens = num_tokens
        self._refuses, self._banned = refuses, banned
        self.guide = guide
        self._end_ids = np.array([i for i in plan.end_ids if i < num_tokens], dtype=np.int64)
        self._generator = _generator(options.random_seed, sequence_index) if self._temperature else None
        self._bias_ids = np.array([token for token, _ in options.logit_bias], dtype=np.int64)
        self._biases = np.array([bias for _, bias in options.logit_bias], dtype=np.float32)
        self._seen = _Tally(plan.prompt_ids) if options.repetition_penalty != 1 else None
        self._chosen = _Tally() if options.presence_penalty or options.frequency_penalty else None
        self._num_chosen = 0

    @property
    def is_complete(self) -> bool:
        """Whether a guide lets nothing follow the tokens so far."""
        return self.guide is not None and self.guide.is_complete

    def is_ready(self, wait_s: float = 0.0) -> bool:
        """Whether `choose` need not wait for a guide. Waits for that as long as `wait_s`."""
        return self.guide is None or self.guide.is_ready(wait_s)

    def choose(self, logits: Floats) -> Choice:
        """The next token for logits [V]. Raises RequestError for logits that are NaN or infinite, if no token is left,
        and what the guide raises."""
        logits = logits[: self._num_tokens]
        best = int(logits.argmax())  # the first NaN when any value is NaN
        if not math.isfinite(logits[best]):
            raise _broken_logits()
        allowed = None if self.guide is None else self.guide.allowed()
        scores = self._changed(logits, best, allowed)
        token = self._pick(logits, best) if scores is None else self._pick(scores, int(scores.argmax()))
        if self._refuses is not None and self._refuses(token):
            token = self._pick_another(logits.copy() if scores is None else scores, token, self._refuses)
        self._num_chosen += 1
        for tally in (self._seen, self._chosen):
            if tally is not None:
                tally.add(token)
        if self.guide is not None:
            self.guide.take(token)
        return self._choice(logits, best, token)

    def _choice(self, logits: Floats, best: int, token: int) -> Choice:
        options = self._options
        if not options.return_log_probs and not options.num_log_probs:
            return Choice(token_id=token, log_prob=None)
        top = highest_ids(logits, options.num_log_probs)
        values = _log_probabilities(logits, logits[best], np.append(top, token)).tolist()
        return Choice(
            token_id=token,
            log_prob=values[-1] if options.return_log_probs else None,
            top_log_probs=tuple(zip(top.tolist(), values, strict=False)),
        )

    def _changed(self, logits: Floats, best: int, allowed: Bits | None) -> Floats | None:
        """The scores after guide, bias, penalties, min_length and bans; None where nothing changes them, or the guide
        alone does and a greedy choice need not know."""
        options = self._options
        banned = [ids for ids in self._banned() if len(ids)] if self._banned is not None else ()
        held = self._num_chosen < options.min_length and len(self._end_ids) > 0 and self._goes_on(allowed)
        changes = banned or held or len(self._bias_ids) or self._seen is not None or self._chosen is not None
        is_best = self._generator is None and self._refuses is None
        if not changes and (allowed is None or (is_best and allowed[best])):
            return None
        scores = logits.copy() if allowed is None else np.where(allowed, logits, -np.float32(np.inf))
        scores[self._bias_ids] += self._biases
        if self._seen is not None:
            penalise_repetition(scores, self._seen.ids, options.repetition_penalty)
        if self._chosen is not None:
            ids, counts = self._chosen.ids, self._chosen.counts
            scores[ids] -= options.presence_penalty + options.frequency_penalty * counts
        if held:
            scores[self._end_ids] = -np.inf
        for ids in banned:
            self._ban(scores, ids)
        return scores

    def _goes_on(self, allowed: Bits | None) -> bool:
        """Whether another token than an end token may come."""
        return allowed is None or int(allowed.sum()) > int(allowed[self._end_ids].sum())

    def _ban(self, scores: Floats, ids: Ids) -> None:
        """Exclude ids from the choice, in place, but leave end tokens as they are."""
        ids = ids[(ids >= 0) & (ids < self._num_tokens)]
        kept = scores[self._end_ids]
        scores[ids] = -np.inf
        scores[self._end_ids] = kept

    def _pick(self, scores: Floats, best: int) -> int:
        """A token by the scores. The highest is scores[best]."""
        if scores[best] == -np.inf:
            also = "" if self.guide is None else " and the guide"
            raise RequestError(
                f"choosing a token: bad_words and min_length{also} together leave none; send fewer bad_words"
            )
        if self._generator is None or scores[best] == np.inf:  # a penalty can take a huge logit out of float32's range
            return best
        ids, weights = self._kept(scores, scores[best])
        place = draw(weights, self._generator.random())
        return place if ids is None else int(ids[place])

    def _kept(self, scores: Floats, highest: np.float32) -> tuple[Ids | None, Doubles]:
        """The ids that min-p, top-k and top-p leave, None for all, and their weights relative to the likeliest one."""
        options, temperature = self._options, self._temperature
        ids: Ids | None = None
        if 0 < options.top_k < len(scores):
            ids = top_k_ids(scores, options.top_k)
        elif options.min_p:
            # A little more than is kept, so that exponentials of few scores are enough to decide exactly.
            least = float(highest) + temperature * (math.log(options.min_p) - 0.001)
            ids = np.flatnonzero(scores >= np.nextafter(np.float32(least), -np.float32(np.inf)))
        weights = np.subtract(scores if ids is None else scores[ids], highest, dtype=np.float64)
        weights /= temperature
        np.exp(weights, out=weights)
        if options.min_p:
            ids, weights = _only(likely_enough(weights, options.min_p), ids, weights)
        if 0 < options.top_p < 1:
            ids, weights = _only(heaviest_share(weights, options.top_p), ids, weights)
        return ids, weights

    def _pick_another(self, scores: Floats, token: int, refuses: Callable[[int], bool]) -> int:
        """A token that is not refused, in place of one that was. Changes the scores. Several tokens are checked at a
        time, so that many refused tokens do not take as many draws."""
        count = _FIRST_REFUSED
        while True:
            scores[token] = -np.inf
            likeliest = np.argpartition(scores, -count)[-count:] if count < len(scores) else np.arange(len(scores))
            scores[[other for other in likeliest.tolist() if scores[other] > -np.inf and refuses(other)]] = -np.inf
            count *= _REFUSED_GROWTH
            token = self._pick(scores, int(scores.argmax()))
            if not refuses(token):
                return token


class _Tally:
    """How often each token was counted, as arrays of the tokens that were."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._places: dict[int, int] = {}
        self._ids = np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.int64)
        for token in ids:
            self.add(token)

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Ids:
        return self._counts[: len(self._places)]

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids, self._counts = (np.concatenate((old, np.zeros_like(old))) for old in (self._ids, self._counts))
        self._ids[place] = token
        self._counts[place] += 1


def choose_all(logits: Iterable[Floats], samplers: Sequence[Sampler]) -> list[Choice | Exception]:
    """The next token of each sequence: R rows of logits [V] and R samplers give R choices.

    A row whose logits are NaN or infinite, or for which no token is left, has the RequestError in its place, and a row
    whose `refuses` or `banned` raises has that error. Samplers are independent, so that no row changes what another one
    gets. The logits are only read.
    """
    found: list[Choice | Exception] = []
    for row, sampler in zip(logits, samplers, strict=True):
        try:
            found.append(sampler.choose(row))
        except Exception as error:  # whatever it is, it concerns this row alone
            found.append(error)
    return found


def log_probabilities_of(logits: Floats, token_ids: Sequence[int], num_tokens: int) -> list[float]:
    """Natural logarithms of the probabilities of token_ids [S] under logits [S, V]. The first `num_tokens` columns are
    the model's tokens; the others do not count. Only one row is held as float64 at a time.

    For a prompt, row i holds the logits after token i, and token_ids are the prompt's tokens from the second on: its
    first token has no probability. Raises RequestError for logits that are NaN or infinite.
    """
    found = []
    for row, token in zip(logits[:, :num_tokens], token_ids, strict=True):
        highest = row[row.argmax()]
        if not math.isfinite(highest):
            raise _broken_logits()
        found.append(float(_log_probabilities(row, highest, np.array([token]))[0]))
    return found


def likeliest_of(logits: Floats, num_tokens: int, count: int) -> list[tuple[tuple[int, float], ...]]:
    """The `count` likeliest tokens under each row of logits [S, V], with the natural logarithms of their probabilities,
    the likeliest first. Rows and columns are as in `log_probabilities_of`."""
    found = []
    for row in logits[:, :num_tokens] if count else ():
        ids = highest_ids(row, count)
        found.append(tuple(zip(ids.tolist(), _log_probabilities(row, row[row.argmax()], ids).tolist(), strict=True)))
    return found


def penalise_repetition(scores: Floats, ids: Ids, penalty: float) -> None:
    """Divide the positive scores of `ids` by `penalty` and multiply the other scores of `ids` by it, in place."""
    seen = scores[ids]
    with np.errstate(over="ignore"):
        scores[ids] = np.where(seen > 0, seen / penalty, seen * penalty)


def top_k_ids(scores: Floats, k: int) -> Ids:
    """Ids of the k highest scores and of scores equal to the k-th, in rising order of ids. k = 0 keeps all."""
    if not 0 < k < len(scores):
        return np.arange(len(scores))
    ids = np.flatnonzero(scores >= _reached_by(scores, k))
    values = scores[ids]
    return ids[values >= np.partition(values, len(values) - k)[len(values) - k]]


def highest_ids(scores: Floats, count: int) -> Ids:
    """Ids of the `count` highest scores, the highest first, and the lower id first where scores are equal."""
    if not count:
        return np.zeros(0, dtype=np.int64)
    ids = top_k_ids(scores, count)
    return ids[np.argsort(-scores[ids], kind="stable")][:count]


def likely_enough(weights: Doubles, min_p: float) -> Ids:
    """Indices of the weights that are at least `min_p` times the heaviest, which must be 1. As min-p in vLLM and
    transformers (MinPLogitsWarper)."""
    return np.flatnonzero(weights >= min_p)


def heaviest_share(weights: Doubles, share: float) -> Ids:
    """Indices of the fewest heaviest weights that together reach `share` of the sum, in falling order of weight.

    Only as many weights as needed are sorted. Equal weights keep their order.
    """
    target = share * weights.sum()
    size = min(_NUCLEUS_START, len(weights))
    while True:
        top = np.flatnonzero(weights >= _reached_by(weights, size))
        order = top[np.argsort(-weights[top], kind="stable")]
        reach = np.cumsum(weights[order])
        if reach[-1] >= target or len(order) == len(weights):
            return order[: int(np.searchsorted(reach, target)) + 1]
        size = min(size * _NUCLEUS_GROWTH, len(weights))


def draw(weights: Doubles, number: float) -> int:
    """The index at which `number`, 0 <= number < 1, falls when the weights are laid one after the other and scaled to
    1. Of many weights the sums of blocks are looked at first, since a cumulative sum cannot use vector instructions."""
    start = 0
    if len(weights) > 2 * _DRAW_BLOCK:
        blocks = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _DRAW_BLOCK)))
        target = number * blocks[-1]
        block = int(np.searchsorted(blocks, target, side="right"))
        target -= blocks[block - 1] if block else 0.0
        start = block * _DRAW_BLOCK
        weights = weights[start : start + _DRAW_BLOCK]
        reach = np.cumsum(weights)
    else:
        reach = np.cumsum(weights)
        target = number * reach[-1]
    place = int(np.searchsorted(reach, target, side="right"))
    # The two sums of a block may differ in the last bit.
    return start + (place if place < len(weights) else int(np.flatnonzero(weights)[-1]))


def log_probability(logits: Floats, token: int) -> float:
    """Natural logarithm of softmax(logits)[token]."""
    return float(_log_probabilities(logits, logits.max(), np.array([token]))[0])


def _log_probabilities(logits: Floats, highest: np.float32, ids: Ids) -> Doubles:
    """Natural logarithms of softmax(logits)[ids], where `highest` is the highest logit."""
    shifted = np.subtract(logits, highest, dtype=np.float64)
    wanted = shifted[ids]
    wanted -= np.log(np.exp(shifted, out=shifted).sum())
    return wanted


def _only(kept: Ids, ids: Ids | None, weights: Doubles) -> tuple[Ids, Doubles]:
    """Ids (None for all) and weights at the indices `kept`."""
    return (kept if ids is None else ids[kept]), weights[kept]


def _reached_by(scores: Floats | Doubles, count: int) -> float:
    """A value that at least `count` scores reach, and in general not many more.

    The scores are dealt into groups. `count` of the groups' maxima reach the count-th highest of these maxima, so at
    least as many scores do. This takes a tenth of the time of a partition of a vocabulary.
    """
    groups = max(_FEWEST_GROUPS, 4 * count)
    depth = len(scores) // groups
    if depth < _LEAST_DEPTH:
        return float(np.partition(scores, len(scores) - count)[len(scores) - count])
    maxima = scores[: depth * groups].reshape(depth, groups).max(axis=0)
    return float(np.partition(maxima, groups - count)[groups - count])


def _generator(seed: int | None, sequence_index: int) -> np.random.Generator:
    key = (sequence_index,) if sequence_index else ()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def _broken_logits() -> RequestError:
    return RequestError(
        "choosing a token: the engine's logits hold NaN or infinity; verify the engine with: moeship verify",
        kind="INTERNAL",
    )
