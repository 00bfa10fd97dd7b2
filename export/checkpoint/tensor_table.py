"""The tensor table: one row for each weight of a model, with our name and the checkpoint's tensors it is made of.

A family declares its table once. Loading, the check for missing tensors, inspection, the plan of the ONNX file and the
merged checkpoint are all derived from it. Our names are those of phi-msft checkpoints, or names that a family defines;
the experts of a layer are stacked under one name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.folder import KEPT_TENSORS, Checkpoint
from export.checkpoint.safetensors_header import FLOAT_DTYPES, StoredTensor
from export.errors import CheckpointError, listing, named, shown
from export.floats import widen
from export.formats.view import Grid, PackedTensor

MAX_DESCRIBED = 8  # most tensors that an error describes; with another model's checkpoint tens of thousands misfit
# Of a module rotary_emb: inv_freq, cos_cached and the like, under whatever name a version of the code gave them.
_ROTARY_BUFFER = re.compile(r"(^|\.)rotary_emb(edding)?\.[\w.]*(inv_freq|cached|scale)[\w.]*$")
CHUNK_ELEMENTS = 1 << 19  # values of a chunk, 2 MiB as float32: read at disk speed, and small beside any real tensor


class Role(StrEnum):
    """What a weight does in the network; a recipe (export/quantize/recipe.py) goes by it."""

    EMBEDDING = "embedding"
    NORM = "norm"
    ATTENTION = "attention"
    ROUTER = "router"
    FFN = "ffn"  # an MLP that all tokens go through: of a dense model or layer, or beside the experts
    SHARE = "share"  # gives the share of an MLP beside the experts
    EXPERT = "expert"
    HEAD = "head"
    BIAS = "bias"


class Join(StrEnum):
    """How a row of the table is put together from its parts."""

    NONE = "none"
    CONCATENATE = "concatenate"  # joined along axis 0: q, k and v in one matrix
    STACK = "stack"  # joined along a new axis 0: the experts of a layer
    INTERLEAVE = "interleave"  # as STACK, and an expert's rows alternate between two parts: gate and up of a SwiGLU


@dataclass(frozen=True, kw_only=True)
class Part:
    """A tensor of the checkpoint that a row is made of, or a slice of one: the tensor's name and the part's shape.

    If the checkpoint keeps several parts in one tensor, `stored_shape` is the shape of that tensor. The part begins at
    row `first_row` of the tensor reshaped to [rows, *shape[1:]]. A part [out, in] that is `transposed` is one matrix of
    a stack [n, in, out], whole; `first_row` is the number of rows of those before it.
    """

    name: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...] | None = None
    first_row: int = 0
    transposed: bool = False

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor that holds the part."""
        return self.shape if self.stored_shape is None else self.stored_shape

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def first_element(self) -> int:
        """The index of the part's first value in the checkpoint's tensor."""
        return self.first_row * math.prod(self.shape[1:])

    def packed_in(self, checkpoint: Checkpoint) -> PackedTensor | None:
        """The packed tensor that holds the part; None if it is stored as floats."""
        return checkpoint.packed.get(self.name)

    def run_start(self, checkpoint: Checkpoint) -> dict[str, int]:
        """Tensor of the files -> byte at which the part begins."""
        packed = self.packed_in(checkpoint)
        if packed is not None:
            return packed.run_start(self.first_row)
        return {self.name: self.first_element * checkpoint.tensors[self.name].itemsize}

    def read(self, checkpoint: Checkpoint, rows: slice | None = None) -> npt.NDArray[np.float32]:
        """Read the part, or `rows` of it, as float32. Raises CheckpointError if a value is not finite."""
        return widen(self.read_stored(checkpoint, rows))

    def read_stored(self, checkpoint: Checkpoint, rows: slice | None = None) -> npt.NDArray[Any]:
        """Like `read`, in the dtype that the checkpoint stores."""
        if self.transposed:
            return checkpoint.read_transposed(self.name, self.first_row // self.shape[0], rows or slice(None))
        if self.stored_shape is None:
            return checkpoint.read_finite(self.name, rows)
        first, last, _ = (rows or slice(None)).indices(self.shape[0])
        return checkpoint.read_finite(self.name, slice(self.first_row + first, self.first_row + last), self.shape[1:])


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One row of the table. `letters` is the shape in the letters of `export.architecture`, e.g. "E F H"."""

    name: str
    shape: tuple[int, ...]
    letters: str
    role: Role
    parts: tuple[Part, ...]
    join: Join = Join.NONE

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def stacks_experts(self) -> bool:
        """Whether the row stacks one matrix or vector for each expert."""
        return self.join in (Join.STACK, Join.INTERLEAVE)

    def with_experts(self, number: int) -> TensorSpec:
        """The row with the shape that it has if `number` experts are stacked; for planning, as its parts stay all."""
        return replace(self, shape=(number, *self.shape[1:]))

    @property
    def groups(self) -> list[tuple[Part, ...]]:
        """The parts in the order of their values, in groups of one, or of two whose rows alternate."""
        size = 2 if self.join is Join.INTERLEAVE else 1
        return [self.parts[start : start + size] for start in range(0, len(self.parts), size)]


def single(name: str, shape: tuple[int, ...], letters: str, role: Role, stored_name: str | None = None) -> TensorSpec:
    """A row that is one tensor of the checkpoint."""
    part = Part(name=stored_name or name, shape=shape)
    return TensorSpec(name=name, shape=shape, letters=letters, role=role, parts=(part,))


def concatenated(name: str, parts: Sequence[Part], letters: str, role: Role) -> TensorSpec:
    """A row that joins several parts along axis 0."""
    rows = sum(part.shape[0] for part in parts)
    shape = (rows, *parts[0].shape[1:])
    return TensorSpec(name=name, shape=shape, letters=letters, role=role, parts=tuple(parts), join=Join.CONCATENATE)


def stacked(name: str, parts: Sequence[Part], letters: str, role: Role) -> TensorSpec:
    """A row [E, ...] that stacks one part for each expert."""
    shape = (len(parts), *parts[0].shape)
    return TensorSpec(name=name, shape=shape, letters=letters, role=role, parts=tuple(parts), join=Join.STACK)


def interleaved(name: str, pairs: Sequence[tuple[Part, Part]], letters: str, role: Role) -> TensorSpec:
    """A row [E, 2 * rows, ...] with a pair of parts for each expert: even rows are the first part's, odd rows the
    second's."""
    rows, *others = pairs[0][0].shape
    parts = tuple(part for pair in pairs for part in pair)
    shape = (len(pairs), 2 * rows, *others)
    return TensorSpec(name=name, shape=shape, letters=letters, role=role, parts=parts, join=Join.INTERLEAVE)


@dataclass(frozen=True, kw_only=True)
class OnGrid:
    """Rows [n, K] of a weight whose checkpoint stores it on a uniform grid, float32, with the scales, float32, and zero
    points, uint8, of their groups of neighbours [n, K / group_size]."""

    values: npt.NDArray[np.float32]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A checkpoint with its family's table: reads weights by our names, as float32, when they are asked for."""

    checkpoint: Checkpoint
    table: Mapping[str, TensorSpec]

    def load(self, name: str) -> npt.NDArray[np.float32]:
        """Read a whole weight, float32, in the table's shape."""
        spec = self.table[name]
        if spec.join is Join.NONE:
            return spec.parts[0].read(self.checkpoint)
        whole = np.empty(spec.shape, dtype=np.float32)
        flat, done = whole.reshape(-1), 0
        for chunk in self.chunks(name):
            flat[done : done + chunk.size] = chunk.reshape(-1)
            done += chunk.size
        return whole

    def load_rows(self, name: str, rows: slice) -> npt.NDArray[np.float32]:
        """Read some rows of a weight that is one tensor of the checkpoint, float32 [rows, ...]."""
        return self.table[name].parts[0].read(self.checkpoint, rows)

    def chunks(
        self, name: str, expert_order: Sequence[int] | None = None, multiple: int = 1
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Read a weight in chunks of at most CHUNK_ELEMENTS values, float32, in the order of its rows; stacked experts
        in `expert_order`.

        A chunk of a stacked weight holds rows of one expert, without the expert axis. The number of its rows is a
        multiple of `multiple`, except in the last chunk of a part.
        """
        for _, _, parts in self.placed_chunks(name, expert_order, multiple):
            yield _alternating([widen(part) for part in parts])

    def grid(self, name: str) -> Grid | None:
        """The grid of all parts of a row, with the group size that fits all of them; None if a part is on no grid."""
        grids = {}
        for part in self.table[name].parts:
            packed = part.packed_in(self.checkpoint)
            grids[part.name] = packed.grid(self.checkpoint) if packed is not None else None
        if not grids or any(grid is None for grid in grids.values()):
            return None
        found = [grid for grid in grids.values() if grid is not None]
        return Grid(
            bits=max(grid.bits for grid in found),
            group_size=math.gcd(*(grid.group_size for grid in found)),
            has_zeros=any(grid.has_zeros for grid in found),
        )

    def grids(self) -> dict[str, Grid]:
        """Name of a row -> its grid, for the rows that have one. Of packed tensors their groups and zero points are
        read."""
        found = {name: self.grid(name) for name in self.table} if self.checkpoint.packed else {}
        return {name: grid for name, grid in found.items() if grid is not None}

    def grid_chunks(
        self, name: str, grid: Grid, expert_order: Sequence[int] | None = None, multiple: int = 1
    ) -> Iterator[OnGrid]:
        """Read a weight that has the grid `grid` in the chunks of `chunks`. Zero points are those of codes of
        `grid.bits` bits."""
        groups = self.table[name].groups
        for index, row, parts in self.placed_chunks(name, expert_order, multiple):
            scales, zeros = [], []
            for part, values in zip(groups[index], parts, strict=True):
                packed = part.packed_in(self.checkpoint)
                assert packed is not None  # of a row that has a grid every part is packed
                first = part.first_row + row
                own_scales, own_zeros = packed.steps(self.checkpoint, first, first + len(values))
                more = packed.features // grid.group_size // own_scales.shape[1]
                scales.append(np.repeat(own_scales, more, axis=1))
                zeros.append(np.repeat(own_zeros, more, axis=1))
            yield OnGrid(
                values=_alternating([widen(part) for part in parts]),
                scales=_alternating(scales),
                zero_points=_alternating(zeros),
            )

    def packed_labels(self) -> list[str]:
        """How the packed tensors of the table are packed, in words."""
        parts = (part for spec in self.table.values() for part in spec.parts)
        return sorted({packed.label for part in parts if (packed := part.packed_in(self.checkpoint))})

    def kept_bytes(self, name: str) -> int:
        """The most bytes of packed and of transposed tensors that reading a row keeps in memory."""
        parts = self.table[name].parts
        if parts[0].transposed:
            return max(self.checkpoint.tensors[part.name].itemsize * part.num_elements for part in parts)
        packed = [
            part
            for part in self.table[name].parts
            if (tensor := part.packed_in(self.checkpoint)) is not None and tensor.reads_whole
        ]
        largest = max((self.checkpoint.tensors[part.name].num_bytes for part in packed), default=0)
        fewest = min((len(self.checkpoint.packed[part.name].sources) for part in packed), default=1)
        return largest * min(len(packed), -(-KEPT_TENSORS // fewest))

    def placed_chunks(
        self, name: str, expert_order: Sequence[int] | None = None, multiple: int = 1
    ) -> Iterator[tuple[int, int, list[npt.NDArray[Any]]]]:
        """Read a weight in chunks, in the stored dtype. Yields the index of the group (if stacked: the expert), the
        chunk's first row in the group's parts, and the rows of each part. A first row is a multiple of `multiple`."""
        groups = self.table[name].groups
        for index in range(len(groups)) if expert_order is None else expert_order:
            group = groups[index]
            num_rows, *others = group[0].shape
            step = max(1, CHUNK_ELEMENTS // max(1, len(group) * math.prod(others)))
            step = max(multiple, step - step % multiple)
            for row in range(0, num_rows, step):
                rows = slice(row, min(row + step, num_rows))
                yield index, row, [part.read_stored(self.checkpoint, rows) for part in group]

    def run_starts(self, name: str) -> dict[str, list[int]]:
        """The first bytes of the runs (export/checkpoint/digests.py) in each source tensor of a row: the bytes at which
        the row's parts begin."""
        starts: dict[str, set[int]] = {}
        for part in self.table[name].parts:
            for source, start in part.run_start(self.checkpoint).items():
                starts.setdefault(source, set()).add(start)
        return {name: sorted(found) for name, found in starts.items()}

    def stored_dtypes(self) -> list[str]:
        """The dtypes in which the checkpoint stores the table's tensors, as labels of the format."""
        return sorted({self.checkpoint.tensors[part.name].dtype for spec in self.table.values() for part in spec.parts})


def open_weights(checkpoint: Checkpoint, specs: Sequence[TensorSpec], harmless: Sequence[str] = ()) -> Weights:
    """Check a checkpoint's tensors against a table; returns its weights.

    Raises CheckpointError that lists the missing, extra and misshapen tensors. `harmless` lists endings of names that
    may be present and are ignored (buffers that are recomputed). So are the buffers of rotary embeddings, whose modules
    have no weights in any model.
    """
    misfits = list(_misfits(checkpoint, specs, tuple(harmless)))
    if misfits:
        problems = listing([describe() for describe in misfits[:MAX_DESCRIBED]], MAX_DESCRIBED, of=len(misfits))
        raise CheckpointError(f"reading {named(checkpoint.folder)}: its tensors do not fit its config:{problems}")
    return Weights(checkpoint=checkpoint, table={spec.name: spec for spec in specs})


def _misfits(
    checkpoint: Checkpoint, specs: Sequence[TensorSpec], harmless: tuple[str, ...]
) -> Iterator[Callable[[], str]]:
    """Yield, for each tensor that is missing, misshapen, not of a float dtype, or in no row of the table, a function
    that describes the problem."""
    used: set[str] = set()
    for spec in specs:
        for part in spec.parts:
            if part.name in used:  # another slice of a tensor that was checked already
                continue
            used.add(part.name)
            stored = checkpoint.tensors.get(part.name)
            if stored is None or stored.shape != part.whole_shape or stored.dtype not in FLOAT_DTYPES:
                yield partial(_describe_misfit, spec, part, stored)
    for name in sorted(set(checkpoint.tensors) - used):
        if not (name.endswith(harmless) or _ROTARY_BUFFER.search(name) or _is_empty_bias(checkpoint, name)):
            yield partial(_describe_extra, checkpoint.tensors[name])


def _is_empty_bias(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is the bias of a packed linear and holds only zeros: some packers write one for every linear."""
    stem, _, kind = name.rpartition(".")
    return kind == "bias" and f"{stem}.weight" in checkpoint.packed and not checkpoint.read_float32(name).any()


def _alternating(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Rows [n, ...] of one part or of several, the parts' rows in turns."""
    if len(parts) == 1:
        return parts[0]
    return np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def _describe_misfit(spec: TensorSpec, part: Part, stored: StoredTensor | None) -> str:
    if stored is None:
        return f"{part.name} is missing, expected {list(part.whole_shape)} [{spec.letters}]"
    if stored.shape != part.whole_shape:
        return (
            f"{part.name} ({named(stored.shard.name, 60)}): found {shown(list(stored.shape))}, config.json says "
            f"{list(part.whole_shape)} [{spec.letters}]; is the config from another checkpoint?"
        )
    return (
        f"{part.name} has dtype {stored.dtype}, expected one of {', '.join(FLOAT_DTYPES)}: take the checkpoint before "
        "it was quantised"
    )


def _describe_extra(stored: StoredTensor) -> str:
    return f"{named(stored.name)} {shown(list(stored.shape))} is not a tensor of this family"
