"""Predicts the next tokens of a sequence: those that followed the last time that its text ended like this.

    ngrams = Ngrams(tokens, rates)      # the prompt so far; the list grows as tokens are chosen
    ngrams.catch_up()
    ngrams.draft(8)                     # up to 8 tokens and how likely each is accepted; empty where nothing matches

This is prompt lookup (https://github.com/apoorvumang/prompt-lookup-decoding) with an index: a new token costs a few
look-ups in a dictionary, however long the text is. A match is followed for as long as it predicts what comes. Each
prediction is compared with the token that was chosen, whether or not a step computed it, so that the rate of hits is
known without drafts.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import islice

_SIZES = (3, 2)  # tokens of the n-grams that are looked up; the longer first
# Tokens that matched before a prediction: the least of each kind. Longer matches predict better.
_KINDS = (2, 3, 4, 6, 10, 16)
_LONGEST = _KINDS[-1]
_WEIGHT = 2.0  # of what other sequences hit, in predictions of the sequence itself
_UNKNOWN = 0.3  # rate of hits before there was any prediction
_SEQUENCE_MEMORY, _ENGINE_MEMORY = 0.9, 0.99  # what a prediction still counts after the next one


class Rates:
    """How often predictions were right, by the number of tokens that matched before them. `others` are the rates of
    all sequences, which count while a sequence has few predictions of its own."""

    def __init__(self, others: Rates | None = None) -> None:
        self._others = others
        self._memory = _SEQUENCE_MEMORY if others else _ENGINE_MEMORY
        self._hits, self._all = [0.0] * len(_KINDS), [0.0] * len(_KINDS)

    def learn(self, num_matching: int, *, is_hit: bool) -> None:
        """A prediction after so many matching tokens was right or wrong."""
        kind = _kind_of(num_matching)
        self._hits[kind] = self._memory * self._hits[kind] + is_hit
        self._all[kind] = self._memory * self._all[kind] + 1
        if self._others is not None:
            self._others.learn(num_matching, is_hit=is_hit)

    def of(self, num_matching: int) -> float:
        """The share of predictions after so many matching tokens that were right; between 0 and 1."""
        kind = _kind_of(num_matching)
        expected = self._others.of(num_matching) if self._others else _UNKNOWN
        return (self._hits[kind] + _WEIGHT * expected) / (self._all[kind] + _WEIGHT)


class Ngrams:
    """The text of one sequence and where each of its n-grams was last. `tokens` is the sequence's own list, to which
    tokens are only appended; those that it has at first are its prompt."""

    def __init__(self, tokens: list[int], rates: Rates) -> None:
        self._tokens, self._rates = tokens, rates
        self._num_seen = len(tokens)
        self._next: int | None = None  # the place of the token that is predicted to come next
        self._num_matching = 0  # tokens before it that are those at the text's end
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> the place behind its last occurrence
        for size in _SIZES:
            grams = zip(*(islice(tokens, start, None) for start in range(size)), strict=False)
            self._after.update(zip(grams, range(size, len(tokens)), strict=False))
        self._look_up()

    def catch_up(self) -> None:
        """Take the tokens that were appended since the last call."""
        tokens = self._tokens
        for place in range(self._num_seen, len(tokens)):
            token = tokens[place]
            for size in _SIZES:
                if place >= size:
                    self._after[tuple(tokens[place - size : place])] = place
            if self._next is not None:
                is_hit = tokens[self._next] == token
                self._rates.learn(self._num_matching, is_hit=is_hit)
                if is_hit:
                    self._next += 1
                    self._num_matching += 1
                    continue
            self._num_seen = place + 1
            self._look_up()
        self._num_seen = len(tokens)

    @property
    def has_prediction(self) -> bool:
        """Whether `draft` gives anything."""
        return self._next is not None

    def draft(self, count: int) -> tuple[list[int], list[float]]:
        """At most `count` predicted tokens, and for each the probability that it and all before it are chosen. A text
        that repeats itself is predicted to go on doing so."""
        if self._next is None or count <= 0:
            return [], []
        found = self._tokens[self._next : self._next + count]
        period = len(self._tokens) - self._next
        while len(found) < count:
            found.append(found[len(found) - period])
        likely, chances = 1.0, []
        for number in range(count):
            likely *= self._rates.of(self._num_matching + number)
            chances.append(likely)
        return found, chances

    def _look_up(self) -> None:
        """Find where the text last ended like this."""
        tokens, end = self._tokens, self._num_seen
        for size in _SIZES:
            place = self._after.get(tuple(tokens[end - size : end])) if end >= size else None
            if place is not None:
                count = size
                while count < min(place, _LONGEST) and tokens[place - 1 - count] == tokens[end - 1 - count]:
                    count += 1
                self._next, self._num_matching = place, count
                return
        self._next = None


def _kind_of(num_matching: int) -> int:
    return bisect_right(_KINDS, num_matching) - 1
