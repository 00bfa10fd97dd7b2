"""Plans a graph's initializers (names, dtypes, shapes, offsets) before a weight is read, and produces their values.

A `WeightJob` turns one row of the tensor table into one initializer (floats), two (packed codes and scales) or three
(packed codes, scales and zero points).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.tensor_table import OnGrid, Role, TensorSpec, Weights
from export.conversion.parts import PlannedRegion
from export.errors import QuantizationError
from export.formats.view import Grid
from export.provider import FLOAT16_MAX
from export.quantize.carry import Loss, carried_blocks
from export.quantize.grid import ByteArray, FloatArray, pack, quantize_blocks
from export.quantize.half_scales import SmallScales
from export.quantize.layout import GROUP_ROWS, MatrixLayout
from export.quantize.recipe import NEAREST, Storage
from export.quantize.solved import SolvedCodes

ALIGNMENT_BYTES = 256  # alignment of CUDA's own allocations; a multiple of 64, the bytes of a cache line and a register
_ITEM_BYTES = {"float32": 4, "float16": 2, "uint8": 1}


class Layout(StrEnum):
    """How the values of a weight are arranged in its initializers."""

    PLAIN = "plain"
    BLOCKS = "blocks"
    GROUPS = "groups"  # blocks in the layout of export/quantize/layout.py


@dataclass(frozen=True, kw_only=True)
class Initializer:
    """One initializer of the graph; `dtype` is "float32", "float16" or "uint8"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class WeightJob:
    """The job of writing one table row's initializers. `expert_order` lists the experts in the order in which their
    matrices are stored (for the router: their rows); experts that are not in it are left out. The first `scaled_rows`
    rows are multiplied by `row_factor`. With `grid` the codes of the checkpoint's own grid are carried over."""

    source: str
    role: Role
    layout: Layout
    outputs: tuple[Initializer, ...]
    storage: Storage | None = None  # None: floats
    expert_order: tuple[int, ...] | None = None
    scaled_rows: int = 0
    row_factor: float = 1.0
    grid: Grid | None = None

    @property
    def bits(self) -> int:
        """The bits of a code; 32 of a weight that is not quantised."""
        return self.storage.bits if self.storage else 32

    @property
    def block_size(self) -> int:
        """The input features that share a scale; 0 of a weight that is not quantised."""
        return self.storage.block_size if self.storage else 0

    @property
    def row_multiple(self) -> int:
        """The number that a chunk's rows must be a multiple of."""
        return GROUP_ROWS if self.layout is Layout.GROUPS else 1

    def num_weights(self, spec: TensorSpec) -> int:
        """The number of weights that are written of the table row `spec`, the job's source."""
        return spec.num_elements // spec.shape[0] * self.num_groups(spec)

    def num_groups(self, spec: TensorSpec) -> int:
        """The length of the first axis as it is written: of a row that stacks experts, the number of stored experts."""
        return len(self.expert_order) if spec.stacks_experts and self.expert_order is not None else spec.shape[0]

    def read_left_out(self, weights: Weights) -> None:
        """Read the experts that are left out. Their values count in the digest of what was read, and nowhere else."""
        spec = weights.table[self.source]
        if spec.stacks_experts and self.expert_order is not None:
            left_out = sorted(set(range(spec.shape[0])) - set(self.expert_order))
            for _ in weights.placed_chunks(self.source, left_out):
                pass

    def produce(
        self, weights: Weights, small: SmallScales, loss: Loss | None = None, solved: SolvedCodes | None = None
    ) -> Iterator[tuple[npt.NDArray[Any], ...]]:
        """Yield the values of all outputs in consecutive pieces: one tuple a chunk, with one array for each output.
        `small` counts the scales that are stored as float16, `loss` measures the error against a packed checkpoint.
        Codes that `solved` has of the row are carried over; the checkpoint is read all the same, for its digests.

        Raises QuantizationError for values that the output's dtype cannot hold.
        """
        if self.role is Role.ROUTER:
            gate = weights.load(self.source)
            yield (gate[list(self.expert_order)] if self.expert_order else gate,)
            return
        row = 0
        if solved is not None and self.source in solved.matrices:
            for _ in weights.placed_chunks(self.source, self.expert_order):
                pass
            for part in solved.chunks(weights.table[self.source], self.expert_order, self.row_multiple):
                self._scale(part.scales, row)
                row += len(part.scales)
                yield self._narrowed(self._packed(part.codes, part.scales, part.zeros))
            return
        if self.grid is not None:
            for found in weights.grid_chunks(self.source, self.grid, self.expert_order, self.row_multiple):
                for values in (found.values, found.scales):
                    self._scale(values, row)
                row += len(found.values)
                yield self._narrowed(self._carried(found, self.grid, loss))
            return
        for chunk in weights.chunks(self.source, self.expert_order, self.row_multiple):
            self._scale(chunk, row)
            row += len(chunk)
            yield self._narrowed((chunk,) if self.layout is Layout.PLAIN else self._blocks(chunk, small, loss))

    def _scale(self, values: FloatArray, row: int) -> None:
        """Multiply those of the rows from `row` on that carry the factor."""
        if row < self.scaled_rows:
            values[: self.scaled_rows - row] *= np.float32(self.row_factor)

    def _narrowed(self, pieces: tuple[npt.NDArray[Any], ...]) -> tuple[npt.NDArray[Any], ...]:
        return tuple(
            _as_float16(piece, self.source) if output.dtype == "float16" else piece
            for piece, output in zip(pieces, self.outputs, strict=True)
        )

    def _blocks(self, chunk: FloatArray, small: SmallScales, loss: Loss | None) -> tuple[npt.NDArray[Any], ...]:
        half_scales = self.layout is Layout.GROUPS
        codes, scales = quantize_blocks(
            chunk, self.bits, self.block_size, half_scales=half_scales, refit=loss is not None,
            nearest=self.storage is not None and self.storage.method == NEAREST,
        )  # fmt: skip
        if loss is not None:
            loss.add(chunk, codes, scales, self.bits)
        if self.layout is Layout.GROUPS:
            small.add(chunk, scales, self.bits, self.block_size)
        return self._packed(codes, scales, np.full_like(scales, 1 << (self.bits - 1), dtype=np.uint8))

    def _carried(self, found: OnGrid, grid: Grid, loss: Loss | None) -> tuple[npt.NDArray[Any], ...]:
        codes, scales, zeros = carried_blocks(found, self.bits, self.block_size, has_zeros=grid.has_zeros)
        stored = scales
        if self.outputs[1].dtype == "float16":
            stored = _as_float16(scales, self.source).astype(np.float32)
        if loss is not None:
            loss.add_rounded(found.values, scales, stored)
        return self._packed(codes, stored, zeros)

    def _packed(self, codes: ByteArray, scales: FloatArray, zeros: ByteArray) -> tuple[npt.NDArray[Any], ...]:
        """The outputs of codes [n, K] with scales and zero points [n, blocks]."""
        if self.layout is Layout.GROUPS:
            rows, features = codes.shape
            matrix = MatrixLayout(rows=rows, features=features, bits=self.bits, block_size=self.block_size)
            stated = zeros if len(self.outputs) == 3 else None
            pieces = matrix.pack_codes(codes, stated), matrix.pack_scales(scales), matrix.pack_scales(zeros)
        else:
            pieces = pack(codes, self.bits), scales, _packed_zeros(zeros, self.bits)
        return pieces[: len(self.outputs)]


