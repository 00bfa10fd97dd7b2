"""Reads weights into memory that is used again, since touching new memory takes longer than converting what is read."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from export.checkpoint.tensor_table import Weights
from export.floats import widen
from export.reference.operations import FloatArray


class Reader:
    """A model's weights in float32. What it returns of a slot is valid until the next use of that slot; `slot` is any
    name. The memory of a slot is as large as the largest use so far."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._slots: dict[Hashable, FloatArray] = {}

    def space(self, slot: Hashable, shape: tuple[int, ...]) -> FloatArray:
        """An array of this shape with any values, float32."""
        size = math.prod(shape)
        if slot not in self._slots or self._slots[slot].size < size:
            self._slots.pop(slot, None)  # freed before as much again is taken
            self._slots[slot] = np.empty(size, dtype=np.float32)
        return self._slots[slot][:size].reshape(shape)

    def matrix(self, slot: Hashable, name: str) -> FloatArray:
        """A matrix [out, in] of the table that does not stack experts."""
        spec = self.weights.table[name]
        whole = self.space(slot, spec.shape)
        self._read(whole.reshape(-1), name, range(len(spec.groups)))
        return whole

    def expert(self, slot: Hashable, name: str, expert: int) -> list[FloatArray]:
        """The matrices [out, in], or biases [out], of one expert in a row of the table that stacks experts: one, or two
        if the row alternates between them. A row that stacks nothing has the expert 0 alone."""
        parts = self.weights.table[name].groups[expert]
        flat = self.space(slot, (sum(part.num_elements for part in parts),))
        self._read(flat, name, [expert])
        ends = np.cumsum([part.num_elements for part in parts])
        return [flat[end - part.num_elements : end].reshape(part.shape) for part, end in zip(parts, ends, strict=True)]

    def bias(self, name: str) -> FloatArray | float:
        """A module's bias, float32 [out]; 0 if the table has none."""
        return self.weights.load(f"{name}.bias") if f"{name}.bias" in self.weights.table else 0.0

    def _read(self, flat: FloatArray, name: str, groups: Sequence[int]) -> None:
        """Read the parts of some groups of a row, one after the other, in chunks."""
        starts = {}
        done = 0
        for group in groups:
            for turn, part in enumerate(self.weights.table[name].groups[group]):
                starts[group, turn] = done
                done += part.num_elements
        for group, row, chunks in self.weights.placed_chunks(name, groups):
            for turn, chunk in enumerate(chunks):
                first = starts[group, turn] + row * math.prod(chunk.shape[1:])
                flat[first : first + chunk.size] = widen(chunk).reshape(-1)
