"""Reads the tensors of a merged checkpoint from the models that they are taken from, chunk by chunk.

`export.merge.outputs` lists the tensors and says which model each is from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.safetensors_header import FLOAT_LABELS, numpy_dtype
from export.checkpoint.shard_writer import PlannedTensor
from export.checkpoint.tensor_table import CHUNK_ELEMENTS, Part
from export.errors import CheckpointError, MergeError
from export.families import Model
from export.floats import all_finite
from export.merge.config import ExpertSource

DTYPE_NAMES = {label: name for name, label in FLOAT_LABELS.items()}


@dataclass(frozen=True, kw_only=True)
class MergedTensor:
    """One tensor of the merged checkpoint: the row `row` of the table of the expert `expert`, or of the base if that is
    None. With `part` it is that part of the row alone. `residual` says that the tensor makes what the expert adds to
    the residual. A shared expert comes after the others. A gate has no row: it is the router's, or that of the shared
    expert if it has an `expert`."""

    planned: PlannedTensor
    layer: int | None
    expert: int | None
    row: str | None
    part: int | None = None
    residual: bool = False

    @property
    def is_router(self) -> bool:
        return self.row is None and self.expert is None


@dataclass(frozen=True, kw_only=True)
class MergeSources:
    """The opened models of a merge, a shared expert after the others, and the gates: layer -> [E, H], or [E+1, H], in
    the output dtype."""

    base: Model
    experts: Sequence[Model]
    settings: Sequence[ExpertSource]
    gates: Mapping[int, npt.NDArray[Any]]
    seed: int

    def chunks(self, tensor: MergedTensor) -> Iterator[npt.NDArray[Any]]:
        """Yield a tensor's values in the planned dtype, row-major, at most CHUNK_ELEMENTS at a time.

        Raises CheckpointError for a value that is NaN or infinite, MergeError for one that is too large for the dtype.
        """
        dtype = tensor.planned.dtype
        if tensor.row is None:
            assert tensor.layer is not None  # every gate has its layer
            first = tensor.expert or 0
            yield self.gates[tensor.layer][first : first + tensor.planned.shape[0]]
        elif tensor.expert is None:
            yield from _plain_chunks(self.base, tensor.row, tensor.part, dtype)
        elif _is_plain(self.settings[tensor.expert]):
            yield from _plain_chunks(self.experts[tensor.expert], tensor.row, tensor.part, dtype)
        else:
            yield from self._altered_chunks(tensor, tensor.expert, tensor.row)

    def _altered_chunks(self, tensor: MergedTensor, expert: int, row: str) -> Iterator[npt.NDArray[Any]]:
        """Yield the values of an expert's tensor with noise added, then multiplied by the residual scale if the tensor
        makes the expert's output. They are rounded to the dtype in which the expert stores them, and then to the
        planned one, as mergekit does (mergekit/moe/common.py, noise_and_scale)."""
        setting, checkpoint = self.settings[expert], self.experts[expert].weights.checkpoint
        scale = np.float32(setting.residual_scale if tensor.residual else 1.0)
        rng = np.random.default_rng([self.seed, expert, *tensor.planned.name.encode()])
        for part, rows in _row_slices(self.experts[expert], row, tensor.part):
            values = checkpoint.read_float32(part.name, rows)
            if setting.noise_scale:
                values = values + np.float32(setting.noise_scale) * rng.standard_normal(values.shape, dtype=np.float32)
            with np.errstate(over="ignore"):  # the result is checked below
                values = values * scale
            kept = checkpoint.tensors[part.name].dtype  # float64 is read as float32
            stored = cast(values, "F32" if kept == "F64" else kept, tensor.planned.name)
            yield cast(stored.astype(np.float32, copy=False), tensor.planned.dtype, tensor.planned.name)


def _is_plain(setting: ExpertSource) -> bool:
    return setting.noise_scale == 0.0 and setting.residual_scale == 1.0


def cast(values: npt.NDArray[Any], dtype: str, name: str) -> npt.NDArray[Any]:
    """Convert finite values to another float dtype, rounding to nearest even. Raises MergeError if one is too large."""
    with np.errstate(over="ignore"):
        converted = values.astype(numpy_dtype(dtype), copy=False)
    if not all_finite(converted):
        largest = float(np.abs(values).max())
        raise MergeError(
            f"merging {name}: a value of magnitude {largest:g} does not fit {DTYPE_NAMES[dtype]}; "
            "set dtype to bfloat16 or float32"
        )
    return converted


def _row_slices(model: Model, row: str, only: int | None) -> Iterator[tuple[Part, slice]]:
    """Yield a table row, or its part `only`, in pieces of at most CHUNK_ELEMENTS values: a part, and the rows of it."""
    parts = model.weights.table[row].parts
    for part in parts if only is None else parts[only : only + 1]:
        step = max(1, CHUNK_ELEMENTS // max(1, math.prod(part.shape[1:])))
        for start in range(0, part.shape[0], step):
            yield part, slice(start, min(start + step, part.shape[0]))


def _plain_chunks(model: Model, row: str, only: int | None, dtype: str) -> Iterator[npt.NDArray[Any]]:
    """Yield the values of a table row, or of its part `only`, in `dtype`. Values that are stored in that dtype are
    copied byte for byte."""
    checkpoint = model.weights.checkpoint
    for part, rows in _row_slices(model, row, only):
        if checkpoint.tensors[part.name].dtype != dtype:
            yield cast(checkpoint.read_float32(part.name, rows), dtype, row)
            continue
        values = checkpoint.read(part.name, rows)
        if not all_finite(values):
            raise CheckpointError(
                f"merging {part.name} from {checkpoint.tensors[part.name].shard}: it holds values that are NaN or "
                "infinite; the checkpoint is damaged or its training diverged: download it again or leave it out"
            )
        yield values
