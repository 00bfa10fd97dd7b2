"""Log-likelihoods of continuations, computed by the steps that serve.

    scores = score(session, [Continuation(context=(1, 5, 9), target=(4, 7))], lanes=8)
    scores[0].log_prob      # natural logarithm of P(4 | 1 5 9) * P(7 | 1 5 9 4)
    scores[0].is_greedy     # whether 4 and then 7 are the likeliest tokens

A task of multiple choice asks for several continuations of one context, and a task with examples in its prompts begins
all contexts alike. So continuations are sorted by their tokens. Each lane, a slot of the cache, takes a run of them one
after the other, and keeps the beginning that the next one shares with the one before: a context is computed once for
all of its continuations, and the examples once in each lane. A step takes a chunk of every lane.

Probabilities are those over all rows of the head's matrix, rows that pad the vocabulary included, as `lm_eval`'s model
`hf` computes them. Serving leaves these rows out.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from export.errors import named
from triton_repo.evaluation.errors import EvaluationError
from trt_build.errors import EngineError
from trt_build.machine.memory import available_memory
from trt_build.ort.cache import Cache
from trt_build.ort.memory import kv_bytes_of
from trt_build.ort.session import PREFILL_CHUNK_TOKENS, Session
from trt_build.ort.step_call import Row

STEP_TOKENS = 512  # of all lanes in a step: it bounds the activations
LOGITS_BYTES = 64 << 20  # of all lanes in a step
_SHARE_OF_FREE_MEMORY = 0.8  # that keys and values may take

Floats = npt.NDArray[np.float32]
Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Tokens whose probability after a context is asked for. Both have at least one token."""

    context: Tokens
    target: Tokens


@dataclass(frozen=True, kw_only=True)
class Score:
    """`log_prob`: natural logarithm of the probability of all tokens of a target. `is_greedy`: whether each of them is
    the likeliest at its place, the lowest id where logits are equal."""

    log_prob: float
    is_greedy: bool


@dataclass(kw_only=True)
class _Item:
    """One run over tokens: the context and the target without its last token. Targets that differ only in the last
    token share it: `last_tokens` maps the last token to the places of the answers."""

    tokens: Tokens
    first: int  # place of the first token whose logits are wanted: the context's last
    last_tokens: dict[int, list[int]] = field(default_factory=dict)


def score(
    session: Session,
    continuations: Sequence[Continuation],
    lanes: int,
    progress: Callable[[int], object] = lambda _: None,
) -> list[Score]:
    """The scores of continuations, in their order. `lanes` is the most sequences in a step; fewer are taken where their
    keys and values would not fit into the free memory. `progress` is called with the number of answers so far.

    A context that is too long loses its beginning, so that its last tokens and the target fit: the last
    `session.max_sequence` + 1 tokens are kept, as the last one is predicted only. Raises EvaluationError for a target
    that does not fit, and for engines that give no logits of several positions; EngineError for logits that are not
    finite.
    """
    if not continuations:
        return []
    if not session.engine.has_serving_graph:
        raise EvaluationError(
            f"evaluating the engine {session.engine.folder}: found format {session.engine.manifest.format_version}, "
            "which has no graph for the logits of several positions; build the engine again"
        )
    items = sorted(_items(continuations, session.max_sequence), key=lambda item: (item.tokens, item.first))
    longest = max(len(item.tokens) for item in items)
    if not session.device.provider.mixes_lengths:
        lanes = 1  # such a step computes its rows one after the other, so several lanes only share less
    cache = session.new_cache(lanes_that_fit(session, min(lanes, len(items)), longest))
    scores: list[Score | None] = [None] * len(continuations)
    num_done = 0
    for item, found in _run(session, cache, _shared_out(items, cache.num_slots)):
        for token, (log_prob, is_greedy) in found.items():
            places = item.last_tokens[token]
            for place in places:
                scores[place] = Score(log_prob=log_prob, is_greedy=is_greedy)
            num_done += len(places)
        progress(num_done)
    return [found for found in scores if found is not None]


def num_truncated(continuations: Sequence[Continuation], max_sequence: int) -> int:
    """How many contexts lose their beginning."""
    return sum(len(one.context) + len(one.target) > max_sequence + 1 for one in continuations)


