"""Has jobs converted, several at a time, and journals each part when it is written."""

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

MAX_WORKERS = 4  # each holds what one job does
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


def write_parts(
    converter: Converter[J], jobs: Sequence[J], folder: PartialFolder, progress: Callable[[Progress], None]
) -> list[PartRecord]:
    """Write every part into the converter's files, but for those that are there already; returns all parts' records.

    Logs their warnings, also those of parts that an earlier run wrote. `progress` is called a few times a second.
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
    """Of an earlier run's records those whose bytes lie in the files as recorded, checked on all cores."""
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
    """The records of the jobs as they are done: in workers, or here where there is little to do."""
    workers = num_workers(converter, jobs)
    if workers:
        yield from convert_in_workers(converter, jobs, workers, count)
    else:
        for job in jobs:
            yield converter.convert(job, count)


def num_workers(converter: Converter[J], jobs: Sequence[J]) -> int:
    """How many processes convert side by side; 0 where this one does it alone."""
    if sum(map(converter.source_bytes, jobs)) <= WORKER_BYTES:
        return 0
    return min(MAX_WORKERS, num_cores(), len(jobs))


def conversion_bytes(converter: Converter[J], jobs: Sequence[J]) -> int:
    """Peak resident memory of a conversion, all its processes together: what this process, which has loaded the same
    libraries and laid out the same output, has taken so far; what a worker takes before it converts anything, measured
    on one; and what the largest parts hold that workers may convert side by side."""
    held = sorted(map(converter.working_bytes, jobs), reverse=True)
    workers = num_workers(converter, jobs)
    if not workers:
        return peak_memory() + held[0]
    return peak_memory() + workers * worker_memory(converter) + sum(held[:workers])


class _Tally:
    """How far the work is, told a few times a second."""

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
