"""Causal attention in blocks of queries, so that its memory does not grow with the square of a window's length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from export import rotary
from export.families.shared.network import Attention
from export.reference.operations import FloatArray, normalise, softmax_in_place
from export.reference.reader import Reader

_SCORE_VALUES = 1 << 22  # products of query and key that are held at a time, 16 MiB; at least those of one position
_MOST_QUERIES = 256  # positions of a block: half of the products on its diagonal are computed for nothing


class Projections:
    """A layer's attention with its matrices in float32, each read once: those of the inputs at once, the output's when
    it is needed. They are in slots of `reader`, so they are valid until it reads another layer's."""

    def __init__(self, attention: Attention, reader: Reader) -> None:
        slots = ["input", *(f"input {turn}" for turn in range(1, len(attention.inputs)))]
        self._attention, self._reader = attention, reader
        self._matrices = [
            reader.matrix(slot, f"{name}.weight") for slot, name in zip(slots, attention.inputs, strict=True)
        ]
        self._biases = [reader.bias(name) for name in attention.inputs]
        self._sinks = None if attention.sinks is None else reader.weights.load(attention.sinks)
        self._output: FloatArray | None = None

    def attended(self, x: FloatArray, bounds: Sequence[int]) -> FloatArray:
        """Attention's output [T, H] for its normed input [T, H]; each window by itself. `bounds` are the first row of
        each window, and T."""
        return self.output(self.heads(x, bounds))

    def heads(self, x: FloatArray, bounds: Sequence[int]) -> FloatArray:
        """What enters attention's output, [T, N*D], for its normed input [T, H]."""
        windows = [slice(first, last) for first, last in pairwise(bounds) if first < last]
        width = self._reader.weights.table[f"{self._attention.output}.weight"].shape[1]
        head_size = width // self._attention.num_heads
        lengths = [rows.stop - rows.start for rows in windows]
        tables = {
            long: rotary_tables(max(length for length in lengths if self._is_long(length) == long), self._attention)
            for long in {self._is_long(length) for length in lengths}
        }
        heads = np.empty((len(x), width), dtype=np.float32)
        widths = [len(matrix) for matrix in self._matrices]
        for rows in windows:
            products = self._reader.space("products", (rows.stop - rows.start, sum(widths)))
            for matrix, bias, end in zip(self._matrices, self._biases, np.cumsum(widths).tolist(), strict=True):
                own = products[:, end - len(matrix) : end]
                np.matmul(x[rows], matrix.T, out=own)
                own += bias
            self._condition(products, head_size)
            turned = tables[self._is_long(rows.stop - rows.start)]
            heads[rows] = attend(products, self._attention, head_size, turned, self._sinks)
        return heads

    def _condition(self, products: FloatArray, head_size: int) -> None:
        """Normalise and clip queries, keys and values [S, (N+2G)*D] in place, where the attention says so."""
        own = self._attention
        queries = own.num_heads * head_size
        keys = slice(queries, queries + own.num_kv_heads * head_size)
        for columns, norm in ((slice(queries), own.query_norm), (keys, own.key_norm)):
            if norm is not None:
                together = self._reader.weights.table[f"{norm.name}.weight"].shape[0]
                values = products[:, columns].reshape(-1, together)
                products[:, columns] = normalise(values, norm, self._reader.weights).reshape(len(products), -1)
        if own.clip is not None:
            np.clip(products, -np.float32(own.clip), np.float32(own.clip), out=products)

    def output(self, heads: FloatArray) -> FloatArray:
        """Attention's output [T, H] for the heads' outputs [T, N*D]."""
        if self._output is None:
            self._output = self._reader.matrix("output", f"{self._attention.output}.weight")
        result: FloatArray = heads @ self._output.T
        result += self._reader.bias(self._attention.output)
        return result

    def _is_long(self, length: int) -> bool:
        """Whether a text of `length` positions has the tables of long texts, if the scaling has such."""
        scaling = self._attention.rotary_scaling
        return scaling is not None and length > scaling.original_positions


def rotary_tables(length: int, attention: Attention) -> tuple[FloatArray, FloatArray]:
    """cos and sin, float32 [length, rotary_dim / 2], for a text of `length` positions (export/rotary.py)."""
    return rotary.tables(length, attention.rotary_dim, attention.rotary_base, attention.rotary_scaling)


def attend(
    products: FloatArray,
    attention: Attention,
    head_size: int,
    tables: tuple[FloatArray, FloatArray],
    sinks: FloatArray | None = None,
) -> FloatArray:
    """Attention of one window of S tokens: [S, (N+2G)*D], which is all queries, then all keys, then all values, to the
    heads' outputs [S, N*D]. `tables` are those of `rotary_tables`, of S positions or more. `sinks` [N] are further
    logits of the softmax, one for each query head.

    Beside queries, keys, values and result it holds the scores of a block of queries for the query heads of one
    key/value head: at most _SCORE_VALUES, or N/G rows of S if these are more.
    """
    length, heads, shared = len(products), attention.num_heads, attention.num_kv_heads
    each = heads // shared  # query heads of a key/value head
    stacked = products.reshape(length, heads + 2 * shared, head_size).transpose(1, 0, 2)  # [N+2G, S, D]
    queries = np.ascontiguousarray(stacked[:heads])
    keys, values = (
        np.ascontiguousarray(stacked[heads : heads + shared]),
        np.ascontiguousarray(stacked[heads + shared :]),
    )
    for turned in (queries, keys):
        _turn(turned, tables[0][:length], tables[1][:length])
    queries *= np.float32(1 / math.sqrt(head_size) if attention.factor is None else attention.factor)
    result = np.empty((length, heads, head_size), dtype=np.float32)
    step = min(_MOST_QUERIES, max(1, _SCORE_VALUES // (each * length)))
    for start in range(0, length, step):
        stop = min(start + step, length)
        first = 0 if attention.window is None else max(0, start + 1 - attention.window)
        hidden = _hidden(np.arange(start, stop), np.arange(first, stop), attention.window)
        for group in range(shared):
            own = slice(group * each, (group + 1) * each)
            scores = queries[own, start:stop] @ keys[group, first:stop].T  # [N/G, block, keys]
            np.copyto(scores, np.float32(-np.inf), where=hidden)
            shares = softmax_in_place(scores, None if sinks is None else sinks[own, None, None])
            result[start:stop, own] = (shares @ values[group, first:stop]).transpose(1, 0, 2)
    return result.reshape(length, heads * head_size)


def _hidden(queries: np.ndarray, keys: np.ndarray, window: int | None) -> np.ndarray:
    """Which keys a query does not see, bool [queries, keys], by their positions: later ones, and those that lie
    `window` positions back or more."""
    distance = queries[:, None] - keys[None, :]
    return (distance < 0) if window is None else (distance < 0) | (distance >= window)


def _turn(heads: FloatArray, cos: FloatArray, sin: FloatArray) -> None:
    """Turn the first rotary_dim values of [heads, S, D] in place, value i with value i + rotary_dim / 2."""
    half = cos.shape[1]
    left, right = heads[..., :half].copy(), heads[..., half : 2 * half].copy()
    heads[..., :half] = left * cos - right * sin
    heads[..., half : 2 * half] = right * cos + left * sin
