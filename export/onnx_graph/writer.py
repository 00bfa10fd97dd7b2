"""Streams weight jobs into the data file, several at a time, and journals each part when it is written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from export.digests import num_cores
from export.onnx_graph.converter import Converter, scratch_bytes, source_bytes, working_bytes
from export.onnx_graph.parts import PartRecord, finished_parts
from export.onnx_graph.weights import Placement, WeightJob
from export.onnx_graph.workers import convert_in_workers, peak_memory, worker_memory
from export.resume import PartialFolder
from export.tensor_table import Weights

MAX_WORKERS = 4  # each holds one weight while it is packed
WORKER_BYTES = 1 << 26  # of source tensors, which a process converts in less time than another takes to start
PROGRESS_INTERVAL_S = 0.2
FLUSH_BYTES = 1 << 28  # written between two flushes, so that the disk works while tensors are converted


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a conversion is: parts, and bytes of source tensors. `resumed` of either were there at the start."""

    parts: int
    num_parts: int
    resumed_parts: int
    bytes: int
    num_bytes: int
    resumed_bytes: int


def write_weights(
    name: str,
    jobs: Sequence[WeightJob],
    placement: Placement,
    weights: Weights,
    folder: PartialFolder,
    progress: Callable[[Progress], None],
) -> list[PartRecord]:
    """Write the data file `name` of the folder, but for the parts that are there already; returns every part's record.

    `progress` is called a few times a second.
    """
    path = folder.content / name
    records = finished_parts(path, jobs, placement, folder.records)
    left = [job for job in jobs if job.source not in records]
    tally = _Tally(jobs, weights, records, progress)
    converter = Converter(data=path, placement=placement, weights=weights, scratch=folder.scratch)
    with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
        file.truncate(placement.total_bytes)
        tally.tell()
        flushed = 0
        for record in _converted(converter, left, tally.count):
            if record is None:
                tally.tell_in_time()
                continue
            folder.append(asdict(record))
            records[record.part] = record
            tally.part_finished()
            flushed += sum(region.bytes for region in record.regions)
            if flushed >= FLUSH_BYTES:
                os.fdatasync(file.fileno())
                flushed = 0
    return [records[job.source] for job in jobs]


def _converted(
    converter: Converter, jobs: Sequence[WeightJob], count: Callable[[int], None]
) -> Iterator[PartRecord | None]:
    """The records of the jobs as they are done: in workers, or here where there is little to do."""
    workers = num_workers(jobs, converter.weights)
    if workers:
        yield from convert_in_workers(converter, jobs, workers, count)
    else:
        for job in jobs:
            yield converter.convert(job, count)


def num_workers(jobs: Sequence[WeightJob], weights: Weights) -> int:
    """How many processes convert side by side; 0 where this one does it alone."""
    if sum(source_bytes(job, weights) for job in jobs) <= WORKER_BYTES:
        return 0
    return min(MAX_WORKERS, num_cores(), len(jobs))


def disk_bytes(jobs: Sequence[WeightJob], placement: Placement) -> int:
    """What a conversion takes on the disk: the data file, and the working files of the largest parts side by side."""
    scratch = sorted(map(scratch_bytes, jobs), reverse=True)
    return placement.total_bytes + sum(scratch[: min(MAX_WORKERS, num_cores())])


def conversion_bytes(jobs: Sequence[WeightJob], placement: Placement, weights: Weights) -> int:
    """Peak resident memory of a build, all its processes together: what this process, which has loaded the same
    libraries and laid out the same graphs, has taken so far; what a worker takes before it converts anything, measured
    on one; and what the largest parts hold that workers may convert side by side."""
    held = sorted((working_bytes(job, weights) for job in jobs), reverse=True)
    workers = num_workers(jobs, weights)
    if not workers:
        return peak_memory() + held[0]
    converter = Converter(data=Path(), placement=placement, weights=weights, scratch=Path())
    return peak_memory() + workers * worker_memory(converter, jobs) + sum(held[:workers])


class _Tally:
    """How far the work is, told a few times a second."""

    def __init__(
        self,
        jobs: Sequence[WeightJob],
        weights: Weights,
        finished: Mapping[str, PartRecord],
        progress: Callable[[Progress], None],
    ) -> None:
        sizes = {job.source: source_bytes(job, weights) for job in jobs}
        self._num_parts, self._num_bytes = len(jobs), sum(sizes.values())
        self._parts = self._resumed_parts = len(finished)
        self._bytes = self._resumed_bytes = sum(sizes[part] for part in finished)
        self._progress, self._told = progress, 0.0

    def count(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        self.tell_in_time()

    def part_finished(self) -> None:
        self._parts += 1
        self.tell()

    def tell_in_time(self) -> None:
        if time.monotonic() - self._told >= PROGRESS_INTERVAL_S:
            self.tell()

    def tell(self) -> None:
        self._told = time.monotonic()
        self._progress(
            Progress(
                parts=self._parts,
                num_parts=self._num_parts,
                resumed_parts=self._resumed_parts,
                bytes=self._bytes,
                num_bytes=self._num_bytes,
                resumed_bytes=self._resumed_bytes,
            )
        )
