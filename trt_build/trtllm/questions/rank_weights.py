"""The weights in the rank files of a TensorRT-LLM checkpoint, dequantised, in the source checkpoint's own layout.

    stored = open_rank_weights(plan, Path("engine.checkpoint"))
    stored.load_rows("lm_head.linear.weight", slice(0, 16))      # float32, (code - 2^(bits-1)) * scale
    Reference(dataclasses.replace(model, weights=stored))        # the reference on what the ranks hold

Undone are the packed layouts (`export/trtllm/packing.py`) and the shares of the ranks (`export/trtllm/layout.py`). The
files are mapped, and a few rows are dequantised at a time. What several ranks hold alike is stored several times; each
is a copy.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.safetensors_header import FLOAT_LABELS, StoredTensor, numpy_dtype, read_header
from export.checkpoint.tensor_table import Role
from export.errors import CheckpointError, ConfigError
from export.floats import widen
from export.quantize.grid import dequantize_blocks, quantize_blocks
from export.trtllm.carry import kept_grid
from export.trtllm.checkpoint import CheckpointPlan, calibration_of
from export.trtllm.converter import MASKED_LOGIT, rank_file
from export.trtllm.layout import Form, RankTensor, Slice, TensorJob
from export.trtllm.packing import INTERLEAVED_ROWS, unpack, unpack_pairs
from trt_build.calibration import SOLVED_SCALES, checksums_of
from trt_build.comparison.read_back import FloatArray, ReadBack, Recipe
from trt_build.errors import EngineError

ByteArray = npt.NDArray[np.uint8]
_DTYPES = {label: name for name, label in FLOAT_LABELS.items()}


@dataclass(frozen=True, kw_only=True)
class RankFile:
    """A rank's file, mapped, and its tensors by name."""

    mapped: mmap.mmap
    tensors: Mapping[str, StoredTensor]

    def array(self, name: str) -> npt.NDArray[Any]:
        """A tensor as it is stored, in its shape."""
        found = self.tensors[name]
        return self.bytes_of(name).view(numpy_dtype(found.dtype)).reshape(found.shape)

    def bytes_of(self, name: str) -> ByteArray:
        found = self.tensors[name]
        return np.frombuffer(self.mapped, dtype=np.uint8, count=found.num_bytes, offset=found.offset)


