"""The tensor table: every weight of a model under our name, with where a checkpoint keeps it.

A family declares its table once; loading, the completeness check, inspection, the plan of the ONNX file and the
merged checkpoint are all derived from it. Our names are the phi-msft ones, or a family's own, with the experts of a
layer stacked under one name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.folder import Checkpoint
from export.checkpoint.safetensors_header import FLOAT_DTYPES, StoredTensor
from export.errors import CheckpointError, listing, named, shown
from export.floats import widen

MAX_DESCRIBED = 8  # tensors that a message describes; a checkpoint of another model has tens of thousands
CHUNK_ELEMENTS = 1 << 19  # 4 MiB as float32: large enough to be read at disk speed, small beside any real tensor


class Role(StrEnum):
    """What a weight does; the precision recipe speaks of roles."""

    EMBEDDING = "embedding"
    NORM = "norm"
    ATTENTION = "attention"
    ROUTER = "router"
    FFN = "ffn"  # the MLP of a dense model
    EXPERT = "expert"
    HEAD = "head"
    BIAS = "bias"


class Join(StrEnum):
    """How a table entry is put together from checkpoint tensors."""

    NONE = "none"
    CONCATENATE = "concatenate"  # along axis 0: q, k and v into one
    STACK = "stack"  # along a new axis 0: the experts of a layer
    INTERLEAVE = "interleave"  # stacked, each expert's rows taken in turn from a pair of parts: gate and up of a SwiGLU


@dataclass(frozen=True, kw_only=True)
class Part:
    """One checkpoint tensor: its name there and the shape it must have.

    Where several parts lie in one tensor of shape `stored_shape`, a part begins at row `first_row` of that tensor seen
    as [rows, *shape[1:]].
    """

    name: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...] | None = None
    first_row: int = 0

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the checkpoint tensor."""
        return self.shape if self.stored_shape is None else self.stored_shape

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def first_element(self) -> int:
        """Where in the checkpoint tensor the part begins."""
        return self.first_row * math.prod(self.shape[1:])

    def read(self, checkpoint: Checkpoint, rows: slice | None = None) -> npt.NDArray[np.float32]:
        """The part, or `rows` of it, as float32. Raises CheckpointError when a value is not finite."""
        return widen(self.read_stored(checkpoint, rows))

    def read_stored(self, checkpoint: Checkpoint, rows: slice | None = None) -> npt.NDArray[Any]:
        """As `read`, in the dtype that the checkpoint keeps."""
        if self.stored_shape is None:
            return checkpoint.read_finite(self.name, rows)
        first, last, _ = (rows or slice(None)).indices(self.shape[0])
        return checkpoint.read_finite(self.name, slice(self.first_row + first, self.first_row + last), self.shape[1:])


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One row of the table. `letters` says the shape in the project's letters, e.g. "E F H"."""

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
    def groups(self) -> list[tuple[Part, ...]]:
        """The parts in the order of their values; those of a group give their rows in turn."""
        size = 2 if self.join is Join.INTERLEAVE else 1
        return [self.parts[start : start + size] for start in range(0, len(self.parts), size)]


def single(name: str, shape: tuple[int, ...], letters: str, role: Role, stored_name: str | None = None) -> TensorSpec:
    """A row that is one checkpoint tensor."""
    part = Part(name=stored_name or name, shape=shape)
    return TensorSpec(name=name, shape=shape, letters=letters, role=role, parts=(part,))


def concatenated(name: str, parts: Sequence[Part], letters: str, role: Role) -> TensorSpec:
    """A row that is several checkpoint tensors one after the other along axis 0."""
    rows = sum(part.shape[0] for part in parts)
    shape = (rows, *parts[0].shape[1:])
    return TensorSpec(name=name, shape=shape, letters=letters, role=role, parts=tuple(parts), join=Join.CONCATENATE)


def stacked(name: str, parts: Sequence[Part], letters: str, role: Role) -> TensorSpec:
    """A row [E, ...] that is one checkpoint tensor an expert."""
    shape = (len(parts), *parts[0].shape)
    return TensorSpec(name=name, shape=shape, letters=letters, role=role, parts=tuple(parts), join=Join.STACK)


