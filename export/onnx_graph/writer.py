"""Streams weight jobs into the data file, several at a time, each source tensor read once and hashed as it is read.

A part is one job: the source tensors that it reads and the initializers that it writes. Its record, with the digests
of both, goes into the journal of the folder under construction when the part is written; all records together, in the
order of the file, are the engine's weights.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.digests import Run, num_cores, range_digest, recorded
from export.errors import ExportError
from export.onnx_graph.packing import packed
from export.onnx_graph.weights import Packing, Placement, WeightJob, aligned
from export.quantize.grid import SLICE_VALUES
from export.resume import PartialFolder
from export.tensor_table import CHUNK_ELEMENTS, Weights
from export.typed_json import read_typed

MAX_WORKERS = 4  # each holds one chunk and what becomes of it
PROGRESS_INTERVAL_S = 0.2
FLUSH_BYTES = 1 << 28  # written between two flushes, so that the disk works while tensors are converted


@dataclass(frozen=True, kw_only=True)
class Region:
    """One initializer in the data file: bytes from `offset` on, the zeros up to the next included."""

    name: str
    offset: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What one job read and wrote."""

    part: str
    sources: Mapping[str, tuple[Run, ...]]
    regions: tuple[Region, ...]
    key: str | None  # of a packed weight: under it ONNX Runtime finds the packed form


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

    `progress` is called from this thread, a few times a second. The jobs write to places of their own, and numpy and
    hashlib let threads run side by side while they compute.
    """
    path = folder.content / name
    records = finished_parts(path, jobs, placement, folder.records)
    tally = _Tally(jobs, weights, records)
    with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
        file.truncate(placement.total_bytes)
        stop = threading.Event()
        writer = _Writer(
            descriptor=file.fileno(), placement=placement, weights=weights, scratch=folder.scratch, count=tally.count,
            stop=stop,
        )  # fmt: skip
        pool = ThreadPoolExecutor(max_workers=num_workers())
        try:
            pending = {pool.submit(writer.write, job) for job in jobs if job.source not in records}
            progress(tally.progress(len(records)))
            flushed = 0
            while pending:
                done, pending = wait(pending, timeout=PROGRESS_INTERVAL_S, return_when=FIRST_COMPLETED)
                for record in (future.result() for future in sorted(done, key=_failed)):
                    folder.append(asdict(record))
                    records[record.part] = record
                    flushed += sum(region.bytes for region in record.regions)
                progress(tally.progress(len(records)))
                if flushed >= FLUSH_BYTES:
                    os.fdatasync(file.fileno())
                    flushed = 0
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return [records[job.source] for job in jobs]


def num_workers() -> int:
    """How many jobs are converted side by side."""
    return min(MAX_WORKERS, num_cores())


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


def planned_regions(job: WeightJob, placement: Placement) -> list[tuple[str, int, int]]:
    """Name, offset and bytes of what a job writes."""
    return [(output.name, placement.offsets[output.name][0], aligned(output.num_bytes)) for output in job.outputs]


def finished_parts(
    path: Path, jobs: Sequence[WeightJob], placement: Placement, lines: Iterable[Mapping[str, Any]]
) -> dict[str, PartRecord]:
    """Of an earlier run's records those whose bytes lie in the data file as recorded, checked on all cores."""
    planned = {job.source: planned_regions(job, placement) for job in jobs}
    records = {record.part: record for record in map(_read_record, lines) if record is not None}
    fitting = [
        record
        for record in records.values()
        if planned.get(record.part) == [(region.name, region.offset, region.bytes) for region in record.regions]
    ]
    if not path.is_file():
        return {}
    with ThreadPoolExecutor(max_workers=num_cores()) as pool:
        whole = pool.map(lambda record: not damaged_regions(path, record.regions), fitting)
        return {record.part: record for record, intact in zip(fitting, whole, strict=True) if intact}


