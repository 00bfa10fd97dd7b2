"""The tensor table: every weight of a model under our name, with where a checkpoint keeps it.

A family declares its table once; loading, the completeness check, inspection, the plan of the ONNX file and the
merged checkpoint are all derived from it. Our names are the phi-msft ones, or a family's own, with the experts of a
layer stacked under one name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from export.checkpoint import FLOAT_DTYPES, Checkpoint
from export.errors import CheckpointError, listing

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


@dataclass(frozen=True, kw_only=True)
class Part:
    """One checkpoint tensor: its name there and the shape it must have."""

    name: str
    shape: tuple[int, ...]


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


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A checkpoint seen through its family's table: float32 values under our names, read when asked for."""

    checkpoint: Checkpoint
    table: Mapping[str, TensorSpec]

    def load(self, name: str) -> npt.NDArray[np.float32]:
        """The whole tensor, float32, in the table's shape."""
        spec = self.table[name]
        if spec.join is Join.NONE:
            return self.checkpoint.read_float32(spec.parts[0].name)
        whole = np.empty(spec.shape, dtype=np.float32)
        row = 0
        for index, part in enumerate(spec.parts):
            values = self.checkpoint.read_float32(part.name)
            if spec.join is Join.STACK:
                whole[index] = values
            else:
                whole[row : row + len(values)] = values
                row += len(values)
        return whole

    def chunks(self, name: str, expert_order: Sequence[int] | None = None) -> Iterator[npt.NDArray[np.float32]]:
        """The tensor's rows in order, float32, at most CHUNK_ELEMENTS at a time; stacked experts in `expert_order`.

        A chunk of a stacked tensor holds rows of one expert, without the expert axis.
        """
        spec = self.table[name]
        parts = spec.parts if expert_order is None else [spec.parts[e] for e in expert_order]
        for part in parts:
            num_rows = part.shape[0]
            step = max(1, CHUNK_ELEMENTS // max(1, math.prod(part.shape[1:])))
            for row in range(0, num_rows, step):
                yield self.checkpoint.read_float32(part.name, slice(row, min(row + step, num_rows)))

    def stored_dtypes(self) -> list[str]:
        """The dtypes in which the checkpoint keeps the table's tensors."""
        return sorted({self.checkpoint.tensors[part.name].dtype for spec in self.table.values() for part in spec.parts})


def open_weights(checkpoint: Checkpoint, specs: Sequence[TensorSpec], harmless: Sequence[str] = ()) -> Weights:
    """Check a checkpoint against a table. Raises CheckpointError that lists every missing, extra or misshapen tensor.

    `harmless` are endings of names that may be present and are not used (recomputed buffers).
    """
    problems: list[str] = []
    used: set[str] = set()
    for spec in specs:
        for part in spec.parts:
            used.add(part.name)
            stored = checkpoint.tensors.get(part.name)
            if stored is None:
                problems.append(f"{part.name} is missing, expected {list(part.shape)} [{spec.letters}]")
            elif stored.shape != part.shape:
                problems.append(
                    f"{part.name} ({stored.shard.name}): found {list(stored.shape)}, config.json says "
                    f"{list(part.shape)} [{spec.letters}]; is the config from another checkpoint?"
                )
            elif stored.dtype not in FLOAT_DTYPES:
                problems.append(f"{part.name} has dtype {stored.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
    for name in sorted(set(checkpoint.tensors) - used):
        if not name.endswith(tuple(harmless)):
            problems.append(f"{name} {list(checkpoint.tensors[name].shape)} is not a tensor of this family")
    if problems:
        raise CheckpointError(f"reading {checkpoint.folder}: its tensors do not fit its config:{listing(problems)}")
    return Weights(checkpoint=checkpoint, table={spec.name: spec for spec in specs})
