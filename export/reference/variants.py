"""Computes variants of a model in one pass over its weights: in each of them, some weights come from another source.

    parts = [Part(role=Role.EXPERT, layer=3), Part(role=Role.HEAD)]
    for logits in Variants(model, stored, parts).run([[1, 2, 3], [4, 5]]):
        logits.shape           # (3, 5, n): n columns of the logits of the 5 tokens; the model's own, then the variants'

The hidden states of all variants go through a layer together. So each matrix is read once in each of its two forms,
however many variants there are. A variant begins at the first layer that differs from the model's: before that it is
the model.

Memory in values of 4 bytes, for V variants of T tokens: 3 * (V + 1) * T * H, twice the weights that `model.py` holds,
and the products of ROWS_TOGETHER tokens. A layer computes T tokens for each variant that has begun, and the head T
tokens for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export.checkpoint.tensor_table import Role, Weights
from export.families import Model
from export.families.shared.network import Layer, Mlp
from export.reference.attention import Projections
from export.reference.mixture import add_expert, route, router_logits, share_of_shared
from export.reference.model import Windows, bounds_of, embedding_rows, head_slices
from export.reference.operations import FloatArray, normalise
from export.reference.reader import Reader
from export.routing import below_the_kept

ROWS_TOGETHER = 512  # tokens that go through attention at a time, at least those of one variant
Rows = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Part:
    """The weights that a variant takes from the other source. `role` is EMBEDDING or HEAD, or, with a layer, ATTENTION,
    or EXPERT or FFN, which are a layer's MLP; biases of their modules belong to them. None: all weights of the model.
    `expert` None: all experts of the layer."""

    role: Role | None
    layer: int | None = None
    expert: int | None = None


class Variants:
    """A model, and a variant of it for each part. `other` has the model's table. `dropped`: layer -> the experts that
    neither the model nor its variants have."""

    def __init__(
        self, model: Model, other: Weights, parts: Sequence[Part], dropped: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        self._model, self._other, self._dropped = model, other, dropped or {}
        self._network = model.family.network(model.weights.checkpoint.config)
        # In the order in which they begin, so that those that have begun are the first rows of the states.
        self._order = sorted(range(len(parts)), key=lambda index: begin(parts[index], len(self._network.layers)))
        self._parts = [None, *(parts[index] for index in self._order)]

    def run(self, windows: Windows, progress: Callable[[str], None] = lambda _: None) -> Iterator[FloatArray]:
        """Yield the logits [1 + V, T, n] of the model and of its variants, in the order of the parts, in slices of
        their columns. Raises CheckpointError as `Reference.run` does."""
        tokens = [token for window in windows for token in window]
        layers, bounds = self._network.layers, bounds_of(windows)
        own, other = Reader(self._model.weights), Reader(self._other)
        states = np.empty((len(self._parts), len(tokens), self._hidden()), dtype=np.float32)
        begins = [0 if part is None else begin(part, len(layers)) for part in self._parts]
        for row, part in enumerate(self._parts):
            if part is None or part.role in (None, Role.EMBEDDING):
                weights = self._model.weights if part is None else self._other
                states[row] = embedding_rows(self._model, tokens, weights)
                states[row] *= np.float32(self._network.embedding_factor)
        for index, layer in enumerate(layers):
            live = sum(first <= index for first in begins)
            progress(f"computing {live} variants of the reference: {index} of {len(layers)} layers")
            new = [row for row in range(live) if self._parts[row] is not None and begins[row] == index]
            states[[row for row in new if not self._is_embedded(row)]] = states[0]
            self._run_layer(index, layer, states[:live], bounds, (own, other))
        del own, other
        states[sum(first < len(layers) for first in begins) :] = states[0]
        yield from self._head(states)

    def _is_embedded(self, row: int) -> bool:
        part = self._parts[row]
        return part is None or part.role in (None, Role.EMBEDDING)

    def _hidden(self) -> int:
        return self._model.weights.table[f"{self._network.embedding}.weight"].shape[1]

    def _takes(self, count: int, *roles: Role, layer: int | None = None) -> Rows:
        """Which of the first `count` variants take some weights of a layer's roles from the other source, bool
        [count]."""
        return np.array(
            [
                part is not None and (part.role is None or (part.role in roles and part.layer == layer))
                for part in self._parts[:count]
            ]
        )

    def _run_layer(
        self, index: int, layer: Layer, states: FloatArray, bounds: Sequence[int], readers: tuple[Reader, Reader]
    ) -> None:
        """Send the states [v, T, H] of the variants that have begun through a layer, in place."""
        count, num_tokens, hidden = states.shape
        inputs = np.empty_like(states)  # of the MLP
        whole, replaced = self._takes(count), self._takes(count, Role.ATTENTION, layer=index)
        step = max(1, ROWS_TOGETHER // max(1, num_tokens))
        for reader, rows in zip(readers, (~replaced, replaced), strict=True):
            projections = Projections(layer.attention, reader) if rows.any() else None
            for weights, some in ((self._model.weights, rows & ~whole), (self._other, rows & whole)):
                places = np.flatnonzero(some)
                for block in (places[start : start + step] for start in range(0, len(places), step)):
                    assert projections is not None
                    x = states[block].reshape(-1, hidden)
                    normed = normalise(x, layer.norm, weights)
                    attended = projections.attended(normed, _repeated(bounds, len(block)))
                    x += normalise(attended, layer.attention_output_norm, weights) * np.float32(layer.factor)
                    states[block] = x.reshape(-1, num_tokens, hidden)
                    normed = normed if layer.parallel else normalise(x, layer.mlp_norm, weights)
                    inputs[block] = normed.reshape(-1, num_tokens, hidden)
        outputs = self._mlp(index, layer.mlp, inputs, readers)
        for weights, rows in ((self._model.weights, ~whole), (self._other, whole)):
            if layer.mlp_output_norm is not None and rows.any():
                outputs[rows] = normalise(outputs[rows], layer.mlp_output_norm, weights)
        outputs *= np.float32(layer.factor)
        states += outputs

    def _mlp(self, index: int, mlp: Mlp, inputs: FloatArray, readers: tuple[Reader, Reader]) -> FloatArray:
        """The outputs [v, T, H] of a layer's MLP for its inputs [v, T, H]."""
        count, num_tokens, hidden = inputs.shape
        x = inputs.reshape(-1, hidden)
        result = np.zeros_like(x)
        chosen, shares = np.zeros((len(x), 1), dtype=np.int64), None
        num_experts = 1
        if mlp.gate is not None:
            logits = router_logits(x, mlp.gate, self._model.weights)
            whole = np.repeat(self._takes(count), num_tokens)
            logits[whole] = router_logits(x[whole], mlp.gate, self._other)
            logits = below_the_kept(logits, self._dropped.get(index, ()))
            chosen, shares = route(logits, mlp.router, self._model.architecture.experts_per_token)
            num_experts = logits.shape[1]
        for expert in range(num_experts):
            replaced = self._takes(count, Role.EXPERT, Role.FFN, layer=index)
            for row, part in enumerate(self._parts[:count]):
                replaced[row] &= part is not None and part.expert in (None, expert)
            by_token = np.repeat(replaced, num_tokens)[:, None]
            for reader, rows in zip(readers, (~by_token, by_token), strict=True):
                tokens, places = np.nonzero((chosen == expert) & rows)
                if len(tokens):
                    own = None if shares is None else shares[tokens, places, None]
                    add_expert(result, x, tokens, own, mlp, reader, expert)
        if mlp.shared is not None:
            whole = np.repeat(self._takes(count), num_tokens)
            shares = share_of_shared(x, mlp, self._model.weights)
            shares[whole] = share_of_shared(x[whole], mlp, self._other)
            replaced = self._takes(count, Role.EXPERT, Role.FFN, layer=index)
            replaced &= [part is not None and part.expert is None for part in self._parts[:count]]
            by_token = np.repeat(replaced, num_tokens)
            for reader, rows in zip(readers, (~by_token, by_token), strict=True):
                tokens = np.flatnonzero(rows)
                if len(tokens):
                    add_expert(result, x, tokens, shares[tokens], mlp.shared, reader, 0)
        return result.reshape(inputs.shape)

    def _head(self, states: FloatArray) -> Iterator[FloatArray]:
        """The logits of the last layer's states [1 + V, T, H], in the order of the parts. Overwrites the states."""
        count, num_tokens, _ = states.shape
        whole, replaced = self._takes(count), self._takes(count, Role.HEAD)
        for row in range(count):
            weights = self._other if whole[row] else self._model.weights
            states[row] = normalise(states[row], self._network.norm, weights)
        places = np.empty(count, dtype=np.int64)
        places[[0, *(1 + index for index in self._order)]] = np.arange(count)
        both = zip(
            head_slices(self._network, self._model.weights), head_slices(self._network, self._other), strict=True
        )
        for (columns, matrix, bias), (_, other, other_bias) in both:
            logits = np.empty((count, num_tokens, columns.stop - columns.start), dtype=np.float32)
            for place, row in enumerate(places.tolist()):
                used, added = (other, other_bias) if replaced[row] else (matrix, bias)
                np.matmul(states[row], used.T, out=logits[place])
                logits[place] += added
            logits /= np.float32(self._network.logits_divisor)
            yield logits


def begin(part: Part, num_layers: int) -> int:
    """The first layer whose computation differs from the model's: 0 for the embedding, `num_layers` for the head."""
    if part.role is Role.HEAD:
        return num_layers
    return 0 if part.layer is None else part.layer


def _repeated(bounds: Sequence[int], times: int) -> list[int]:
    """The bounds of the windows of several variants, one after the other."""
    return [turn * bounds[-1] + bound for turn in range(times) for bound in bounds[:-1]] + [times * bounds[-1]]
