"""Initializers planned before a byte is read: names, dtypes, shapes and offsets first, values streamed after.

A `WeightJob` turns one row of the tensor table into one initializer (plain float32) or two (packed codes and scales).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from export.quantize.grid import pack, quantize_blocks
from export.tensor_table import Role, Weights

MAX_WORKERS = 4  # each holds one chunk and what becomes of it
ALIGNMENT_BYTES = 64  # a cache line, and the widest vector register
_ITEM_BYTES = {"float32": 4, "uint8": 1}


class Packing(StrEnum):
    """How values become initializers."""

    PLAIN = "plain"
    BLOCKS = "blocks"


@dataclass(frozen=True, kw_only=True)
class Initializer:
    """One constant of the graph; `dtype` is "float32" or "uint8"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class WeightJob:
    """One table row to its initializers. `expert_order` lists, for a stacked row, which expert stands at each place;
    for the router, which of its rows does."""

    source: str
    role: Role
    packing: Packing
    outputs: tuple[Initializer, ...]
    bits: int = 32
    block_size: int = 0
    expert_order: tuple[int, ...] | None = None

    def produce(self, weights: Weights) -> Iterator[tuple[npt.NDArray[Any], ...]]:
        """Consecutive pieces of every output, in step, each contiguous in its initializer."""
        if self.role is Role.ROUTER:
            gate = weights.load(self.source)
            yield (gate[list(self.expert_order)] if self.expert_order else gate,)
            return
        for chunk in weights.chunks(self.source, self.expert_order):
            if self.packing is Packing.PLAIN:
                yield (chunk,)
            else:
                codes, scales = quantize_blocks(chunk, self.bits, self.block_size)
                yield pack(codes, self.bits), scales


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where every initializer lies in the data file: name -> (offset, bytes)."""

    offsets: dict[str, tuple[int, int]]
    total_bytes: int


def place(jobs: Sequence[WeightJob]) -> Placement:
    """Lay the initializers out one after the other, aligned."""
    offsets: dict[str, tuple[int, int]] = {}
    position = 0
    for job in jobs:
        for output in job.outputs:
            offsets[output.name] = (position, output.num_bytes)
            position += -(-output.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return Placement(offsets=offsets, total_bytes=position)


def write_weights(
    path: os.PathLike[str],
    jobs: Sequence[WeightJob],
    placement: Placement,
    weights: Weights,
    progress: Callable[[int], None],
) -> None:
    """Stream every job's values into the data file, several jobs at a time; `progress` gets the bytes of each job.

    The jobs write to places of their own, and numpy lets threads run side by side while it computes.
    """
    with open(path, "wb") as file:  # noqa: PTH123 - os.PathLike
        file.truncate(placement.total_bytes)
        pool = ThreadPoolExecutor(max_workers=min(MAX_WORKERS, os.cpu_count() or 1))
        try:
            writing = {pool.submit(_write_job, file.fileno(), job, placement, weights): job for job in jobs}
            for done in as_completed(writing):
                done.result()
                progress(sum(output.num_bytes for output in writing[done].outputs))
        finally:
            pool.shutdown(cancel_futures=True)


def _write_job(descriptor: int, job: WeightJob, placement: Placement, weights: Weights) -> None:
    positions = [placement.offsets[output.name][0] for output in job.outputs]
    ends = [sum(placement.offsets[output.name]) for output in job.outputs]
    for pieces in job.produce(weights):
        for index, piece in enumerate(pieces):
            positions[index] += _write_at(descriptor, np.ascontiguousarray(piece), positions[index])
    if positions != ends:
        raise AssertionError(f"{job.source}: wrote to {positions}, planned {ends}")


def _write_at(descriptor: int, array: npt.NDArray[Any], offset: int) -> int:
    view = memoryview(array.reshape(-1).view(np.uint8).data)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return done