def damaged_regions(path: Path, regions: Iterable[Region]) -> list[str]:
    """Of each region whose bytes are not those of its digest: where it is, and both digests."""
    problems = []
    for region in regions:
        within = region.offset + region.bytes <= path.stat().st_size
        found = range_digest(path, region.offset, region.bytes).hex() if within else "nothing"
        if found != region.sha256:
            end = region.offset + region.bytes
            problems.append(
                f"{region.name} (bytes {region.offset} to {end}): found SHA-256 {found[:12]}…, "
                f"expected {region.sha256[:12]}…"
            )
    return problems


def records_text(records: Iterable[PartRecord]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(asdict(record), separators=(",", ":")) + "\n" for record in records)


def read_records(path: Path) -> list[PartRecord]:
    """The records of a file of `records_text`. Raises ValueError for anything else."""
    return [read_typed(PartRecord, json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _read_record(line: Mapping[str, Any]) -> PartRecord | None:
    try:
        return read_typed(PartRecord, line)
    except ValueError:
        return None


def _failed(done: Future[PartRecord]) -> bool:
    """Sorts failures last, so that what was written beside them is noted."""
    return done.exception() is not None


class _Tally:
    """Bytes of source tensors read so far, by all threads."""

    def __init__(self, jobs: Sequence[WeightJob], weights: Weights, finished: Mapping[str, PartRecord]) -> None:
        sizes = {job.source: _source_bytes(job, weights) for job in jobs}
        self._num_parts, self._num_bytes = len(jobs), sum(sizes.values())
        self._resumed_parts = len(finished)
        self._resumed_bytes = self._bytes = sum(sizes[part] for part in finished)
        self._lock = threading.Lock()

    def count(self, num_bytes: int) -> None:
        with self._lock:
            self._bytes += num_bytes

    def progress(self, parts: int) -> Progress:
        return Progress(
            parts=parts,
            num_parts=self._num_parts,
            resumed_parts=self._resumed_parts,
            bytes=self._bytes,
            num_bytes=self._num_bytes,
            resumed_bytes=self._resumed_bytes,
        )


def _source_bytes(job: WeightJob, weights: Weights) -> int:
    if job.packing is Packing.UNREAD:
        return 0
    stored = weights.checkpoint.tensors
    return sum(stored[name].num_bytes for name in {part.name for part in weights.table[job.source].parts})


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """Writes jobs into an open data file."""

    descriptor: int
    placement: Placement
    weights: Weights
    scratch: Path
    count: Callable[[int], None]
    stop: threading.Event

    def write(self, job: WeightJob) -> PartRecord:
        checkpoint = recorded(self.weights.checkpoint, self.count)
        regions = [_OpenRegion(*region) for region in planned_regions(job, self.placement)]
        produced = self._until_stopped(job, Weights(checkpoint=checkpoint, table=self.weights.table))
        key = None
        if job.packed is None:
            for pieces in produced:
                for region, piece in zip(regions, pieces, strict=True):
                    region.write(self.descriptor, piece)
        else:
            with packed(job.packed, produced, self.scratch) as weight:
                key = weight.key
                for region, blob in zip(regions, weight.blobs, strict=True):
                    for piece in weight.pieces(blob):
                        region.write(self.descriptor, piece)
        ends = [sum(self.placement.offsets[output.name]) for output in job.outputs]
        if [region.position for region in regions] != ends:
            raise AssertionError(f"{job.source}: wrote to {[region.position for region in regions]}, planned {ends}")
        written = tuple(region.finish() for region in regions)
        return PartRecord(part=job.source, sources=checkpoint.runs(), regions=written, key=key)

    def _until_stopped(self, job: WeightJob, weights: Weights) -> Iterator[tuple[npt.NDArray[Any], ...]]:
        for pieces in job.produce(weights):
            if self.stop.is_set():
                raise ExportError(f"writing {job.source}: another part failed")
            yield pieces


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
