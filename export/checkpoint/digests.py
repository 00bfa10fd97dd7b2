"""SHA-256 of a checkpoint's shards, computed while they are read for conversion, and of ranges of files.

A run is a range of a tensor's bytes that is read from start to end and hashed as it is read. Most tensors are one run.
A tensor that holds several parts (an expert's gate rows, say) has one run for each part, read in any order.

The digest of a shard is the SHA-256 of its header (the first 8 + length bytes), followed by the 32 bytes of every run's
SHA-256: tensors in the order of their offsets, and the runs of a tensor in the order of theirs. So it is known after
one pass over the shard, and it can be recomputed on several cores. An engine's weights.jsonl lists the runs; a tensor
that it does not name is one run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from export.checkpoint.folder import Checkpoint, file_digest, header_bytes
from export.checkpoint.safetensors_header import StoredTensor
from export.errors import CheckpointError, named
from export.files.reading import open_regular

_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Run:
    """A range of a tensor's bytes that was read from start to end, and its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


Runs = Mapping[str, tuple[Run, ...]]  # tensor name -> its runs in the order of their offsets


@dataclass
class _OpenRun:
    start: int
    end: int
    sha: Any


@dataclass(frozen=True, kw_only=True)
class RecordedCheckpoint(Checkpoint):
    """A checkpoint that hashes the bytes that are read through it; for use by one thread. `count` is called with the
    number of bytes of each read. `starts`: tensor name -> first bytes of its runs; a tensor that is absent is one
    run."""

    count: Callable[[int], None]
    starts: Mapping[str, Collection[int]] = field(default_factory=dict)
    _open: dict[str, list[_OpenRun]] = field(default_factory=dict)

    def read_into(self, stored: StoredTensor, start: int, view: memoryview) -> None:
        """Fill `view` like `Checkpoint.read_into`, and hash the bytes as part of their run."""
        super().read_into(stored, start, view)
        runs = self._open.setdefault(stored.name, [])
        if start in self.starts.get(stored.name, (0,)):
            runs.append(_OpenRun(start=start, end=start, sha=hashlib.sha256()))
        run = next((run for run in reversed(runs) if run.end == start), None)
        if run is None:
            raise AssertionError(
                f"{stored.name} was read from byte {start} on, expected the start of a run or where it stopped"
            )
        run.sha.update(view)
        run.end += len(view)
        self.count(len(view))

    def runs(self) -> dict[str, tuple[Run, ...]]:
        """The runs of every tensor that was read. Raises AssertionError unless every byte of it was read exactly
        once."""
        found = {}
        for name, runs in self._open.items():
            runs.sort(key=lambda run: run.start)
            ends = [0, *(run.end for run in runs)]
            if [run.start for run in runs] != ends[:-1] or ends[-1] != self.stored[name].num_bytes:
                raise AssertionError(
                    f"{name} was read in {[(run.start, run.end) for run in runs]}, expected each byte once"
                )
            found[name] = tuple(Run(bytes=run.end - run.start, sha256=run.sha.hexdigest()) for run in runs)
        return found


def recorded(
    checkpoint: Checkpoint, count: Callable[[int], None], starts: Mapping[str, Collection[int]] | None = None
) -> RecordedCheckpoint:
    """The checkpoint as a RecordedCheckpoint, which hashes the bytes that are read through it."""
    values = {entry.name: getattr(checkpoint, entry.name) for entry in fields(checkpoint) if entry.init}
    return RecordedCheckpoint(**values, count=count, starts=starts or {})


def source_digests(checkpoint: Checkpoint, runs: Runs, read: bool = True) -> dict[str, str]:
    """Digests of a checkpoint's files by name: SHA-256 of config.json, which a GGUF file has not, and the digest of
    every shard that is described at the top of this module.

    With `read` every tensor is read, and only the lengths of the runs are taken from `runs`. Without `read` the digests
    are taken from `runs` too, and only tensors that it does not name are read. Raises CheckpointError if a file ends
    early.
    """
    ordered = sorted(checkpoint.stored.values(), key=lambda stored: stored.offset)
    with ThreadPoolExecutor(max_workers=num_cores()) as pool:
        digests = dict(
            zip(
                (stored.name for stored in ordered),
                pool.map(lambda stored: _run_digests(stored, runs.get(stored.name, ()), read), ordered),
                strict=True,
            )
        )
    found = {path.name: file_digest(path) for path in checkpoint.settings_files()}
    for shard in checkpoint.shards:
        whole = hashlib.sha256(header_bytes(shard))
        for stored in ordered:
            if stored.shard == shard:
                whole.update(digests[stored.name])
        found[shard.name] = whole.hexdigest()
    return found


def shards_read_otherwise(checkpoint: Checkpoint, runs: Runs, shards: Collection[str]) -> list[str]:
    """Read the tensors that `runs` names from the shards `shards`; returns the shards whose bytes do not have the
    digests in `runs`.

    Raises CheckpointError if a file ends early.
    """
    stored = [item for item in checkpoint.stored.values() if item.shard.name in shards and item.name in runs]
    with ThreadPoolExecutor(max_workers=num_cores()) as pool:
        same = pool.map(
            lambda item: _run_digests(item, runs[item.name], True) == _run_digests(item, runs[item.name], False), stored
        )
        return sorted({item.shard.name for item, is_same in zip(stored, same, strict=True) if not is_same})


def range_digest(path: Path, offset: int, num_bytes: int) -> bytes:
    """SHA-256 of `num_bytes` bytes of a file from `offset` on. Raises CheckpointError if the file ends before that."""
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
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _run_digests(stored: StoredTensor, runs: Sequence[Run], read: bool) -> bytes:
    if runs and not read:
        return b"".join(bytes.fromhex(run.sha256) for run in runs)
    return b"".join(
        range_digest(stored.shard, stored.offset + start, num_bytes) for start, num_bytes in _cuts(stored, runs)
    )


def _cuts(stored: StoredTensor, runs: Sequence[Run]) -> Iterator[tuple[int, int]]:
    """Yield start and length of every run of a tensor. If the lengths of `runs` do not add up to the tensor's bytes,
    the tensor is one run."""
    lengths = [run.bytes for run in runs]
    if sum(lengths) != stored.num_bytes:
        lengths = [stored.num_bytes]
    start = 0
    for length in lengths:
        yield start, length
        start += length