def lanes_that_fit(session: Session, lanes: int, positions: int) -> int:
    """The most lanes of so many positions whose keys and values fit into the free memory; at least one."""
    held = positions if session.device.kind == "cpu" else session.max_sequence  # elsewhere a slot is allocated whole
    each = held * kv_bytes_of(session.engine, session.kv_cache)
    free = available_memory() - session.engine.resident_bytes
    return max(1, min(lanes, int(_SHARE_OF_FREE_MEMORY * free) // each))


def _items(continuations: Sequence[Continuation], max_sequence: int) -> list[_Item]:
    """The distinct runs that the continuations need."""
    items: dict[tuple[Tokens, int], _Item] = {}
    for place, one in enumerate(continuations):
        if len(one.target) > max_sequence:
            raise EvaluationError(
                f"scoring a continuation of {len(one.target)} tokens: the engine takes {max_sequence} tokens, expected "
                "a continuation that fits; build the engine with a larger --max-sequence"
            )
        whole = (*one.context, *one.target)[-(max_sequence + 1) :]
        tokens, first = whole[:-1], len(whole) - len(one.target) - 1
        item = items.setdefault((tokens, first), _Item(tokens=tokens, first=first))
        item.last_tokens.setdefault(whole[-1], []).append(place)
    return list(items.values())


def _shared_out(items: Sequence[_Item], lanes: int) -> list[list[_Item]]:
    """Sorted items as one run for each lane, of about equal work."""
    costs = [len(items[0].tokens)] + [len(item.tokens) - _kept(before.tokens, item) for before, item in pairwise(items)]
    ends, total = np.cumsum(costs), sum(costs)
    lane_of = np.minimum((ends - 1) * lanes // total, lanes - 1)
    return [[item for item, lane in zip(items, lane_of, strict=True) if lane == number] for number in range(lanes)]


def _kept(held: Tokens, item: _Item) -> int:
    """How many of the tokens that a slot holds an item goes on from. The token whose logits are wanted first is
    computed in any case."""
    most = min(len(held), item.first)
    # Slices compare a hundred times as fast as tokens in a loop.
    return bisect_right(range(1, most + 1), 0, key=lambda length: held[:length] != item.tokens[:length])


class _Lane:
    """Takes the items of one slot one after the other."""

    def __init__(self, slot: int, items: Sequence[_Item]) -> None:
        self.slot = slot
        self._items = iter(items)
        self._held: Tokens = ()
        self.item: _Item | None = None
        self.done = 0  # tokens of the item that the slot holds
        self._sum = 0.0
        self._is_greedy = True

    def begin(self, cache: Cache) -> bool:
        """Take the next item if there is none. Returns whether there is one."""
        if self.item is None:
            self.item = next(self._items, None)
            if self.item is not None:
                self.done = _kept(self._held, self.item)
                cache.shorten(self.slot, self.done)
                self._held = self.item.tokens
                self._sum, self._is_greedy = 0.0, True
        return self.item is not None

    def row(self, most_tokens: int, most_logits: int) -> Row:
        """The next tokens of the item, and the logits that are wanted of them."""
        item = self.item
        assert item is not None
        wanted_from = max(self.done, item.first)
        stop = min(self.done + most_tokens, wanted_from + most_logits, len(item.tokens))
        return Row(slot=self.slot, token_ids=item.tokens[self.done : stop], num_logits=max(0, stop - wanted_from))

    def take(self, row: Row, logits: Floats) -> dict[int, tuple[float, bool]] | None:
        """Take the logits [R, V] of a row. Returns last token -> (log-probability of the target that ends with it,
        whether it is greedy) when the item is done."""
        item = self.item
        assert item is not None
        self.done += len(row.token_ids)
        place = self.done - row.num_logits  # of the token that gives the first of these logits
        for values in logits:
            best, highest, total = _summed(values)
            if place + 1 == len(item.tokens):
                self.item = None
                return {
                    token: (self._sum + float(values[token]) - highest - total, self._is_greedy and token == best)
                    for token in item.last_tokens
                }
            token = item.tokens[place + 1]
            self._sum += float(values[token]) - highest - total
            self._is_greedy = self._is_greedy and token == best
            place += 1
        return None


def _summed(values: Floats) -> tuple[int, float, float]:
    """The likeliest id of logits [V], its logit, and the logarithm of the sum of exp(logit - that logit). The id is
    that of the first NaN where there is one."""
    best = int(values.argmax())
    highest = float(values[best])
    if not math.isfinite(highest):
        return best, math.nan, math.nan
    shifted = np.subtract(values, values[best], dtype=np.float64)
    return best, highest, math.log(np.exp(shifted, out=shifted).sum())


def _run(
    session: Session, cache: Cache, runs: Sequence[Sequence[_Item]]
) -> Iterator[tuple[_Item, dict[int, tuple[float, bool]]]]:
    """Yield each item with what its lane found, as `_Lane.take` gives it."""
    lanes = [_Lane(slot, items) for slot, items in enumerate(runs)]
    most_logits = max(len(lanes), LOGITS_BYTES // (4 * session.vocab_size))
    while active := [lane for lane in lanes if lane.begin(cache)]:
        most_tokens = min(PREFILL_CHUNK_TOKENS, max(1, STEP_TOKENS // len(active)))
        rows = [lane.row(most_tokens, max(1, most_logits // len(active))) for lane in active]
        logits, begin = session.step(cache, rows), 0
        for lane, row in zip(active, rows, strict=True):
            item = lane.item
            found = lane.take(row, logits[begin : begin + row.num_logits])
            begin += row.num_logits
            if found is not None and item is not None:
                if not all(math.isfinite(log_prob) for log_prob, _ in found.values()):
                    raise EngineError(
                        f"evaluating the engine {named(session.engine.folder)}: its logits are not finite; check it "
                        "with moeship verify"
                    )
                yield item, found
