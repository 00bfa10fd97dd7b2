"""One call of the serving graph (`export.onnx_graph.forms`): where the tokens of its rows lie, and the memory that its
inputs are read from.

    call = StepCall(rows, binding, mixes_lengths=True)
    call.fill(rows, cache.lengths)
    call.bind_inputs()

What depends only on which slots take how many tokens is computed once. Steps of answers take one token in each slot,
and the slots are the same until a sequence begins or ends, so their calls are kept and only filled again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from export.onnx_graph import names

Key = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a step does with one sequence: append `token_ids` (at least one) to the slot, and give the logits of the
    last `num_logits` of them."""

    slot: int
    token_ids: Sequence[int]
    num_logits: int = 1


def key_of(rows: Sequence[Row]) -> Key:
    """Slot, number of tokens and number of logits of each row: equal for rows that one StepCall can take."""
    return tuple((row.slot, len(row.token_ids), row.num_logits) for row in rows)


def span_of(rows: Sequence[Row]) -> tuple[int, int]:
    """The first slot of the rows, and the one after the last. A call covers all slots between them."""
    slots = [row.slot for row in rows]
    return min(slots), max(slots) + 1


class StepCall:
    """A call for rows of given slots and lengths, by an IOBinding that has the keys and values of all slots between the
    first and the last. Only with `mixes_lengths` may rows take different numbers of tokens."""

    def __init__(self, rows: Sequence[Row], binding: Any, *, mixes_lengths: bool) -> None:  # noqa: ANN401 - an IOBinding
        self.binding = binding
        self._first, self._stop = first, stop = span_of(rows)
        counts = np.array([len(row.token_ids) for row in rows], dtype=np.int64)
        widest, ends = int(counts.max()), np.cumsum(counts)
        places = np.array([row.slot for row in rows], dtype=np.int64) - first
        # The place of each token: its sequence's row of [B, S], and its number among the sequence's tokens.
        query_of_token = np.arange(ends[-1]) + np.repeat(places * widest - (ends - counts), counts)
        token_of_query = np.zeros((stop - first) * widest, dtype=np.int64)
        token_of_query[query_of_token] = np.arange(ends[-1])
        new_lengths = np.zeros(stop - first, dtype=np.int32)
        new_lengths[places] = counts
        wanted = [np.arange(end - row.num_logits, end) for row, end in zip(rows, ends.tolist(), strict=True)]
        self._last_offsets = new_lengths - 1
        self._tokens = np.empty(ends[-1], dtype=np.int64)
        self._last_positions = np.empty(stop - first, dtype=np.int32)
        self._total_length = np.empty((), dtype=np.int32)
        self._inputs = {
            names.INPUT_IDS: self._tokens, names.TOKEN_OF_QUERY: token_of_query.reshape(stop - first, widest),
            names.QUERY_OF_TOKEN: query_of_token, names.LAST_POSITIONS: self._last_positions,
            names.TOTAL_LENGTH: self._total_length, names.LOGIT_TOKENS: np.concatenate(wanted),
        }  # fmt: skip
        if mixes_lengths:
            self._inputs[names.NEW_LENGTHS] = new_lengths
        self._logits_place = 0

    def fill(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """Take the tokens of rows with this call's key, and how many positions each slot of the cache holds."""
        self._tokens[:] = list(chain.from_iterable(row.token_ids for row in rows))
        np.add(lengths[self._first : self._stop], self._last_offsets, out=self._last_positions)
        np.maximum(self._last_positions, 0, out=self._last_positions)
        self._total_length[...] = self._last_positions.max() + 1

    def bind_inputs(self) -> None:
        """Bind the inputs. A device with its own memory takes a copy of them, so there every call is bound anew."""
        for name, array in self._inputs.items():
            self.binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def bind_logits(self, logits: npt.NDArray[np.float32]) -> None:
        """Have the logits written to [R, V]."""
        place = logits.ctypes.data
        if place != self._logits_place:
            self.binding.bind_output(names.LOGITS, "cpu", 0, np.float32, logits.shape, place)
            self._logits_place = place
