"""A checkpoint's weights with the codes of some rows in their place, for the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.tensor_table import CHUNK_ELEMENTS, Weights
from export.quantize.gptq import Codes


@dataclass(frozen=True, kw_only=True)
class Overlay(Weights):
    """Weights of which some rows are dequantised from `solved`: row -> its matrices' codes, one an expert, or one alone
    for a row that stacks none. An expert that is not there has the checkpoint's weights."""

    solved: Mapping[str, Mapping[int, Codes]] = field(default_factory=dict)

    def load_rows(self, name: str, rows: slice) -> npt.NDArray[np.float32]:
        codes = self.solved.get(name, {}).get(0)
        return super().load_rows(name, rows) if codes is None else codes.part(rows.start, rows.stop).values()

    def placed_chunks(
        self, name: str, expert_order: Sequence[int] | None = None, multiple: int = 1
    ) -> Iterator[tuple[int, int, list[npt.NDArray[Any]]]]:
        spec = self.table[name]
        for index in range(len(spec.groups)) if expert_order is None else expert_order:
            codes = self.solved.get(name, {}).get(index if spec.stacks_experts else 0)
            if codes is None:
                yield from super().placed_chunks(name, [index], multiple)
                continue
            before = 0 if spec.stacks_experts else sum(parts[0].shape[0] for parts in spec.groups[:index])
            turns, (num_rows, *others) = len(spec.groups[index]), spec.groups[index][0].shape
            step = max(1, CHUNK_ELEMENTS // max(1, turns * math.prod(others)))
            step = max(multiple, step - step % multiple)
            for row in range(0, num_rows, step):
                last = min(row + step, num_rows)
                values = codes.part(before + turns * row, before + turns * last).values()
                yield index, row, [values[turn::turns] for turn in range(turns)]
