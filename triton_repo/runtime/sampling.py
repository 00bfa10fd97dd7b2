"""Chooses the next token from logits: penalties, temperature, top-k, top-p and a seeded draw, in vectorised numpy.

    sampler = Sampler(plan, num_tokens=tokenizer.size)
    choice = sampler.choose(logits)          # logits float32 [V]
    choice.token_id, choice.log_prob

The steps, in order: repetition, presence and frequency penalty, min_length, temperature, top-k, top-p. The repetition
penalty counts tokens of prompt and output, the other two only those of the output. Ids at and above the tokenizer's
size are padding rows of the embedding. They are cut off first, so they are never chosen and have no probability. A
greedy choice among equal scores takes the lowest id. Log-probabilities are those of the model: they are computed from
the logits before penalties, temperature and cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from triton_repo.errors import RequestError
from triton_repo.runtime.options import SamplingPlan

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_NUCLEUS_START = 256  # how many of the likeliest tokens top-p sorts first
_NUCLEUS_GROWTH = 8
_FIRST_REFUSED = 64  # how many of the likeliest tokens are checked after one was refused
_REFUSED_GROWTH = 4


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A chosen token. `log_prob` is the natural logarithm of its probability, None unless the request asked for it."""

    token_id: int
    log_prob: float | None


class Sampler:
    """Chooses the tokens of one sequence. Holds its random generator and the tokens chosen so far."""

    def __init__(self, plan: SamplingPlan, num_tokens: int) -> None:
        self._options = plan.options
        self._temperature = plan.options.sampling_temperature
        self._num_tokens = num_tokens
        self._end_ids = np.array([i for i in plan.end_ids if i < num_tokens], dtype=np.int64)
        self._generator = np.random.Generator(np.random.PCG64(plan.options.random_seed))
        self._counts = np.zeros(num_tokens, dtype=np.int64)  # how often each id was chosen
        self._seen = np.zeros(num_tokens, dtype=bool)  # ids of prompt and output
        self._seen[list(plan.prompt_ids)] = True
        self._num_chosen = 0

    def choose(
        self, logits: Floats, refuses: Callable[[int], bool] | None = None, banned: Sequence[Ids] = ()
    ) -> Choice:
        """The next token for logits [V]. No id in `banned` is chosen except end tokens, and no id for which `refuses`
        is true. Raises RequestError for logits that are NaN or infinite, and if no token is left.
        """
        logits = logits[: self._num_tokens]
        # The largest value is NaN when any value is.
        if not np.isfinite(logits.max()):
            raise RequestError(
                "choosing a token: the engine's logits hold NaN or infinity; verify the engine with: moeship verify",
                kind="INTERNAL",
            )
        scores = self._penalised(logits)
        for ids in banned:
            self._ban(scores, ids)
        token = self._pick(scores)
        # Check several tokens at a time, so that many refused tokens do not take as many draws.
        count = _FIRST_REFUSED
        while refuses is not None and refuses(token):
            scores[token] = -np.inf
            likeliest = np.argpartition(scores, -count)[-count:] if count < len(scores) else np.arange(len(scores))
            scores[[other for other in likeliest.tolist() if scores[other] > -np.inf and refuses(other)]] = -np.inf
            count *= _REFUSED_GROWTH
            token = self._pick(scores)
        self._counts[token] += 1
        self._seen[token] = True
        self._num_chosen += 1
        wanted = self._options.return_log_probs
        return Choice(token_id=token, log_prob=log_probability(logits, token) if wanted else None)

    def _ban(self, scores: Floats, ids: Ids) -> None:
        """Exclude ids from the choice, in place, but leave end tokens as they are."""
        ids = ids[(ids >= 0) & (ids < self._num_tokens)]
        kept = scores[self._end_ids]
        scores[ids] = -np.inf
        scores[self._end_ids] = kept

    def _penalised(self, logits: Floats) -> Floats:
        options, scores = self._options, logits.copy()
        if options.repetition_penalty != 1:
            penalise_repetition(scores, np.flatnonzero(self._seen), options.repetition_penalty)
        if options.presence_penalty or options.frequency_penalty:
            chosen = np.flatnonzero(self._counts)
            scores[chosen] -= options.presence_penalty + options.frequency_penalty * self._counts[chosen]
        if self._num_chosen < options.min_length:
            scores[self._end_ids] = -np.inf
        return scores

    def _pick(self, scores: Floats) -> int:
        best = int(scores.argmax())
        if scores[best] == -np.inf:
            raise RequestError("choosing a token: bad_words and min_length together leave none; send fewer bad_words")
        if self._temperature == 0:
            return best
        ids = top_k_ids(scores, self._options.top_k)
        weights = np.exp((scores[ids].astype(np.float64) - scores[best]) / self._temperature)
        if 0 < self._options.top_p < 1:
            kept = heaviest_share(weights, self._options.top_p)
            ids, weights = ids[kept], weights[kept]
        reach = np.cumsum(weights)
        place = int(np.searchsorted(reach, self._generator.random() * reach[-1], side="right"))
        return int(ids[place])


def penalise_repetition(scores: Floats, ids: Ids, penalty: float) -> None:
    """Divide the positive scores of `ids` by `penalty` and multiply the other scores of `ids` by it, in place."""
    seen = scores[ids]
    scores[ids] = np.where(seen > 0, seen / penalty, seen * penalty)


def top_k_ids(scores: Floats, k: int) -> Ids:
    """Ids of the k highest scores and of scores equal to the k-th, in rising order of ids. k = 0 keeps all."""
    if not 0 < k < len(scores):
        return np.arange(len(scores))
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    return np.flatnonzero(scores >= threshold)


def heaviest_share(weights: Doubles, share: float) -> Ids:
    """Indices of the fewest heaviest weights that together reach `share` of the sum, in falling order of weight.

    Only as many weights as needed are sorted. Equal weights among them keep their order.
    """
    target = share * weights.sum()
    size = min(_NUCLEUS_START, len(weights))
    while True:
        top = np.sort(np.argpartition(weights, len(weights) - size)[len(weights) - size :])
        order = top[np.argsort(-weights[top], kind="stable")]
        reach = np.cumsum(weights[order])
        if reach[-1] >= target or size == len(weights):
            return order[: int(np.searchsorted(reach, target)) + 1]
        size = min(size * _NUCLEUS_GROWTH, len(weights))


def log_probability(logits: Floats, token: int) -> float:
    """Natural logarithm of softmax(logits)[token]."""
    shifted = logits.astype(np.float64) - logits.max()
    return float(shifted[token] - np.log(np.exp(shifted).sum()))