def _packed_zeros(zeros: ByteArray, bits: int) -> ByteArray:
    """Pack the zero points of each row [n, blocks] into whole bytes."""
    odd = zeros.shape[1] % (8 // bits)
    return pack(np.pad(zeros, ((0, 0), (0, odd))) if odd else zeros, bits)


def _as_float16(values: npt.NDArray[np.float32], source: str) -> npt.NDArray[np.float16]:
    """Round to float16. Raises QuantizationError that names the tensor if a value is too large."""
    largest = float(max(values.max(), -values.min()))
    if not largest <= FLOAT16_MAX:
        raise QuantizationError(
            f"writing {source}: a value or scale of magnitude {largest:.6g} is beyond float16's {FLOAT16_MAX:.0f}; "
            "build it with --provider cpu --kernels onnxruntime and --precision fp32, int8 or int4, whose graphs hold "
            "float32"
        )
    return values.astype(np.float16)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The place of every initializer in the data file: name -> (offset, bytes), with zeros up to the next one."""

    offsets: dict[str, tuple[int, int]]
    total_bytes: int

    def regions(self, job: WeightJob) -> list[PlannedRegion]:
        """The regions that a job writes: one for each initializer, with the zeros up to the next."""
        return [
            PlannedRegion(output.name, self.offsets[output.name][0], aligned(output.num_bytes))
            for output in job.outputs
        ]


def aligned(num_bytes: int) -> int:
    """The bytes that an initializer takes in the data file, with the zeros up to the next one."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def place(jobs: Sequence[WeightJob]) -> Placement:
    """Place the initializers of all jobs in the data file, one after the other, each at a multiple of 256 bytes."""
    offsets: dict[str, tuple[int, int]] = {}
    position = 0
    for job in jobs:
        for output in job.outputs:
            offsets[output.name] = (position, output.num_bytes)
            position += aligned(output.num_bytes)
    return Placement(offsets=offsets, total_bytes=position)