@dataclass(frozen=True, kw_only=True)
class RankWeights(ReadBack):
    """The weights of rank files under our names. `jobs`: a row -> what the writer makes of it."""

    jobs: Mapping[str, TensorJob]
    files: Mapping[int, RankFile]

    def recipe(self, name: str) -> Recipe | None:
        job = self.jobs[name]
        if job.form is Form.FLOAT:
            return None
        ending = "per_channel_scale" if job.form is Form.CHANNELS else "weights_scaling_factor"
        dtype = _DTYPES[next(iter(job.sides[ending].values())).planned.dtype]
        return Recipe(bits=job.bits, block=job.group_size, scale_type=dtype)

    def misfit(self, name: str) -> str | None:
        for tensor in self.jobs[name].all_tensors:
            found, planned = self.files[tensor.rank].tensors.get(tensor.planned.name), tensor.planned
            if found is None or (found.dtype, found.shape) != (planned.dtype, planned.shape):
                here = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                return (
                    f"{rank_file(tensor.rank)}, {planned.name}: found {here}, expected {planned.dtype} "
                    f"{list(planned.shape)}"
                )
        return None

    def copies(self, name: str) -> Sequence[str]:
        """One for each rank of the ranks that share the row's most often stored place."""
        most = max(self._places(name).values(), key=len)
        if len(most) == 1:
            return ("",)
        return tuple(f", rank {piece.rank}" for piece in most)

    def part_rows(self, name: str, group: int, first: int, last: int, copy: int = 0) -> list[FloatArray]:
        spec, job = self.table[name], self.jobs[name]
        if spec.stacks_experts and group not in self.experts[name]:
            raise EngineError(
                f"reading {name} of the rank files: expert {group} is asked for, and they do without it; build the "
                "engine with --keep-all-experts"
            )
        found = []
        for turn, part in enumerate(spec.groups[group]):
            values = np.zeros((last - first, max(1, math.prod(part.shape[1:]))), dtype=np.float32)
            if spec.role is Role.ROUTER and len(self.experts.get(name, ())) < part.shape[0]:
                # Rows of experts that are left out, which no token chooses.
                values[:] = part.read(self.checkpoint, slice(first, last)).reshape(values.shape)
            for (own, its_turn, begin, end, columns), pieces in self._places(name).items():
                low, high = max(first, begin), min(last, end)
                if (own, its_turn) == (group, turn) and low < high:
                    piece = pieces[min(copy, len(pieces) - 1)]
                    row = piece.row + low - begin
                    rows = self._rank_rows(job, job.tensors[piece.rank], row, row + high - low)
                    values[low - first : high - first, slice(*columns)] = rows
            found.append(values.reshape(last - first, *part.shape[1:]))
        return found

    def rounded(self, name: str, group: int, first: int, values: npt.NDArray[Any]) -> FloatArray:  # noqa: ARG002
        """The values rounded to the dtype of the tensor; biases of ids that stand for no text are masked."""
        job, expected = self.jobs[name], widen(values).copy()
        if job.mask_from is not None:
            expected[max(0, job.mask_from - first) :] = MASKED_LOGIT
        dtype = np.dtype(numpy_dtype(next(iter(job.tensors.values())).planned.dtype))
        with np.errstate(over="ignore"):
            return expected if dtype == np.float32 else widen(expected.astype(dtype))

    def requantized(self, name: str, values: FloatArray) -> FloatArray:
        """The codes are those of float32 scales, which are rounded after them."""
        recipe = self.recipe(name)
        if recipe is None or not recipe.block:
            return values
        codes, scales = quantize_blocks(values, recipe.bits, recipe.block, refit=self.is_packed(name))
        if recipe.scale_type != "float32":
            scales = widen(scales.astype(numpy_dtype(FLOAT_LABELS[recipe.scale_type])))
        return dequantize_blocks(codes, scales, recipe.bits)

    def keeps_codes(self, name: str) -> bool:
        return self.is_packed(name) and kept_grid(self, self.jobs[name]) is not None

    def rounds_zeros(self, name: str) -> bool:
        grid = kept_grid(self, self.jobs[name])
        return grid is not None and grid.has_zeros

    def filling_failures(self) -> list[str]:
        """Rows that the checkpoint does not have: zeros, and biases that keep an id from being sampled."""
        found = []
        for job in self.jobs.values():
            for rank, tensor in job.tensors.items():
                if not job.fills:  # a tensor of several rows of the table is never filled up
                    continue
                pieces = [piece for piece in job.slices if piece.rank == rank]
                begin = max(piece.row + piece.last - piece.first for piece in pieces)
                if begin == tensor.rows or self.misfit(job.source) is not None:
                    continue
                rows = self._rank_rows(job, tensor, begin, tensor.rows)
                expected = np.float32(0.0 if job.mask_from is None else MASKED_LOGIT)
                dtype = np.dtype(numpy_dtype(tensor.planned.dtype))
                wrong = rows != (expected if dtype == np.float32 else widen(np.array(expected).astype(dtype)))
                if wrong.any():
                    row = int(np.flatnonzero(wrong.any(axis=1))[0])
                    found.append(
                        f"{rank_file(rank)}, {tensor.planned.name}, row {begin + row}: found "
                        f"{float(rows[row][wrong[row]][0]):.8g}, expected {expected:.8g}: it stands for no weight"
                    )
        return found

    def unknown_tensors(self) -> list[str]:
        """A sentence for each tensor of a rank file that no weight is written to."""
        known: dict[int, set[str]] = {rank: set() for rank in self.files}
        for job in self.jobs.values():
            for tensor in job.all_tensors:
                known[tensor.rank].add(tensor.planned.name)
        return [
            f"{rank_file(rank)}: it holds {name}, which is no weight of this model"
            for rank, file in self.files.items()
            for name in sorted(file.tensors.keys() - known[rank])
        ]

    def _places(self, name: str) -> dict[tuple[int, int, int, int, tuple[int, int]], list[Slice]]:
        """Group, turn, first and last row and columns of the slices of a row -> the slices that hold it, one a rank."""
        found: dict[tuple[int, int, int, int, tuple[int, int]], list[Slice]] = {}
        for piece in self.jobs[name].slices:
            if piece.first < piece.last:
                place = (piece.group, piece.turn, piece.first, piece.last, piece.columns)
                found.setdefault(place, []).append(piece)
        return found

    def _rank_rows(self, job: TensorJob, tensor: RankTensor, first: int, last: int) -> FloatArray:
        """Rows [n, width] of a rank's tensor, float32. Its rows count those of all experts together."""
        file, name = self.files[tensor.rank], tensor.planned.name
        raw, row_bytes = file.bytes_of(name), tensor.planned.num_bytes // tensor.rows
        if job.form is Form.FLOAT:
            stored = raw[first * row_bytes : last * row_bytes].view(numpy_dtype(tensor.planned.dtype))
            values = widen(stored.reshape(last - first, -1)).copy()  # a copy, since the mapped file must not be written
        else:
            alike = 2 if job.form is Form.PAIRS else INTERLEAVED_ROWS[job.bits] if job.interleave else 1
            begin, end = first // alike * alike, -(-last // alike) * alike
            packed = raw[begin * row_bytes : end * row_bytes]
            if job.form is Form.PAIRS:
                codes = unpack_pairs(packed.reshape(-1, tensor.width))
            else:
                codes = unpack(packed.reshape(end - begin, -1), job.bits, interleave=job.interleave)
            values = codes[first - begin : last - begin].astype(np.float32)
            values -= np.float32(1 << (job.bits - 1))
            values = self._scaled(job, tensor, values, first, last)
        file.mapped.madvise(mmap.MADV_DONTNEED)  # else the whole file would come to count as this process's memory
        return values

    def _scaled(self, job: TensorJob, tensor: RankTensor, values: FloatArray, first: int, last: int) -> FloatArray:
        """Signed codes [n, width] times their scales, with what the other side tensors add."""

        def side(ending: str) -> npt.NDArray[Any]:
            return self.files[tensor.rank].array(job.sides[ending][tensor.rank].planned.name)

        if job.form is Form.CHANNELS:
            values *= widen(side("per_channel_scale").reshape(-1)[first:last, None])
            return values
        blocks = values.reshape(last - first, -1, job.group_size)
        if job.form is Form.GROUPS:
            blocks *= _rows_of(side("weights_scaling_factor"), first, last)[..., None]
            blocks += _rows_of(side("zero"), first, last)[..., None]
            return blocks.reshape(values.shape)
        blocks *= widen(side("weights_scaling_factor").reshape(-1, blocks.shape[1])[first:last, :, None])
        found: FloatArray = blocks.reshape(values.shape)
        found *= widen(side("prequant_scaling_factor"))
        return found


