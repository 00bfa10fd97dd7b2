"""Parts of the data file: what one weight job read and wrote, with digests of both.

A part's record goes into the journal of the folder under construction when the part is written; all records together,
in the order of the file, are the engine's weights.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.digests import Run, num_cores, range_digest
from export.onnx_graph.weights import Placement, WeightJob, aligned
from export.typed_json import read_typed


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
