"""Writes an output folder in parts, with a journal, so that the next run can resume an interrupted one.

While the output NAME is written, there is a folder `.NAME.partial` beside it:

    lock      locked (flock) by the process that writes; the system releases it when the process ends
    journal   one JSON object a line: first the fingerprint (settings and source files), then a record of every
              finished part
    content   the folder that becomes NAME by rename when it is complete

Only this user can read or write them; a link or a file of another user in their place is refused (`own_files.py`).
A line is appended when its part is written. If a process is killed while it writes a line, the next run cuts off the
incomplete line. If the machine crashes before a part is on the disk, the caller finds that by the digests in the part's
record. A run with other settings starts anew. If a source file has changed, the run is refused and the parts are kept.
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from export.errors import CheckpointError, MoeshipError, OutputError, listing
from export.files.output import flush_to_disk, refuse_existing, require_space
from export.files.own_files import open_own, own_folder, remove, require_own_file, require_own_folder, write_all

logger = logging.getLogger(__name__)

MAX_JOURNAL_BYTES = 64 << 20  # far above a journal of some thousand parts of a kilobyte each
_MAX_NAME_BYTES = 255  # longest file name of the usual file systems
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """The state of a source file, by which a change is noticed: size, time of modification in ns, and SHA-256 of a
    shard's header or of all of a small file.

    A program can set the time of modification back, but not `changed_ns`, the time of the last change of content or
    attributes, and another file in its place has another `inode`. A change of `access` (mode, user, group, number of
    links) also changes `changed_ns` and leaves the content as it was.
    """

    bytes: int
    modified_ns: int
    sha256: str
    changed_ns: int = 0
    inode: int = 0
    access: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Everything that decides the bytes of an output: settings (plain JSON values), and source files by path."""

    settings: Mapping[str, Any]
    sources: Mapping[str, SourceFile]


@dataclass(frozen=True, kw_only=True)
class PartialFolder:
    """The partial folder of an output. Write into the folder `content`, and call `append` after each finished part.

    `moved` names source files with the same size, time of modification and SHA-256 as in the earlier run and another
    inode or time of change: only digests of all their bytes can tell whether their content is the same."""

    content: Path
    records: tuple[Mapping[str, Any], ...]  # records of the parts that an earlier run finished
    moved: tuple[str, ...]
    _journal: BinaryIO

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a finished part's record to the journal."""
        self._journal.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._journal.flush()


def partial_path(final: Path) -> Path:
    """The path of the partial folder of `final`: beside it, with a name that depends only on the name of `final`."""
    final = final.resolve()
    name = f".{final.name}.partial"
    if len(os.fsencode(name)) > _MAX_NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(final.name)).hexdigest()
        name = f".{final.name[:40]}-{digest[:16]}.partial"
    return final.parent / name


def refuse_made(final: Path, what: str) -> None:
    """Raise OutputError if `final` exists, as `refuse_existing`. If it does, and the run that made it was killed just
    after the rename, the rest of its partial folder is removed first."""
    if final.exists() and not (partial_path(final) / "content").exists():
        shutil.rmtree(partial_path(final), ignore_errors=True)
    refuse_existing(final, what)


def discard_interrupted(final: Path) -> None:
    """Remove the partial folder of `final` that an interrupted run left. A folder that another process is writing, and
    one that is not this user's, stay."""
    partial = partial_path(final)
    if not partial.exists():
        return
    with suppress(OSError, OutputError), locked_folder(partial, f"discarding {partial}"):
        shutil.rmtree(partial)


@contextmanager
def partial_folder(
    final: Path, what: str, fingerprint: Fingerprint, keep: tuple[str, ...], num_bytes: int
) -> Iterator[PartialFolder]:
    """Yield the partial folder of `final`; its content becomes `final` by rename when the block ends.

    If the block raises, finished parts are kept for the next run, except after a MoeshipError other than OutputError.
    Of the content that an earlier run left, only the files named in `keep` are kept. `num_bytes` is the size of the
    output on disk. Raises OutputError if `final` exists, if another process is writing it, and if the disk is full or
    fails; CheckpointError if a source file changed since the earlier run.
    """
    refuse_made(final, what)
    require_space(final, num_bytes - held_bytes(final), what)
    final, partial = final.resolve(), partial_path(final)
    doing = f"writing {what} to {final}"
    try:
        with locked_folder(partial, doing) as held:
            records, moved = _open_journal(partial, held, final, what, fingerprint, keep)
            path, flags = partial / "journal", os.O_WRONLY | os.O_APPEND
            with open_own("journal", held, flags, path, doing) as opened, os.fdopen(os.dup(opened), "ab") as journal:
                folder = PartialFolder(
                    content=partial / "content",
                    records=tuple(records),
                    moved=moved,
                    _journal=journal,
                )
                try:
                    yield folder
                    refuse_existing(final, what)
                    flush_to_disk(folder.content)
                    folder.content.rename(final)
                except BaseException as error:
                    journal.close()
                    _leave(partial, held, doing, what, error)
                    raise
            flush_to_disk(final.parent, contents=False)
            shutil.rmtree(partial)
    except OSError as error:
        if error.errno is None:
            raise
        raise OutputError(_refusal(error, final, what, num_bytes)) from error


@contextmanager
def locked_folder(partial: Path, doing: str) -> Iterator[int]:
    """Create the partial folder if it is missing, lock it, and yield its descriptor."""
    with ExitStack() as files:
        while True:
            try:
                held = files.enter_context(own_folder(partial, doing))
                lock = files.enter_context(open_own("lock", held, os.O_RDWR | os.O_CREAT, partial / "lock", doing))
                _take(lock, doing)
            except FileNotFoundError:
                if partial.exists():
                    raise
            else:
                if _is_at(lock, partial / "lock"):
                    break
            files.close()  # another process finished and removed the folder before this one got the lock
        os.ftruncate(lock, 0)
        with suppress(OSError):  # the disk may be full; the number only tells others which process holds the lock
            os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield held


