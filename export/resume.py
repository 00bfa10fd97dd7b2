"""A folder made in parts that outlives the process: an interrupted run is taken up by the next one.

Beside the output NAME lies `.NAME.partial` while it is made:

    lock      held (flock) by the process that writes, and released by its death
    journal   one JSON object a line: first what the parts are made from, then a record of every finished part
    content   the folder that becomes NAME by rename when it is whole
    scratch   working files of one run

A line is appended when its part is written. What a kill tears off the journal's end is cut off; what a crash of the
machine leaves unwritten of a part is found by whoever checks the record's digests. Runs that would make other bytes
start anew; a source that changed meanwhile is refused, and the parts are kept.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from export.errors import CheckpointError, MoeshipError, OutputError, listing
from export.output import flush_to_disk, refuse_existing, require_space

logger = logging.getLogger(__name__)

_MAX_NAME_BYTES = 255  # of one name, on the usual file systems
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """What tells one state of a source file from another: bytes, time of change in ns, SHA-256 of what is cheap to
    read of it (a shard's header, all of a small file)."""

    bytes: int
    modified_ns: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Everything that decides the bytes: settings (plain JSON values), and source files by path."""

    settings: Mapping[str, Any]
    sources: Mapping[str, SourceFile]


@dataclass(frozen=True, kw_only=True)
class PartialFolder:
    """The folder under construction: write into `content`, tell each finished part to `append`."""

    content: Path
    scratch: Path
    records: tuple[Mapping[str, Any], ...]  # of the parts that an earlier run finished
    _journal: BinaryIO

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a finished part's record to the journal."""
        self._journal.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._journal.flush()


def partial_path(final: Path) -> Path:
    """Where `final` is made: beside it, under a name that depends on its name alone."""
    final = final.resolve()
    name = f".{final.name}.partial"
    if len(os.fsencode(name)) > _MAX_NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(final.name)).hexdigest()
        name = f".{final.name[:40]}-{digest[:16]}.partial"
    return final.parent / name


def refuse_made(final: Path, what: str) -> None:
    """As `refuse_existing`; removes what a kill just after the rename left beside `final`."""
    if final.exists() and not (partial_path(final) / "content").exists():
        shutil.rmtree(partial_path(final), ignore_errors=True)
    refuse_existing(final, what)


@contextmanager
def partial_folder(
    final: Path, what: str, fingerprint: Fingerprint, keep: tuple[str, ...], num_bytes: int
) -> Iterator[PartialFolder]:
    """Yield the folder that becomes `final` when the block ends well; when not, finished parts stay for the next run,
    unless it was refused (any MoeshipError but OutputError).

    Of the content that an earlier run left only the files named in `keep` are there. `num_bytes` is what making it
    takes on the disk. Raises OutputError when `final` exists, when another process is making it, and when the disk
    lacks room or refuses; CheckpointError when a source changed.
    """
    refuse_made(final, what)
    require_space(final, num_bytes - held_bytes(final), what)
    final, partial = final.resolve(), partial_path(final)
    try:
        with _locked(partial, final, what):
            records = _open_journal(partial, final, what, fingerprint, keep)
            with (partial / "journal").open("ab") as journal:
                folder = PartialFolder(
                    content=partial / "content", scratch=partial / "scratch", records=tuple(records), _journal=journal
                )
                try:
                    yield folder
                    refuse_existing(final, what)
                    flush_to_disk(folder.content)
                    folder.content.rename(final)
                except BaseException as error:
                    journal.close()
                    _leave(partial, what, error)
                    raise
            flush_to_disk(final.parent, contents=False)
            shutil.rmtree(partial)
    except OSError as error:
        if error.errno is None:
            raise
        raise OutputError(_refusal(error, final, what, num_bytes)) from error


