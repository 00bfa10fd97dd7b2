"""One weight job at a time: source tensors read once and hashed, initializers written to their places and hashed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.digests import recorded
from export.onnx_graph.packing import SCRATCH_COPIES, packed
from export.onnx_graph.parts import PartRecord, Region, planned_regions
from export.onnx_graph.weights import Packing, Placement, WeightJob
from export.quantize.grid import SLICE_VALUES
from export.tensor_table import CHUNK_ELEMENTS, Weights


@dataclass(frozen=True, kw_only=True)
class Converter:
    """Converts jobs into the data file, which has its full length already; `scratch` is a folder for working files."""

    data: Path
    placement: Placement
    weights: Weights
    scratch: Path

    def convert(self, job: WeightJob, count: Callable[[int], None]) -> PartRecord:
        """Write one part; `count` gets the bytes of each read. Raises as reading, quantising and packing do."""
        checkpoint = recorded(self.weights.checkpoint, count, run_starts(job, self.weights))
        regions = [_OpenRegion(*region) for region in planned_regions(job, self.placement)]
        produced = job.produce(Weights(checkpoint=checkpoint, table=self.weights.table))
        key = None
        with self.data.open("r+b", buffering=0) as file:
            if job.packed is None:
                for pieces in produced:
                    for region, piece in zip(regions, pieces, strict=True):
                        region.write(file.fileno(), piece)
            else:
                with packed(job.packed, produced, self.scratch) as weight:
                    key = weight.key
                    for region, blob in zip(regions, weight.blobs, strict=True):
                        for piece in weight.pieces(blob):
                            region.write(file.fileno(), piece)
        ends = [sum(self.placement.offsets[output.name]) for output in job.outputs]
        if [region.position for region in regions] != ends:
            raise AssertionError(f"{job.source}: wrote to {[region.position for region in regions]}, planned {ends}")
        written = tuple(region.finish() for region in regions)
        return PartRecord(part=job.source, sources=checkpoint.runs(), regions=written, key=key)


def run_starts(job: WeightJob, weights: Weights) -> dict[str, list[int]]:
    """At which bytes of each source tensor a run of reading begins: where one of the job's parts does."""
    if job.packing is Packing.UNREAD:
        return {}
    starts: dict[str, list[int]] = {}
    for part in weights.table[job.source].parts:
        itemsize = weights.checkpoint.tensors[part.name].itemsize
        starts.setdefault(part.name, []).append(part.first_element * itemsize)
    return {name: sorted(found) for name, found in starts.items()}


def working_bytes(job: WeightJob, weights: Weights) -> int:
    """What converting a job holds: a chunk as stored, two as float32 (the one before is let go when the next is there)
    and, where blocks are made of it, its codes twice, unpacked and packed, and the slices that they are made in. To
    pack a weight its codes and scales are mapped whole, and its packed form is held beside them."""
    if job.packing is Packing.UNREAD:
        return job.outputs[0].num_bytes
    chunk = min(CHUNK_ELEMENTS, weights.table[job.source].num_elements)
    stored = max(weights.checkpoint.tensors[part.name].itemsize for part in weights.table[job.source].parts)
    plain = chunk * (stored + 2 * 4)
    if job.packing is Packing.PLAIN:
        return plain
    blocks = plain + chunk * (1 + 1 + 1) + 3 * 4 * SLICE_VALUES
    if job.packed is None:
        return blocks
    return blocks + job.packed.codes_bytes + job.packed.scales_bytes + sum(output.num_bytes for output in job.outputs)


def scratch_bytes(job: WeightJob) -> int:
    """What the working files of a job take on the disk at the most."""
    return SCRATCH_COPIES * (job.packed.codes_bytes + job.packed.scales_bytes) if job.packed else 0


def source_bytes(job: WeightJob, weights: Weights) -> int:
    """Bytes of the source tensors that a job reads."""
    if job.packing is Packing.UNREAD:
        return 0
    stored = weights.checkpoint.tensors
    return sum(stored[name].num_bytes for name in {part.name for part in weights.table[job.source].parts})


class _OpenRegion:
    """An initializer that is being written from its start to its end."""

    def __init__(self, name: str, offset: int, num_bytes: int) -> None:
        self._name, self._offset, self._num_bytes = name, offset, num_bytes
        self._sha = hashlib.sha256()
        self.position = offset

    def write(self, descriptor: int, array: npt.NDArray[Any]) -> None:
        view = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._sha.update(view)
        while len(view):
            written = os.pwrite(descriptor, view, self.position)
            view = view[written:]
            self.position += written

    def finish(self) -> Region:
        self._sha.update(bytes(self._offset + self._num_bytes - self.position))
        return Region(name=self._name, offset=self._offset, bytes=self._num_bytes, sha256=self._sha.hexdigest())