def interleaved(name: str, pairs: Sequence[tuple[Part, Part]], letters: str, role: Role) -> TensorSpec:
    """A row [E, 2 * rows, ...] that is one pair of parts an expert: even rows of the first, odd rows of the second."""
    rows, *others = pairs[0][0].shape
    parts = tuple(part for pair in pairs for part in pair)
    shape = (len(pairs), 2 * rows, *others)
    return TensorSpec(name=name, shape=shape, letters=letters, role=role, parts=parts, join=Join.INTERLEAVE)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A checkpoint seen through its family's table: float32 values under our names, read when asked for."""

    checkpoint: Checkpoint
    table: Mapping[str, TensorSpec]

    def load(self, name: str) -> npt.NDArray[np.float32]:
        """The whole tensor, float32, in the table's shape."""
        spec = self.table[name]
        if spec.join is Join.NONE:
            return spec.parts[0].read(self.checkpoint)
        whole = np.empty(spec.shape, dtype=np.float32)
        flat, done = whole.reshape(-1), 0
        for chunk in self.chunks(name):
            flat[done : done + chunk.size] = chunk.reshape(-1)
            done += chunk.size
        return whole

    def chunks(
        self, name: str, expert_order: Sequence[int] | None = None, multiple: int = 1
    ) -> Iterator[npt.NDArray[np.float32]]:
        """The tensor's rows in order, float32, at most CHUNK_ELEMENTS at a time; stacked experts in `expert_order`.

        A chunk of a stacked tensor holds rows of one expert, without the expert axis. All but the last of a part have
        a multiple of `multiple` rows.
        """
        for _, _, parts in self.placed_chunks(name, expert_order, multiple):
            if len(parts) == 1:
                yield widen(parts[0])
                continue
            chunk = np.empty((len(parts[0]), len(parts), *parts[0].shape[1:]), dtype=np.float32)
            for turn, part in enumerate(parts):
                chunk[:, turn] = widen(part)
            yield chunk.reshape(-1, *parts[0].shape[1:])

    def placed_chunks(
        self, name: str, expert_order: Sequence[int] | None = None, multiple: int = 1
    ) -> Iterator[tuple[int, int, list[npt.NDArray[Any]]]]:
        """The tensor's rows in order, as stored: each time the group that they are of (the expert, where stacked),
        their first row in its parts, and the rows of each part. A first row is a multiple of `multiple`."""
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
        """At which bytes of each source tensor of a row a run of reading begins: where one of the row's parts does."""
        starts: dict[str, list[int]] = {}
        for part in self.table[name].parts:
            starts.setdefault(part.name, []).append(part.first_element * self.checkpoint.tensors[part.name].itemsize)
        return {name: sorted(found) for name, found in starts.items()}

    def stored_dtypes(self) -> list[str]:
        """The dtypes in which the checkpoint keeps the table's tensors."""
        return sorted({self.checkpoint.tensors[part.name].dtype for spec in self.table.values() for part in spec.parts})


def open_weights(checkpoint: Checkpoint, specs: Sequence[TensorSpec], harmless: Sequence[str] = ()) -> Weights:
    """Check a checkpoint against a table. Raises CheckpointError that lists every missing, extra or misshapen tensor.

    `harmless` are endings of names that may be present and are not used (recomputed buffers).
    """
    misfits = list(_misfits(checkpoint, specs, tuple(harmless)))
    if misfits:
        problems = listing([describe() for describe in misfits[:MAX_DESCRIBED]], MAX_DESCRIBED, of=len(misfits))
        raise CheckpointError(f"reading {named(checkpoint.folder)}: its tensors do not fit its config:{problems}")
    return Weights(checkpoint=checkpoint, table={spec.name: spec for spec in specs})


def _misfits(
    checkpoint: Checkpoint, specs: Sequence[TensorSpec], harmless: tuple[str, ...]
) -> Iterator[Callable[[], str]]:
    """What describes each tensor that is missing, misshapen, of no float dtype, or in no row of the table."""
    used: set[str] = set()
    for spec in specs:
        for part in spec.parts:
            if part.name in used:  # another slice of a tensor that was looked at
                continue
            used.add(part.name)
            stored = checkpoint.tensors.get(part.name)
            if stored is None or stored.shape != part.whole_shape or stored.dtype not in FLOAT_DTYPES:
                yield partial(_describe_misfit, spec, part, stored)
    for name in sorted(set(checkpoint.tensors) - used):
        if not name.endswith(harmless):
            yield partial(_describe_extra, checkpoint.tensors[name])


def _describe_misfit(spec: TensorSpec, part: Part, stored: StoredTensor | None) -> str:
    if stored is None:
        return f"{part.name} is missing, expected {list(part.whole_shape)} [{spec.letters}]"
    if stored.shape != part.whole_shape:
        return (
            f"{part.name} ({named(stored.shard.name, 60)}): found {shown(list(stored.shape))}, config.json says "
            f"{list(part.whole_shape)} [{spec.letters}]; is the config from another checkpoint?"
        )
    return f"{part.name} has dtype {stored.dtype}, expected one of {', '.join(FLOAT_DTYPES)}: " + (
        "save it as F32" if stored.dtype == "F64" else "take the checkpoint before it was quantised"
    )


def _describe_extra(stored: StoredTensor) -> str:
    return f"{named(stored.name)} {shown(list(stored.shape))} is not a tensor of this family"
