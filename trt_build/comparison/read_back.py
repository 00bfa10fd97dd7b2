"""The weights that an engine stores, read back from its files in the checkpoint's own layout.

Each backend has a class of its own, which knows its files. What is shared reads them for the comparison with the
checkpoint (`weights.py`) and for the reference on what is stored (`export/reference`).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.tensor_table import CHUNK_ELEMENTS, TensorSpec, Weights
from export.floats import widen
from export.quantize.grid import block_scales, dequantize_blocks, quantize_blocks

FloatArray = npt.NDArray[np.float32]

# Chunks of rows begin at multiples of it: ONNX Runtime's engines store sixteen rows side by side (MatrixLayout), and an
# import of their layout would be one of the other backend.
ROW_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a quantised matrix is stored: bits of a code, input features that share a scale (0: all of a row), and the
    scales' dtype; `late`: whether scales are rounded to it after the codes were computed."""

    bits: int
    block: int
    scale_type: str
    late: bool = False
    nearest: bool = False

    def __str__(self) -> str:
        return f"int{self.bits} in blocks of {self.block}" if self.block else f"int{self.bits} with a scale a row"


@dataclass(frozen=True, kw_only=True)
class ReadBack(Weights, abc.ABC):
    """An engine's weights under our names. `experts`: a row that stacks experts or belongs to a router -> the experts
    in the order in which the engine stores them. `checksums`: a row whose codes were solved over a calibration text ->
    the checksum of each of its matrices (export/quantize/solved.py)."""

    experts: Mapping[str, tuple[int, ...]]
    checksums: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @abc.abstractmethod
    def recipe(self, name: str) -> Recipe | None:
        """How a row is quantised; None if it is stored as floats, or not at all."""

    @abc.abstractmethod
    def misfit(self, name: str) -> str | None:
        """What is wrong with the shapes in which a row is stored, in words; None if nothing is."""

    @abc.abstractmethod
    def part_rows(self, name: str, group: int, first: int, last: int, copy: int = 0) -> list[FloatArray]:
        """Rows `first` to `last` of each part of a group of a row, float32, as `TensorSpec.groups` has them. `copy` is
        an index of `copies`. Raises EngineError for an expert that the engine does without."""

    @abc.abstractmethod
    def rounded(self, name: str, group: int, first: int, values: npt.NDArray[Any]) -> FloatArray:
        """The float32 values that a row which is not quantised should have where the checkpoint has `values`, which are
        its rows from `first` on."""

    def part_scales(self, name: str, group: int, first: int, last: int) -> Sequence[FloatArray] | None:  # noqa: ARG002
        """The scales of the blocks of `part_rows`, [rows, P], where a sound engine has the nearest code for each weight
        on them; None where it need not have."""
        return None

    def copies(self, name: str) -> Sequence[str]:  # noqa: ARG002 - for classes that store copies
        """The places that hold a row as a whole, in words; one without a name, unless a row is stored several times."""
        return ("",)

    def requantized(self, name: str, values: FloatArray) -> FloatArray:
        """Values [rows, K] of a quantised row of the table as a sound quantiser would store them, dequantised."""
        recipe = self.recipe(name)
        assert recipe is not None
        if not recipe.block:
            return values  # which are those of the grid (`weights.py: nearest_of_rows`)
        halves = recipe.scale_type == "float16" and not recipe.late
        codes, scales = quantize_blocks(
            values, recipe.bits, recipe.block, half_scales=halves, refit=self.is_packed(name), nearest=recipe.nearest
        )
        return dequantize_blocks(codes, self._rounded_late(name, scales) if recipe.late else scales, recipe.bits)

    def sound_scales(self, name: str, values: FloatArray) -> FloatArray:
        """The scales [rows, P] of the blocks of `requantized`, of a row that the checkpoint has no packed codes of."""
        recipe = self.recipe(name)
        assert recipe is not None
        assert recipe.block
        halves = recipe.scale_type == "float16" and not recipe.late
        scales = block_scales(values, recipe.bits, recipe.block, half_scales=halves, nearest=recipe.nearest)
        return self._rounded_late(name, scales) if recipe.late else scales

    def _rounded_late(self, name: str, scales: FloatArray) -> FloatArray:
        factor = np.float32(self.row_factor(name))
        with np.errstate(over="ignore", under="ignore"):
            return widen((scales * factor).astype(np.float16)) / factor

    def searched_otherwise(self, name: str) -> bool:  # noqa: ARG002 - for classes whose files say by which search
        """Whether the scales of a row were chosen by a search of another version than `requantized` has."""
        return False

    def row_factor(self, name: str) -> float:  # noqa: ARG002 - for classes whose rows carry one
        """The power of two, at most 1, that the scales of some rows of a matrix carry where they are stored. float16
        holds a small scale the less exactly for it."""
        return 1.0

    def is_packed(self, name: str) -> bool:
        """Whether the checkpoint stores a row packed."""
        return any(part.packed_in(self.checkpoint) is not None for part in self.table[name].parts)

    def keeps_codes(self, name: str) -> bool:
        """Whether an engine keeps the codes that the checkpoint has of a row, so that it has the checkpoint's values,
        but for the rounding of scales. Of packed rows their groups and zero points are read."""
        recipe = self.recipe(name)
        if recipe is None or not recipe.block or not self.is_packed(name):
            return False
        grid = self.grid(name)
        return grid is not None and grid.bits <= recipe.bits and grid.group_size % recipe.block == 0

    def rounds_zeros(self, name: str) -> bool:  # noqa: ARG002
        """Whether zero points of kept codes are stored as floats that are rounded."""
        return False

    def steps(self, name: str, values: FloatArray) -> FloatArray:
        """About how far two neighbouring codes are apart in each block of values [rows, K] of a quantised row of the
        table, float32 [rows, K / block], with the sign of the scale (export/quantize/grid.py)."""
        recipe = self.recipe(name)
        assert recipe is not None
        blocks = values.reshape(len(values), -1, recipe.block or values.shape[1])
        largest = np.abs(blocks).argmax(axis=2)[..., None]
        steps: FloatArray = np.take_along_axis(blocks, largest, axis=2)[..., 0] / np.float32(-(2 ** (recipe.bits - 1)))
        return steps

    def stored_groups(self, spec: TensorSpec) -> Sequence[int]:
        """The groups of a row that are stored: all, or those of the experts that the engine has."""
        return self.experts[spec.name] if spec.stacks_experts else range(len(spec.groups))

    def load(self, name: str) -> FloatArray:
        """Read a whole weight, float32, in the table's shape."""
        whole = np.empty(self.table[name].shape, dtype=np.float32)
        flat, done = whole.reshape(-1), 0
        for chunk in self.chunks(name):
            flat[done : done + chunk.size] = chunk.reshape(-1)
            done += chunk.size
        return whole

    def load_rows(self, name: str, rows: slice) -> FloatArray:
        """Read some rows of a weight that is one tensor of the checkpoint, float32 [rows, ...]."""
        first, last, _ = rows.indices(self.table[name].parts[0].shape[0])
        return self.part_rows(name, 0, first, last)[0]

    def placed_chunks(
        self, name: str, expert_order: Sequence[int] | None = None, multiple: int = ROW_MULTIPLE
    ) -> Iterator[tuple[int, int, list[npt.NDArray[Any]]]]:
        """Read a weight in chunks, as `Weights.placed_chunks` does, in float32."""
        groups = self.table[name].groups
        for index in range(len(groups)) if expert_order is None else expert_order:
            num_rows, *others = groups[index][0].shape
            step = max(1, CHUNK_ELEMENTS // max(1, len(groups[index]) * math.prod(others)))
            step = max(multiple, step - step % multiple)
            for row in range(0, num_rows, step):
                yield index, row, list(self.part_rows(name, index, row, min(row + step, num_rows)))
