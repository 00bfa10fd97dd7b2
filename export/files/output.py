"""Writes outputs so that they appear complete under their final name, or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.errors import OutputError
from export.files.reading import check_name

_LEFT_S = 60.0  # a folder that is younger may be about to be locked


def refuse_existing(final: Path, what: str) -> None:
    """Raise OutputError if `final` exists, if its name is not UTF-8, or if its parent folder does not exist."""
    check_name(final.resolve(), f"writing {what}", OutputError)
    if final.exists() or final.is_symlink():
        raise OutputError(f"writing {what}: {final} exists already; name another output or remove it first")
    parent = final.resolve().parent
    if not parent.is_dir():
        raise OutputError(f"writing {what}: the folder {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"writing {what}: no permission to write in {parent}; name another output")


@contextmanager
def staged_directory(final: Path, what: str) -> Iterator[Path]:
    """Yield an empty folder beside `final`. It is renamed to `final` when the block ends, and removed if the block
    raises. A process that is killed leaves it; the next one with the same `final` removes it.

    Raises OutputError if `final` exists, at the start or before the rename, and for errors of the disk.
    """
    refuse_existing(final, what)
    final = final.resolve()
    # The start of the name is enough to recognise the folder; all of it could be too long for the file system.
    prefix = f".{final.name[:64]}.partial-"
    _remove_left(final.parent, prefix)
    try:
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
    except OSError as error:
        raise OutputError(f"writing {what} to {final}: {error.strerror} ({error.filename})") from error
    try:
        staging.chmod(0o755)
        try:
            with _locked(staging):
                yield staging
                refuse_existing(final, what)
                flush_to_disk(staging)
                staging.rename(final)
        except OSError as error:
            if error.errno is None:
                raise
            raise OutputError(f"writing {what} to {final}: {error.strerror} ({error.filename or staging})") from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _remove_left(parent: Path, prefix: str) -> None:
    """Remove the folders of processes that were killed: those that no process has locked."""
    for folder in parent.iterdir():
        if not folder.name.startswith(prefix) or folder.is_symlink():
            continue
        with contextlib.suppress(OSError):  # locked, gone, or of another user
            if time.time() - folder.stat().st_mtime > _LEFT_S:
                with _locked(folder):
                    shutil.rmtree(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process. Raises OSError if another process has locked it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def flush_to_disk(folder: Path, contents: bool = True) -> None:
    """fsync a folder and, with `contents`, every file and folder in it, so that the data is on disk before a rename."""
    for path in [*(folder.rglob("*") if contents else ()), folder]:
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def forget_pages(path: Path) -> None:
    """Drop a flushed file from the page cache, if the system supports that. A process that maps the file later can then
    choose into which kind of pages it is read."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def require_space(final: Path, num_bytes: int, what: str) -> None:
    """Raise OutputError if the file system of `final` has less than `num_bytes` free."""
    parent = final.resolve().parent
    free = shutil.disk_usage(parent).free
    if num_bytes > free:
        raise OutputError(
            f"writing {what}: it takes {num_bytes / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB free; "
            "make room or name another output"
        )


def replace_file(path: Path, text: str) -> None:
    """Replace the file `path` by one that holds `text`, by rename: a reader sees the old or the new text, never a
    part."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
