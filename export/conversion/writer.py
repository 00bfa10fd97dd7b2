"""Runs the jobs of a conversion, several at a time, and adds each part to the journal when it is written."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from export.checkpoint.digests import num_cores
from export.conversion.converter import Converter, J
from export.conversion.parts import PartRecord, damaged_regions, read_record
from export.conversion.workers import convert_in_workers, peak_memory, worker_memory
from export.files.resume import PartialFolder

logger = logging.getLogger(__name__)

MAX_WORKERS = 4  # most workers: each holds one job's arrays in memory
WORKER_BYTES = 1 << 26  # source bytes up to which no worker is started: starting one would take longer
PROGRESS_INTERVAL_S = 0.2
FLUSH_BYTES = 1 << 28  # bytes between two flushes, so that the disk writes while tensors are converted


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a conversion: finished and all parts, and bytes of source tensors. `resumed_parts` and
    `resumed_bytes` count what an earlier run had finished."""

    parts: int
    num_parts: int
    resumed_parts: int
    bytes: int
    num_bytes: int
    resumed_bytes: int


def write_parts(
    converter: Converter[J], jobs: Sequence[J], folder: PartialFolder, progress: Callable[[Progress], None]
) -> list[PartRecord]:
    """Write every part that an earlier run did not finish into the converter's files; returns the records of all parts.

    Logs the warnings of all parts, also of those that an earlier run wrote. `progress` is called a few times a second.
    """
    records = _finished_parts(converter, jobs, folder.records)
    left = [job for job in jobs if job.source not in records]
    tally = _Tally({job.source: converter.source_bytes(job) for job in jobs}, records, progress)
    with ExitStack() as files:
        opened = []
        for path, num_bytes in converter.files().items():
            file = files.enter_context(path.open("r+b" if path.exists() else "w+b", buffering=0))
            file.truncate(num_bytes)
            opened.append(file)
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
                for file in opened:
                    os.fdatasync(file.fileno())
                flushed = 0
    finished = [records[job.source] for job in jobs]
    for record in finished:
        if record.warning is not None:
            logger.warning("%s", record.warning)
    return finished


def _finished_parts(
    converter: Converter[J], jobs: Sequence[J], lines: Sequence[Mapping[str, object]]
) -> dict[str, PartRecord]:
    """The records of an earlier run whose regions are as planned and have the recorded digests; hashed on all cores."""
    planned = {job.source: converter.planned_regions(job) for job in jobs}
    records = {record.part: record for record in map(read_record, lines) if record is not None}
    fitting = [
        record
        for record in records.values()
        if planned.get(record.part) == [(region.name, region.offset, region.bytes) for region in record.regions]
    ]

    def is_whole(record: PartRecord) -> bool:
        return not any(damaged_regions(converter.file_of(region.name), [region]) for region in record.regions)

    with ThreadPoolExecutor(max_workers=num_cores()) as pool:
        whole = pool.map(is_whole, fitting)
        return {record.part: record for record, intact in zip(fitting, whole, strict=True) if intact}


def _converted(converter: Converter[J], jobs: Sequence[J], count: Callable[[int], None]) -> Iterator[PartRecord | None]:
    """Yield the record of each job when it is done: in workers, or in this process if there is little to do."""
    workers = num_workers(converter, jobs)
    if workers:
        yield from convert_in_workers(converter, jobs, workers, count)
    else:
        for job in jobs:
            yield converter.convert(job, count)


def num_workers(converter: Converter[J], jobs: Sequence[J]) -> int:
    """The number of worker processes; 0 if this process converts alone."""
    if sum(map(converter.source_bytes, jobs)) <= WORKER_BYTES:
        return 0
    return min(MAX_WORKERS, num_cores(), len(jobs))


def conversion_bytes(converter: Converter[J], jobs: Sequence[J]) -> int:
    """Peak resident memory of a conversion in bytes, the sum over all of its processes. It adds up the peak of this
    process so far, which has loaded the same libraries and planned the same output; the memory of the idle workers,
    measured on one; and the working memory of the largest jobs, as many as run at the same time."""
    held = sorted(map(converter.working_bytes, jobs), reverse=True)
    workers = num_workers(converter, jobs)
    if not workers:
        return peak_memory() + held[0]
    return peak_memory() + workers * worker_memory(converter) + sum(held[:workers])


class _Tally:
    """Counts the progress and calls `progress` a few times a second."""

    def __init__(
        self, sizes: Mapping[str, int], finished: Mapping[str, PartRecord], progress: Callable[[Progress], None]
    ) -> None:
        self._num_parts, self._num_bytes = len(sizes), sum(sizes.values())
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