def _rows_of(stored: npt.NDArray[Any], first: int, last: int) -> FloatArray:
    """Rows `first` to `last` [n, groups] of a tensor [(experts,) groups, rows of an expert]."""
    turned = stored.reshape(-1, *stored.shape[-2:])
    each = turned.shape[-1]
    experts = range(first // each, (last - 1) // each + 1)
    parts = [turned[e][:, max(0, first - e * each) : min(each, last - e * each)].T for e in experts]
    return widen(np.concatenate(parts))


def open_rank_weights(plan: CheckpointPlan, folder: Path) -> RankWeights:
    """Open the rank files that the writer made of a plan. Raises EngineError for a file that is missing or damaged."""
    files = {rank: _open(folder / rank_file(rank)) for rank in plan.headers}
    model, left_out = plan.model, plan.options.left_out
    written = tuple(expert for expert in range(model.architecture.num_experts) if expert not in left_out)
    experts = {
        name: written for name, spec in model.weights.table.items() if spec.stacks_experts or spec.role is Role.ROUTER
    }
    stored = RankWeights(
        checkpoint=model.weights.checkpoint,
        table=model.weights.table,
        experts=experts,
        jobs={job.source: job for job in plan.layout.jobs},
        files=files,
    )
    return dataclasses.replace(stored, checksums=_checksums(stored, plan, folder))


def _checksums(stored: RankWeights, plan: CheckpointPlan, folder: Path) -> Mapping[str, Mapping[str, str]]:
    """The checksums of solved codes. There are none where the rank files have scales of another type than they were
    solved in, as earlier releases wrote them in bfloat16. Raises EngineError for a manifest that has not what the plan
    says."""
    if plan.options.calibration is None:
        return {}
    try:
        record = calibration_of(folder)
        found = checksums_of(record)
    except (ConfigError, ValueError) as error:
        raise EngineError(f"reading the solved codes of {folder}: {error}; write the checkpoint again") from error
    solved = SOLVED_SCALES if record is None else record.get("scale_type", SOLVED_SCALES)
    rounded = {name for name in found if (recipe := stored.recipe(name)) and recipe.scale_type != solved}
    return {name: {} if name in rounded else one for name, one in found.items()}


def _open(path: Path) -> RankFile:
    try:
        tensors = {tensor.name: tensor for tensor in read_header(path)}
        with path.open("rb") as file:
            return RankFile(mapped=mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), tensors=tensors)
    except (CheckpointError, OSError, ValueError) as error:
        raise EngineError(f"reading the rank file {path}: {error}; write the TensorRT-LLM checkpoint again") from error
