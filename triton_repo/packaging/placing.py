"""Links or copies an engine's files into a model repository, and checks their digests.

A copy is hashed while it is written, so that exactly the written bytes are checked. A link shares its bytes with the
engine directory: its state is read before and after it is hashed, and a file that changed in between is refused. The
state for the seal is read from the same open file, so that nobody can exchange the file between the check and the seal.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from export.checkpoint.digests import num_cores
from export.conversion.parts import Region
from export.errors import listing
from export.files.own_files import write_all_at
from export.files.reading import open_regular
from triton_repo.contracts.seal import FileState
from triton_repo.packaging.engine_facts import EngineFacts, read_engine_facts
from trt_build.errors import EngineError
from trt_build.manifest import MANIFEST_FILE

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What `place_files` did."""

    copied_bytes: int
    states: Mapping[str, FileState]  # file name to the state in which the file was checked


def place_files(facts: EngineFacts, names: Sequence[str], target: Path, *, copy: bool) -> Placed:
    """Put files of an engine into the new folder `target`: hard links, or copies if `copy` or if links are refused.
    Raises EngineError for a file that is not as it was built, or that changes meanwhile, and OSError."""
    target.mkdir()
    doing = f"opening the engine {facts.folder}"
    states: dict[str, FileState] = {}
    problems: list[str] = []
    copied = 0
    # Files whose digests are in another file come last, since the other file must be checked first.
    for name in sorted(names, key=lambda name: name in facts.read_regions):
        read_regions = None if problems else facts.read_regions.get(name)
        regions = _whole(facts, name) if read_regions is None else read_regions(target)
        (target / name).parent.mkdir(exist_ok=True)
        copied_bytes, states[name], found = _place(facts.folder / name, target / name, regions, copy=copy)
        copied += copied_bytes
        problems += [f"{name}: {problem}" for problem in found]
    if problems:
        raise EngineError(f"{doing}: its files are not those of the build; build it again:{listing(problems)}")
    if MANIFEST_FILE in names and read_engine_facts(target, check_digests=False).records != facts.records:
        raise EngineError(f"{doing}: its {MANIFEST_FILE} changed while it was packaged; package it again")
    return Placed(copied_bytes=copied, states=states)


def _whole(facts: EngineFacts, name: str) -> list[Region]:
    """The whole file as one region without a name. None for engine.json, which holds its own digest."""
    record = facts.records.get(name)
    if record is None or record.sha256 is None:
        return []
    return [Region(name="", offset=0, bytes=record.bytes, sha256=record.sha256)]


def _place(source: Path, target: Path, regions: Sequence[Region], *, copy: bool) -> tuple[int, FileState, list[str]]:
    """Returns the bytes that were copied, the state of the file, and what is wrong with it."""
    if not copy:
        with contextlib.suppress(OSError):
            os.link(source.resolve(), target)
            return 0, *_check_link(target, regions)
    return _copy(source, target, regions)


def _check_link(target: Path, regions: Sequence[Region]) -> tuple[FileState, list[str]]:
    with open_regular(target, f"reading {target}", EngineError) as file:
        before = os.fstat(file.fileno())
        problems = _check(file.fileno(), None, regions)
        after = os.fstat(file.fileno())
        if _may_have_changed(before, after):
            problems.append("it changed while it was checked; package the engine when nothing writes to it")
        return FileState.of(after), problems


def _may_have_changed(before: os.stat_result, after: os.stat_result) -> bool:
    """Whether the content may have changed between two readings. A new time of change does not count if mode, owner or
    number of links changed too: then another process has linked the file."""
    if FileState.of(before) != FileState.of(after):
        return True
    access = [(facts.st_mode, facts.st_uid, facts.st_gid, facts.st_nlink) for facts in (before, after)]
    return before.st_ctime_ns != after.st_ctime_ns and access[0] == access[1]


def _copy(source: Path, target: Path, regions: Sequence[Region]) -> tuple[int, FileState, list[str]]:
    made = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with open_regular(source, f"reading {source}", EngineError) as file:
            size = os.fstat(file.fileno()).st_size
            whole = [Region(name="", offset=0, bytes=size, sha256="")]
            problems = _check(file.fileno(), made, regions or whole)
        facts = os.fstat(made)
        return facts.st_size, FileState.of(facts), problems if regions else []
    finally:
        os.close(made)


def _check(descriptor: int, copy: int | None, regions: Sequence[Region]) -> list[str]:
    """What is wrong with the regions of a file. Writes the regions to `copy` too, if given. Uses all cores."""

    def problem(region: Region) -> str | None:
        sha, position, end = hashlib.sha256(), region.offset, region.offset + region.bytes
        while position < end:
            piece = os.pread(descriptor, min(end - position, _PIECE_BYTES), position)
            if not piece:
                return f"it ends at byte {position}, expected {end}"
            sha.update(piece)
            if copy is not None:
                write_all_at(copy, piece, position)
            position += len(piece)
        if sha.hexdigest() == region.sha256:
            return None
        place = f"{region.name} (bytes {region.offset} to {end}): " if region.name else ""
        return f"{place}found SHA-256 {sha.hexdigest()[:12]}…, expected {region.sha256[:12]}…"

    with ThreadPoolExecutor(max_workers=num_cores()) as pool:
        return [found for found in pool.map(problem, regions) if found]
