"""Decides which tokens of drafts a step computes: as many as let the most tokens be chosen in a second.

A step with drafts takes longer, and gives for each draft as many tokens as the sequence chooses like it, and one more.
Both are learnt: `costs` and `ngrams`. Where no draft is worth its time there is none, and where a text never repeats
itself there is nothing to try either.
"""

from __future__ import annotations

import operator
import time
from bisect import bisect_right
from collections.abc import Mapping
from collections.abc import Sequence as Items
from itertools import accumulate

from triton_repo.runtime.batching.drafts.costs import SIZES, Costs
from triton_repo.runtime.batching.drafts.ngrams import Ngrams, Rates
from triton_repo.runtime.batching.sequence import Sequence

_GAIN = 1.02  # by which drafts must raise the tokens a second
_LEAST_CHANCE = 0.05  # of a token to be chosen, for it to be considered
_LIKELY = 0.5  # the same beside prompts, where a token of a draft takes the place of one of a prompt
_MORE = 0.5  # part of the pause target that drafts may take; memory may become twice as slow the next moment

_FIRST_CHECKED = 2  # tokens of a draft that are shown to a guide at first
_MASK_S = 0.001  # for which a draft waits for the mask of the token before it
_CHECK_S = 0.001  # that a guide may take for a draft before it is shown no more

Drafts = Mapping[Sequence, tuple[int, ...]]


class Drafter:
    """The drafts of one engine."""

    def __init__(self) -> None:
        self._costs, self._rates = Costs(), Rates()

    def drafts(self, sequences: Items[Sequence], room: int, pause_s: float) -> Drafts:
        """Drafts for the sequences of a step without prompts, of at most `room` tokens. For drafts the step takes
        half of `pause_s` seconds more at most, as far as is known: other sequences, and requests that arrive, wait for
        it."""
        candidates = self._candidates(sequences, room, _LEAST_CHANCE)
        costs = self._costs.of(len(sequences)) if candidates else {}
        if not costs:
            return {}
        gains = [0.0, *accumulate(chance for chance, _, _, _ in candidates)]
        rows, plain_s = len(sequences), self._costs.plain_s(len(sequences))
        longest = 1 + _MORE * pause_s / plain_s
        best, best_rate = 0, _GAIN * rows
        for size, cost in costs.items():
            if size < len(gains) and cost <= longest and (rows + gains[size]) / cost > best_rate:
                best, best_rate = size, (rows + gains[size]) / cost
        return _chosen(candidates[:best])

    def drafts_beside_prompts(self, sequences: Items[Sequence], room: int) -> Drafts:
        """Drafts for the answers in a step that computes prompts. Only likely tokens are drafted, since each takes as
        long as a token of a prompt."""
        return _chosen(self._candidates(sequences, room, _LIKELY)[: max(0, room)])

    def learn(self, rows: int, drafted: int, seconds: float) -> None:
        """A step of so many sequences and no prompt took so long."""
        self._costs.learn(rows, drafted, seconds)

    def _candidates(
        self, sequences: Items[Sequence], room: int, least_chance: float
    ) -> list[tuple[float, int, int, Sequence]]:
        """Tokens that may be drafted, the likeliest first: the chance that the token and those before it are chosen,
        its number in the draft, the token, the sequence. A later token of a draft is never before an earlier one."""
        found = []
        for sequence in sequences:
            ngrams = self._ngrams(sequence)
            ngrams.catch_up()
            if not ngrams.has_prediction:
                continue
            # The last token is not computed, and nothing is computed behind it.
            left = sequence.request.num_positions - len(sequence.tokens)
            tokens, chances = ngrams.draft(min(SIZES[-1], room, left))
            count = bisect_right(chances, -least_chance, key=operator.neg)
            found += [
                (chances[number], number, tokens[number], sequence)
                for number in range(_num_allowed(sequence, tokens[:count]))
            ]
        if len(sequences) > 1:
            found.sort(key=lambda candidate: (-candidate[0], candidate[1]))
        return found

    def _ngrams(self, sequence: Sequence) -> Ngrams:
        if sequence.ngrams is None:
            sequence.ngrams = Ngrams(sequence.tokens, Rates(self._rates))
        return sequence.ngrams


def _num_allowed(sequence: Sequence, tokens: list[int]) -> int:
    """How many of the tokens the guide of a sequence would take, one after the other; all of them without one.

    A token of some grammars takes milliseconds, for which every sequence of the step waits. So a few are looked at
    first, then twice as many, and none beyond those once that has taken `_CHECK_S` of this thread's time."""
    guide = sequence.writer.sampler.guide
    if guide is None or not tokens:
        return len(tokens)
    if not guide.is_ready(_MASK_S):
        return 0  # the guide computes the next mask, and knows nothing else until then
    begun, size = time.thread_time(), _FIRST_CHECKED
    try:
        while (taken := guide.num_taken(tokens[:size])) == size < len(tokens):
            if time.thread_time() - begun > _CHECK_S:
                break
            size *= 2
    except Exception:  # the choice of the next token raises the same, and tells the client
        return 0
    return taken


def _chosen(candidates: Items[tuple[float, int, int, Sequence]]) -> Drafts:
    drafts: dict[Sequence, tuple[int, ...]] = {}
    for _, _, token, sequence in candidates:
        drafts[sequence] = (*drafts.get(sequence, ()), token)
    return drafts