def _take(lock: int, doing: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        process = os.pread(lock, 20, 0).decode(errors="replace").strip()
        raise OutputError(
            f"{doing}: process {process if process.isdecimal() else 'unknown'} is writing it; wait until it has "
            "finished, or name another output"
        ) from error


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _open_journal(
    partial: Path, held: int, final: Path, what: str, fingerprint: Fingerprint, keep: tuple[str, ...]
) -> tuple[list[Mapping[str, Any]], tuple[str, ...]]:
    """Open the journal of an earlier run, or begin one; removes all content but the files in `keep`. Returns the
    records of finished parts, and `moved` as PartialFolder describes it."""
    refuse_existing(final, what)
    doing = f"writing {what} to {final}"
    journal, content = partial / "journal", partial / "content"
    lines, num_bytes = _read_journal(journal, held, doing)
    found = lines[0] if lines else None
    expected = json.loads(json.dumps(asdict(fingerprint)))
    if found is not None and found.get("settings") != expected["settings"]:
        logger.warning("starting %s from the beginning: the interrupted run had other settings%s", what,
                       listing(_differences(found.get("settings"), expected["settings"])))  # fmt: skip
        found = None
    if found is None:
        remove(content)
        remove(journal)
        content.mkdir(mode=0o755)
        first = partial / "journal.new"
        remove(first)
        with open_own(first.name, held, os.O_WRONLY | os.O_CREAT | os.O_EXCL, first, doing) as descriptor:
            write_all(descriptor, (json.dumps(expected) + "\n").encode())
        first.replace(journal)
        return [], ()
    before, after = _sources(found), _sources(expected)
    changed = _differences(*({name: _lasting(facts) for name, facts in each.items()} for each in (before, after)))
    if changed:
        raise CheckpointError(
            f"resuming {what} {final}: its source changed since the run was interrupted; put the earlier files back, "
            f"or discard the finished parts (rm -r {shlex.quote(str(partial))}) and build from the "
            f"start:{listing(changed)}"
        )
    with open_own("journal", held, os.O_WRONLY, journal, doing) as descriptor:
        os.ftruncate(descriptor, num_bytes)
    try:
        content.mkdir(mode=0o755)
    except FileExistsError:
        require_own_folder(content, doing)
    for path in content.iterdir():
        if path.name in keep:
            require_own_file(path, doing)
        else:
            remove(path)
    return lines[1:], tuple(name for name in after if before[name] != after[name])


def _sources(line: Mapping[str, Any]) -> Mapping[str, Any]:
    sources = line.get("sources")
    return sources if isinstance(sources, dict) else {}


def _lasting(facts: Any) -> Any:  # noqa: ANN401 - JSON value
    """The fields of a source file's state that a copy with the same time of modification has too."""
    return {key: facts.get(key) for key in ("bytes", "modified_ns", "sha256")} if isinstance(facts, dict) else facts


def _read_journal(journal: Path, held: int, doing: str) -> tuple[list[Mapping[str, Any]], int]:
    """Read the journal's objects up to the first line that is not a complete one; returns them and the bytes that they
    take. Without a journal there are none. Bytes beyond MAX_JOURNAL_BYTES are ignored."""
    try:
        with open_own("journal", held, os.O_RDONLY, journal, doing) as opened, os.fdopen(os.dup(opened), "rb") as file:
            return _whole_lines(file.read(MAX_JOURNAL_BYTES))
    except FileNotFoundError:
        return [], 0


def _whole_lines(data: bytes) -> tuple[list[Mapping[str, Any]], int]:
    lines: list[Mapping[str, Any]] = []
    num_bytes = 0
    for line in data.splitlines(keepends=True):
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            break
        lines.append(value)
        num_bytes += len(line)
    return lines, num_bytes


def _differences(found: Any, expected: Mapping[str, Any]) -> list[str]:  # noqa: ANN401 - JSON value
    """One line for each key whose value differs."""
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


def _leave(partial: Path, held: int, doing: str, what: str, error: BaseException) -> None:
    """After an error, tell the user how to resume, or remove the partial folder. It is removed if no part is finished,
    and after an error that the user must mend in the source, since the parts were made from the old source."""
    lines, _ = _read_journal(partial / "journal", held, doing)
    if len(lines) < 2 or (isinstance(error, MoeshipError) and not isinstance(error, OutputError)):
        shutil.rmtree(partial, ignore_errors=True)
        return
    logger.warning(
        "%s is not finished; %d parts are kept: the same command resumes, rm -r %s discards them",
        what, len(lines) - 1, shlex.quote(str(partial)),
    )  # fmt: skip


def held_bytes(final: Path) -> int:
    """Bytes on disk that an interrupted run of `final` takes. The next run overwrites or frees them, so they count as
    free."""
    return sum(512 * path.lstat().st_blocks for path in (partial_path(final) / "content").glob("*"))


def _refusal(error: OSError, final: Path, what: str, num_bytes: int) -> str:
    reason = f"writing {what} to {final}: {error.strerror} ({error.filename or partial_path(final)})"
    if error.errno not in _FULL:
        return reason
    missing, free = num_bytes - held_bytes(final), shutil.disk_usage(final.parent).free
    return f"{reason}; it takes {missing / 1e9:.2f} GB more, {final.parent} has {free / 1e9:.2f} GB free: make room"
