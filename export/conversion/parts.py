"""Parts: finished jobs of a conversion. A part's record holds digests of what the job read and of what it wrote.

When a part is written, its record is appended to the journal of the partial folder. An engine's weights.jsonl holds the
records of all parts, in the order of the jobs.
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

MAX_RECORDS_BYTES = 256 << 20  # most bytes of a weights.jsonl: some hundred thousand parts


class PlannedRegion(NamedTuple):
    """A region that a job will write: `num_bytes` bytes of a file from `offset` on, written in order."""

    name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Region:
    """A region that is written: its `bytes` bytes from `offset` on have the SHA-256 `sha256`."""

    name: str
    offset: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What one job read and wrote. `warning` is logged when all parts are written. `loss` has, of a matrix that the
    checkpoint stores packed, the sum of squared errors against the checkpoint's values and the sum of their squares.
    Neither is in weights.jsonl."""

    part: str
    sources: Mapping[str, tuple[Run, ...]]
    regions: tuple[Region, ...]
    warning: str | None = None
    loss: tuple[float, ...] | None = None


class OpenRegion:
    """A region that is being written from its start to its end."""

    def __init__(self, planned: PlannedRegion) -> None:
        self._planned = planned
        self._sha = hashlib.sha256()
        self.position = planned.offset

    @property
    def bytes_left(self) -> int:
        """The number of bytes that are not written yet."""
        return self._planned.offset + self._planned.num_bytes - self.position

    def write(self, descriptor: int, array: npt.NDArray[Any]) -> None:
        """Write an array's bytes after those that were written before."""
        view = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._sha.update(view)
        while len(view):
            written = os.pwrite(descriptor, view, self.position)
            view = view[written:]
            self.position += written

    def finish(self) -> Region:
        """The region's record, with the digest. Bytes that were not written, up to the region's end, count as zeros."""
        name, offset, num_bytes = self._planned
        self._sha.update(bytes(self.bytes_left))
        return Region(name=name, offset=offset, bytes=num_bytes, sha256=self._sha.hexdigest())


def damaged_regions(path: Path, regions: Iterable[Region]) -> list[str]:
    """One problem for each region of the file whose bytes do not have its digest: the place and both digests."""
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
    """The text of weights.jsonl: one record a line, as a JSON object without its warning and its loss."""
    lines = []
    for record in records:
        values = asdict(record)
        del values["warning"], values["loss"]
        lines.append(json.dumps(values, separators=(",", ":")) + "\n")
    return "".join(lines)


def read_records(path: Path) -> list[PartRecord]:
    """Read weights.jsonl, as `records_text` wrote it. Raises ValueError for anything else."""
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
    """A part's record without the field "key", which engines of formats 2 and 3 have for packed weights."""
    return {name: value for name, value in record.items() if name != "key"} if isinstance(record, dict) else record


def read_record(line: Mapping[str, Any]) -> PartRecord | None:
    """The part's record in one line of a journal; None if the line is anything else."""
    try:
        return read_typed(PartRecord, line)
    except ValueError:
        return None
