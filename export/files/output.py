"""Outputs that appear whole under their final name or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.errors import OutputError
from export.files.reading import check_name


def refuse_existing(final: Path, what: str) -> None:
    """Raise OutputError where `final` exists, its name is no UTF-8 or its parent cannot hold it."""
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
    """Yield an empty sibling folder that becomes `final` by rename when the block ends well, and is removed when not.

    Raises OutputError when `final` exists, at the start and again before the rename, and when the disk refuses.
    """
    refuse_existing(final, what)
    final = final.resolve()
    try:
        # A part of the name is enough to be recognised; the whole could exceed what a file system takes.
        staging = Path(tempfile.mkdtemp(prefix=f".{final.name[:64]}.partial-", dir=final.parent))
    except OSError as error:
        raise OutputError(f"writing {what} to {final}: {error.strerror} ({error.filename})") from error
    try:
        staging.chmod(0o755)
        try:
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


def flush_to_disk(folder: Path, contents: bool = True) -> None:
    """fsync a folder and, with `contents`, every file and folder in it, so that a rename never outruns the data."""
    for path in [*(folder.rglob("*") if contents else ()), folder]:
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def forget_pages(path: Path) -> None:
    """Let go of a file that is on the disk from the page cache, where the system lets us: whoever maps it next chooses
    the pages that it is read into."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def require_space(final: Path, num_bytes: int, what: str) -> None:
    """Raise OutputError where the file system of `final` has less than `num_bytes` free."""
    parent = final.resolve().parent
    free = shutil.disk_usage(parent).free
    if num_bytes > free:
        raise OutputError(
            f"writing {what}: it takes {num_bytes / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB free; "
            "make room or name another output"
        )


def replace_file(path: Path, text: str) -> None:
    """Write `text` under `path` by rename, so that a reader sees the old or the new text, never a part."""
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
