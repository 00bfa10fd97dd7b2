"""The converter that fills the rank files of a TensorRT-LLM checkpoint. Each row of the tensor table is read once, in
chunks, and every rank's share of a chunk is written to that rank's file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.digests import recorded
from export.checkpoint.safetensors_header import numpy_dtype
from export.checkpoint.tensor_table import CHUNK_ELEMENTS, Weights
from export.conversion.converter import Converter
from export.conversion.parts import OpenRegion, PartRecord, PlannedRegion
from export.errors import QuantizationError
from export.floats import widen
from export.quantize.channels import quantize_channels
from export.quantize.grid import FloatArray, quantize_blocks
from export.quantize.solved import SolvedCodes
from export.trtllm.carry import carried_groups, kept_grid
from export.trtllm.layout import Form, RankTensor, Slice, TensorJob
from export.trtllm.packing import TILE, pack, pack_pairs

MASKED_LOGIT = -1e4  # bias of a token that must not be sampled: below any logit, and within range of every float type
_SEPARATOR = "#"  # separator between the file's name and the tensor's name in the name of a region


@dataclass(frozen=True, kw_only=True)
class RankConverter(Converter[TensorJob]):
    """Converts jobs into the rank files under `folder`. `offsets`: rank -> name of a tensor -> its first byte in the
    rank's file. `sizes`: rank -> bytes of its file. `solved` has codes that are carried over."""

    folder: Path
    offsets: Mapping[int, Mapping[str, int]]
    sizes: Mapping[int, int]
    solved: SolvedCodes | None = None

    def files(self) -> Mapping[Path, int]:
        """The rank files and their lengths in bytes."""
        return {self.folder / rank_file(rank): num_bytes for rank, num_bytes in self.sizes.items()}

    def file_of(self, region: str) -> Path:
        """The rank file that holds the region."""
        return self.folder / region.partition(_SEPARATOR)[0]

    def planned_regions(self, job: TensorJob) -> list[PlannedRegion]:
        """One region for each slice of the weight, and one for each side tensor, such as scales, or for the rows of it
        that belong to the job."""
        slices = [self._slice_region(job, piece, index) for index, piece in enumerate(job.slices)]
        return [*slices, *(self._side_region(job, side) for _, side in job.side_tensors)]

    def source_bytes(self, job: TensorJob) -> int:
        """Bytes of the source tensors that the job reads."""
        stored = self.weights.checkpoint.tensors
        return sum(stored[name].num_bytes for name in {part.name for part in self.weights.table[job.source].parts})

    def working_bytes(self, job: TensorJob) -> int:
        """The most memory that the job takes, in bytes: a chunk once as stored, three times as float32 and three times
        as codes, and four times the side tensors of the weight."""
        row = self.weights.table[job.source]
        smallest = TILE * max(1, row.parts[0].num_elements // row.parts[0].shape[0])
        chunk = min(max(CHUNK_ELEMENTS, smallest), row.num_elements)
        stored = max(self.weights.checkpoint.tensors[part.name].itemsize for part in row.parts)
        beside = sum(side.planned.num_bytes for _, side in job.side_tensors)
        kept = self.weights.kept_bytes(job.source)
        unpacking = kept + chunk * (1 + 1 + 4) if kept else 0
        return chunk * (stored + 3 * 4 + 3) + 4 * beside + unpacking

    def convert(self, job: TensorJob, count: Callable[[int], None]) -> PartRecord:
        """Do the job: read, quantise, write. Raises CheckpointError when reading fails, and QuantizationError for a
        value that is too large for the float type."""
        checkpoint = recorded(self.weights.checkpoint, count, self.weights.run_starts(job.source))
        weights = Weights(checkpoint=checkpoint, table=self.weights.table)
        regions = [OpenRegion(region) for region in self.planned_regions(job)]
        scales = {rank: _scales_of(job, tensor) for rank, tensor in job.tensors.items()}
        zeros = {rank: np.zeros_like(own) for rank, own in scales.items()}
        grid = kept_grid(self.weights, job)
        solved = self.solved if self.solved is not None and job.source in self.solved.matrices else None
        table = weights.table[job.source].groups
        with ExitStack() as stack:
            files = {
                rank: stack.enter_context((self.folder / rank_file(rank)).open("r+b", buffering=0)).fileno()
                for rank in job.tensors
            }
            for group, first, parts in weights.placed_chunks(job.source, multiple=TILE):
                for turn, values in enumerate(parts):
                    takers = _takers(job, group, turn, first, len(values))
                    if not takers:  # the chunk belongs to an expert that is left out
                        continue
                    part = table[group][turn]
                    if solved is not None:
                        spec = weights.table[job.source]
                        own = solved.part_rows(spec, group, turn, first, first + len(values))
                        rows = _Rows(own.codes, own.scales)
                    elif grid is not None:
                        rows = _Rows(*carried_groups(weights, part, first, widen(values), job, grid))
                    else:
                        rows = _encoded(job, _masked(job, values, first), packed=part.packed_in(checkpoint) is not None)
                    for index, taken in takers:
                        piece = job.slices[index]
                        regions[index].write(files[piece.rank], rows.share(job, piece, first, taken))
                        rows.note(rows.scales, scales[piece.rank], job, piece, first, taken)
                        rows.note(rows.zeros, zeros[piece.rank], job, piece, first, taken)
            for (ending, side), region in zip(job.side_tensors, regions[len(job.slices) :], strict=True):
                region.write(
                    files[side.rank], _beside(job, ending, side, (zeros if ending == "zero" else scales)[side.rank])
                )
            if job.mask_from is not None:  # the rows that pad the vocabulary are masked too
                for piece, region in zip(job.slices, regions, strict=True):
                    dtype = numpy_dtype(job.tensors[piece.rank].planned.dtype)
                    filling = region.bytes_left // np.dtype(dtype).itemsize
                    region.write(files[piece.rank], np.full(filling, MASKED_LOGIT, dtype=dtype))
        written = tuple(region.finish() for region in regions)
        if solved is not None:
            solved.check_read(job.source, checkpoint.runs())
        return PartRecord(part=job.source, sources=checkpoint.runs(), regions=written)

    def _slice_region(self, job: TensorJob, piece: Slice, index: int) -> PlannedRegion:
        tensor = job.tensors[piece.rank]
        row_bytes = tensor.planned.num_bytes // tensor.rows
        # If each rank has one slice, its region is the whole tensor. The slice may be shorter, as the head's is at the
        # end of the vocabulary; the rest of the region is zeros.
        alone = job.fills and len(job.slices) == len(job.tensors)
        rows = tensor.rows if alone else piece.last - piece.first
        offset = self.offsets[piece.rank][tensor.planned.name] + piece.row * row_bytes
        return PlannedRegion(_region_name(tensor, index), offset, rows * row_bytes)

    def _side_region(self, job: TensorJob, side: RankTensor) -> PlannedRegion:
        offset = self.offsets[side.rank][side.planned.name]
        if job.fills:
            return PlannedRegion(_region_name(side, 0), offset, side.planned.num_bytes)
        own, row_bytes = _own_rows(job, side), side.planned.num_bytes // side.rows
        num_bytes = (own.stop - own.start) * row_bytes
        return PlannedRegion(_region_name(side, own.start), offset + own.start * row_bytes, num_bytes)


def _own_rows(job: TensorJob, tensor: RankTensor) -> slice:
    """The rows of a rank's tensor that the job writes, which lie together."""
    pieces = [piece for piece in job.slices if piece.rank == tensor.rank]
    return slice(min(piece.row for piece in pieces), max(piece.row + piece.last - piece.first for piece in pieces))


def rank_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank{rank}.safetensors"


def _region_name(tensor: RankTensor, index: int) -> str:
    return f"{rank_file(tensor.rank)}{_SEPARATOR}{tensor.planned.name}[{index}]"


def _takers(job: TensorJob, group: int, turn: int, first: int, num_rows: int) -> list[tuple[int, tuple[int, int]]]:
    """The slices of the job that take rows of a chunk: for each its index in the job, and the rows that it takes."""
    found = ((index, _rows_taken(piece, group, turn, first, num_rows)) for index, piece in enumerate(job.slices))
    return [(index, taken) for index, taken in found if taken is not None]


def _rows_taken(piece: Slice, group: int, turn: int, first: int, num_rows: int) -> tuple[int, int] | None:
    """The first and the last row (exclusive) that a slice takes of a chunk of `num_rows` rows from row `first` on; None
    if it takes none. Rows are counted from the start of the part."""
    if (piece.group, piece.turn) != (group, turn):
        return None
    low, high = max(first, piece.first), min(first + num_rows, piece.last)
    return (low, high) if low < high else None


@dataclass(frozen=True)
class _Rows:
    """Rows of a part as they are written: floats, or codes with their scales and zeros [n, K / group]. Without zeros
    all are 0."""

    values: npt.NDArray[Any]
    scales: FloatArray | None
    zeros: FloatArray | None = None

    def share(self, job: TensorJob, piece: Slice, first: int, taken: tuple[int, int]) -> npt.NDArray[Any]:
        """The values that a rank's file gets: the rows `taken` and the columns of the slice, packed as the job asks."""
        rows = self.values[taken[0] - first : taken[1] - first, slice(*piece.columns)]
        if job.form is Form.FLOAT:
            return rows
        if job.form is Form.PAIRS:
            return pack_pairs(rows)
        return pack(rows, job.bits, interleave=job.interleave)

    @staticmethod
    def note(
        own: FloatArray | None, whole: FloatArray, job: TensorJob, piece: Slice, first: int, taken: tuple[int, int]
    ) -> None:
        """Copy `own` scales or zeros of the rows `taken` into a rank's `whole` [rows, groups]."""
        if own is None:
            return
        rows = own[taken[0] - first : taken[1] - first]
        if job.group_size:
            rows = rows[:, piece.columns[0] // job.group_size : piece.columns[1] // job.group_size]
        start = piece.row + taken[0] - piece.first
        whole[start : start + len(rows)] = rows


def _encoded(job: TensorJob, values: npt.NDArray[Any], *, packed: bool) -> _Rows:
    """Rows as they are written. Groups of values that the checkpoint stores packed get refitted scales."""
    matrix = values.reshape(len(values), -1)
    if job.form is Form.FLOAT:
        return _Rows(_narrow(matrix, next(iter(job.tensors.values())).planned.dtype, job.source), None)
    if job.form is Form.CHANNELS:
        codes, scales = quantize_channels(widen(matrix), job.bits)
        return _Rows(codes, scales[:, None])
    codes, scales = quantize_blocks(widen(matrix), job.bits, job.group_size, refit=packed)
    return _Rows(codes, scales)


def _scales_of(job: TensorJob, tensor: RankTensor) -> FloatArray:
    groups = tensor.width // job.group_size if job.group_size else 1
    return np.empty((tensor.rows, groups) if job.form is not Form.FLOAT else (0, 0), dtype=np.float32)


def _beside(job: TensorJob, ending: str, side: RankTensor, scales: FloatArray) -> npt.NDArray[Any]:
    """The values of the side tensor whose name ends in `ending`; `scales` [rows, groups] are the scales of its rank, or
    its zeros."""
    shape = side.planned.shape
    if ending == "prequant_scaling_factor":
        return np.ones(shape, dtype=numpy_dtype(side.planned.dtype))
    if not job.fills:  # scales of channels, the one form of such tensors (checkpoint.py)
        scales = scales[_own_rows(job, side)]
    narrow = _narrow(scales, side.planned.dtype, f"the {'zeros' if ending == 'zero' else 'scales'} of {job.source}")
    if job.form is Form.GROUPS:  # [experts, groups, rows]
        return narrow.reshape(-1, shape[-1], scales.shape[1]).swapaxes(-1, -2)
    return narrow


def _masked(job: TensorJob, values: npt.NDArray[Any], first: int) -> npt.NDArray[Any]:
    """The head's bias with MASKED_LOGIT for token ids that stand for no text; other values as they are."""
    if job.mask_from is None or first + len(values) <= job.mask_from:
        return values
    masked = widen(values).copy()
    masked[max(0, job.mask_from - first) :] = MASKED_LOGIT
    return masked


def _narrow(values: npt.NDArray[Any], dtype: str, what: str) -> npt.NDArray[Any]:
    """Convert finite floats to the float type of a safetensors label. Raises QuantizationError if one is too large."""
    target = np.dtype(numpy_dtype(dtype))
    if values.dtype == target:
        return values
    wide = widen(values)
    with np.errstate(over="ignore"):
        narrow = wide.astype(target)
    if target.itemsize < wide.itemsize and not np.isfinite(narrow).all():
        raise QuantizationError(
            f"writing {what}: a value of magnitude {float(np.abs(wide).max()):.6g} is beyond {target.name}; "
            "build with --dtype bfloat16, which has float32's range"
        )
    return narrow
