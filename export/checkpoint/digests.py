"""SHA-256 of a checkpoint's bytes, taken while they are read for conversion, and of parts of files.

A tensor is read in one run from start to end, or in one for each of the parts that are packed in it (an expert's gate
rows, say), whatever their order; a run is hashed as it is read. The digest of a shard is SHA-256 over its header (the
first 8 + length bytes) and then, tensor by tensor in order of offset and run by run in order of place, the 32 bytes of
the run's own SHA-256. So it is known after one pass, and anyone can recompute it on several cores: an engine's
weights.jsonl lists the runs, and a tensor that it does not name is one run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.checkpoint.folder import Checkpoint, file_digest
from export.checkpoint.safetensors_header import StoredTensor, header_bytes
from export.errors import CheckpointError, named
from export.files.reading import open_regular

_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Run:
    """Consecutive bytes of a tensor that were read one after the other, and their SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


Runs = Mapping[str, tuple[Run, ...]]  # tensor name -> its runs in order of place


@dataclass
class _OpenRun:
    start: int
    end: int
    sha: Any


@dataclass(frozen=True, kw_only=True)
class RecordedCheckpoint(Checkpoint):
    """A checkpoint that hashes what is read through it; for one thread. `count` gets the bytes of each read; `starts`
    says at which bytes of a tensor a run begins, where that is not its start alone."""

    count: Callable[[int], None]
    starts: Mapping[str, Collection[int]] = field(default_factory=dict)
    _open: dict[str, list[_OpenRun]] = field(default_factory=dict)

    def read_into(self, stored: StoredTensor, start: int, view: memoryview) -> None:
        """As of any checkpoint."""
        super().read_into(stored, start, view)
        runs = self._open.setdefault(stored.name, [])
        if start in self.starts.get(stored.name, (0,)):
            runs.append(_OpenRun(start=start, end=start, sha=hashlib.sha256()))
        run = next((run for run in reversed(runs) if run.end == start), None)
        if run is None:
            raise AssertionError(f"{stored.name} was read from byte {start} on, where no run begins or has come to")
        run.sha.update(view)
        run.end += len(view)
        self.count(len(view))

    def runs(self) -> dict[str, tuple[Run, ...]]:
        """The runs of every tensor that was read. Raises AssertionError unless each was read whole and once."""
        found = {}
        for name, runs in self._open.items():
            runs.sort(key=lambda run: run.start)
            ends = [0, *(run.end for run in runs)]
            if [run.start for run in runs] != ends[:-1] or ends[-1] != self.tensors[name].num_bytes:
                raise AssertionError(f"{name} was read in {[(run.start, run.end) for run in runs]}, not whole and once")
            found[name] = tuple(Run(bytes=run.end - run.start, sha256=run.sha.hexdigest()) for run in runs)
        return found


def recorded(
    checkpoint: Checkpoint, count: Callable[[int], None], starts: Mapping[str, Collection[int]] | None = None
) -> RecordedCheckpoint:
    """The checkpoint, recording."""
    return RecordedCheckpoint(**vars(checkpoint), count=count, starts=starts or {})


def source_digests(checkpoint: Checkpoint, runs: Runs, read: bool = True) -> dict[str, str]:
    """Digests by file name: config.json's SHA-256, and of every shard what the module describes.

    With `read` every tensor is read and `runs` gives no more than where one run ends; without it the digests in `runs`
    are taken, and only tensors that are not named there are read. Raises CheckpointError when a file ends early.
    """
    ordered = sorted(checkpoint.tensors.values(), key=lambda stored: stored.offset)
    with ThreadPoolExecutor(max_workers=num_cores()) as pool:
        digests = dict(
            zip(
                (stored.name for stored in ordered),
                pool.map(lambda stored: _run_digests(stored, runs.get(stored.name, ()), read), ordered),
                strict=True,
            )
        )
    found = {"config.json": file_digest(checkpoint.folder / "config.json")}
    for shard in checkpoint.shards:
        whole = hashlib.sha256(header_bytes(shard))
        for stored in ordered:
            if stored.shard == shard:
                whole.update(digests[stored.name])
        found[shard.name] = whole.hexdigest()
    return found


def shards_read_otherwise(checkpoint: Checkpoint, runs: Runs, shards: Collection[str]) -> list[str]:
    """Of the shards with these names those that hold other bytes than were read, by the tensors in `runs`; reads them.

    Raises CheckpointError when a file ends early.
    """
    stored = [item for item in checkpoint.tensors.values() if item.shard.name in shards and item.name in runs]
    with ThreadPoolExecutor(max_workers=num_cores()) as pool:
        same = pool.map(
            lambda item: _run_digests(item, runs[item.name], True) == _run_digests(item, runs[item.name], False), stored
        )
        return sorted({item.shard.name for item, is_same in zip(stored, same, strict=True) if not is_same})


def range_digest(path: Path, offset: int, num_bytes: int) -> bytes:
    """SHA-256 of a part of a file. Raises CheckpointError when the file ends before it."""
    sha = hashlib.sha256()
    doing = f"reading {named(path)}"
    with open_regular(path, doing, CheckpointError) as file:
        file.seek(offset)
        left, buffer = num_bytes, bytearray(min(num_bytes, _READ_BYTES))
        while left:
            got = file.readinto(memoryview(buffer)[: min(left, len(buffer))])
            if not got:
                raise CheckpointError(f"{doing}: the file ended {left} bytes early; it changed or is damaged")
            sha.update(memoryview(buffer)[:got])
            left -= got
    return sha.digest()


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _run_digests(stored: StoredTensor, runs: Sequence[Run], read: bool) -> bytes:
    if runs and not read:
        return b"".join(bytes.fromhex(run.sha256) for run in runs)
    return b"".join(
        range_digest(stored.shard, stored.offset + start, num_bytes) for start, num_bytes in _cuts(stored, runs)
    )


def _cuts(stored: StoredTensor, runs: Sequence[Run]) -> Iterator[tuple[int, int]]:
    """Start and length of every run; a tensor whose runs are of another length is one run."""
    lengths = [run.bytes for run in runs]
    if sum(lengths) != stored.num_bytes:
        lengths = [stored.num_bytes]
    start = 0
    for length in lengths:
        yield start, length
        start += length
