"""Parts of a conversion: what one job read and wrote, with digests of both.

A part's record goes into the journal of the folder under construction when the part is written; all records together,
in the order of the jobs, are an engine's weights.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from export.checkpoint.digests import Run, range_digest
from export.errors import ConfigError, named
from export.files.reading import parse_json, read_text
from export.files.typed_json import read_typed

MAX_RECORDS_BYTES = 256 << 20  # some hundred thousand parts


class PlannedRegion(NamedTuple):
    """Consecutive bytes of a file that one job writes from first to last."""

    name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Region:
    """What became of a planned region: its bytes from `offset` on, and their SHA-256."""

    name: str
    offset: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What one job read and wrote. `warning` is said when all parts are there; an engine's records leave it out."""

    part: str
    sources: Mapping[str, tuple[Run, ...]]
    regions: tuple[Region, ...]
    warning: str | None = None


class OpenRegion:
    """A region that is being written from its start to its end."""

    def __init__(self, planned: PlannedRegion) -> None:
        self._planned = planned
        self._sha = hashlib.sha256()
        self.position = planned.offset

    @property
    def bytes_left(self) -> int:
        """What is not written yet."""
        return self._planned.offset + self._planned.num_bytes - self.position

    def write(self, descriptor: int, array: npt.NDArray[Any]) -> None:
        """Write an array's bytes behind those written before."""
        view = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._sha.update(view)
        while len(view):
            written = os.pwrite(descriptor, view, self.position)
            view = view[written:]
            self.position += written

    def finish(self) -> Region:
        """The record; what was not written up to the region's end is zeros."""
        name, offset, num_bytes = self._planned
        self._sha.update(bytes(self.bytes_left))
        return Region(name=name, offset=offset, bytes=num_bytes, sha256=self._sha.hexdigest())


def damaged_regions(path: Path, regions: Iterable[Region]) -> list[str]:
    """Of each region whose bytes are not those of its digest: where it is, and both digests."""
    problems = []
    for region in regions:
        within = path.is_file() and region.offset + region.bytes <= path.stat().st_size
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
    lines = []
    for record in records:
        values = asdict(record)
        del values["warning"]
        lines.append(json.dumps(values, separators=(",", ":")) + "\n")
    return "".join(lines)


def read_records(path: Path) -> list[PartRecord]:
    """The records of a file of `records_text`. Raises ValueError for anything else."""
    try:
        text = read_text(path, "what parts were made of", most=MAX_RECORDS_BYTES)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    records = [read_typed(PartRecord, _without_key(parse_json(line))) for line in text.splitlines()]
    for record in records:
        for region in record.regions:
            if min(region.offset, region.bytes) < 0:
                raise ValueError(f"{named(region.name)} has {region.bytes} bytes at {region.offset}")
    return records


def _without_key(record: Any) -> Any:  # noqa: ANN401 - JSON value
    """A part's record without the key that engines of formats 2 and 3 have of a packed weight."""
    return {name: value for name, value in record.items() if name != "key"} if isinstance(record, dict) else record


def read_record(line: Mapping[str, Any]) -> PartRecord | None:
    """The record of a journal's line; None for anything else."""
    try:
        return read_typed(PartRecord, line)
    except ValueError:
        return None
