"""The files of an engine's folder: their records for engine.json, and how a file differs from its record."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.checkpoint.file_table import TEMPLATE_FOLDER
from export.checkpoint.folder import file_digest
from export.errors import named, shown
from trt_build.manifest import MANIFEST_FILE, check_digest


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and SHA-256 in hexadecimal of one file of the engine. `sha256` is None for a file whose digests are
    in another file of the engine."""

    bytes: int
    sha256: str | None


def record_files(folder: Path, undigested: Collection[str] = ()) -> dict[str, FileRecord]:
    """The record of every file of an engine's folder except the manifest, by its path inside the folder. Files in
    `undigested` get no digest."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: FileRecord(bytes=path.stat().st_size, sha256=None if name in undigested else file_digest(path))
        for name, path in paths.items()
        if name != MANIFEST_FILE
    }


def check_file_records(
    files: Mapping[str, FileRecord], needed: Sequence[str], undigested: Collection[str] = ()
) -> None:
    """Check the names, sizes and digests in the records of an engine's files; files in `undigested` have no digest.

    Raises ValueError, also for a name outside the engine's folder, which must never be opened.
    """
    outside = [name for name in files if not _is_inside(name) or name == MANIFEST_FILE]
    absent = [name for name in needed if name not in files]
    if outside or absent:
        raise ValueError(f"files outside the folder: {shown(outside)}, files not listed: {shown(absent)}")
    for name, record in files.items():
        if record.bytes < 0:
            raise ValueError(f"files.{named(name, 80)}: it has {record.bytes} bytes")
        if (record.sha256 is None) is not (name in undigested):
            raise ValueError(
                f"files.{named(name, 80)}: a digest is {'not expected' if name in undigested else 'missing'}"
            )
        if record.sha256 is not None:
            check_digest(f"files.{named(name, 80)}.sha256", record.sha256)


def _is_inside(name: str) -> bool:
    """Whether a name is a file directly in the engine's folder or in its folder of chat templates."""
    folder, _, file = name.rpartition("/")
    return folder in ("", TEMPLATE_FOLDER) and file not in ("", ".", "..") and "\0" not in file


def differing_files(folder: Path, files: Mapping[str, FileRecord], check_digests: bool) -> dict[str, str]:
    """How the files of a folder differ from their records, by name; empty if all agree."""
    found = {name: file_problem(folder / name, record, check_digests) for name, record in files.items()}
    return {name: problem for name, problem in found.items() if problem}


def file_problem(path: Path, record: FileRecord, check_digest: bool) -> str | None:
    """How a file differs from its record; None if it agrees."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != record.bytes:
        return f"found {size} bytes, expected {record.bytes}"
    if check_digest and record.sha256 is not None:
        digest = file_digest(path)
        if digest != record.sha256:
            return f"found SHA-256 {digest[:12]}…, expected {record.sha256[:12]}…"
    return None