@contextmanager
def _locked(partial: Path, final: Path, what: str) -> Iterator[None]:
    """Hold the lock of the folder, made if need be."""
    while True:
        partial.mkdir(exist_ok=True)
        with (partial / "lock").open("a+b") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                raise OutputError(
                    f"writing {what} to {final}: process {lock.read().decode(errors='replace').strip() or 'unknown'} "
                    "is writing it; wait until it has finished, or name another output"
                ) from error
            if not _is_at(lock, partial / "lock"):
                continue  # another process finished and removed the folder before the lock was ours
            lock.truncate(0)
            lock.write(str(os.getpid()).encode())
            lock.flush()
            yield
            return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _open_journal(
    partial: Path, final: Path, what: str, fingerprint: Fingerprint, keep: tuple[str, ...]
) -> list[Mapping[str, Any]]:
    """The records of an earlier run's finished parts; the content is emptied of all but what is kept."""
    refuse_existing(final, what)
    journal, content = partial / "journal", partial / "content"
    shutil.rmtree(partial / "scratch", ignore_errors=True)
    (partial / "scratch").mkdir()
    lines, num_bytes = _whole_lines(journal)
    found = lines[0] if lines else None
    expected = json.loads(json.dumps(asdict(fingerprint)))
    if found is not None and found.get("settings") != expected["settings"]:
        logger.warning("starting %s anew: the interrupted run had other settings%s", what,
                       listing(_differences(found.get("settings"), expected["settings"])))  # fmt: skip
        found = None
    if found is None:
        shutil.rmtree(content, ignore_errors=True)
        journal.unlink(missing_ok=True)
        content.mkdir()
        first = partial / "journal.new"
        first.write_text(json.dumps(expected) + "\n", encoding="utf-8")
        first.replace(journal)
        return []
    changed = _differences(found.get("sources"), expected["sources"])
    if changed:
        raise CheckpointError(
            f"resuming {what} {final}: its source changed since the run was interrupted; put back what was there, or "
            f"discard the finished parts (rm -r {shlex.quote(str(partial))}) and build anew:{listing(changed)}"
        )
    with journal.open("r+b") as file:
        file.truncate(num_bytes)
    content.mkdir(exist_ok=True)
    for path in content.iterdir():
        if path.name not in keep:
            path.unlink()
    return lines[1:]


def _whole_lines(journal: Path) -> tuple[list[Mapping[str, Any]], int]:
    """The journal's objects up to the first line that is not one, and the bytes that they take."""
    lines: list[Mapping[str, Any]] = []
    num_bytes = 0
    for line in journal.read_bytes().splitlines(keepends=True) if journal.is_file() else ():
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            break
        lines.append(value)
        num_bytes += len(line)
    return lines, num_bytes


def _differences(found: Any, expected: Mapping[str, Any]) -> list[str]:  # noqa: ANN401 - JSON value
    """What differs, key by key."""
    before = found if isinstance(found, dict) else {}
    return [
        f"{key}: found {_short(expected.get(key))}, it was {_short(before.get(key))}"
        for key in sorted({*before, *expected})
        if before.get(key) != expected.get(key)
    ]


def _short(value: Any) -> str:  # noqa: ANN401 - JSON value
    if isinstance(value, dict):
        return ", ".join(
            f"{key} {item:.12}" if isinstance(item, str) else f"{key} {item}" for key, item in value.items()
        )
    return "absent" if value is None else f"{value}"[:80]


def _leave(partial: Path, what: str, error: BaseException) -> None:
    """Say how to go on. Nothing is kept without a finished part, or where the source must change: what was made of the
    old one is of no use then."""
    lines, _ = _whole_lines(partial / "journal")
    if len(lines) < 2 or (isinstance(error, MoeshipError) and not isinstance(error, OutputError)):
        shutil.rmtree(partial, ignore_errors=True)
        return
    logger.warning(
        "%s is not finished; %d parts are kept: the same command resumes, rm -r %s discards them",
        what, len(lines) - 1, shlex.quote(str(partial)),
    )  # fmt: skip


def held_bytes(final: Path) -> int:
    """Bytes on disk of what an interrupted run left: the next run writes over them, or frees them."""
    return sum(512 * path.stat().st_blocks for path in (partial_path(final) / "content").glob("*"))


def _refusal(error: OSError, final: Path, what: str, num_bytes: int) -> str:
    reason = f"writing {what} to {final}: {error.strerror} ({error.filename or partial_path(final)})"
    if error.errno not in _FULL:
        return reason
    missing, free = num_bytes - held_bytes(final), shutil.disk_usage(final.parent).free
    return f"{reason}; it takes {missing / 1e9:.2f} GB more, {final.parent} has {free / 1e9:.2f} GB free: make room"
