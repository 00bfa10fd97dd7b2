"""Folders and files that are kept beside an output, where others may be able to write: what they put there is refused.

A name that is known beforehand can be taken beforehand: by a symbolic or hard link to a file of ours, by a pipe, by
a folder of another user. Nothing here follows a link, waits for a pipe, or writes to a file that has a second name.
"""

from __future__ import annotations

import os
import pwd
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.errors import MoeshipError, OutputError

_NOT_FOLLOWED = os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@contextmanager
def own_folder(path: Path, doing: str) -> Iterator[int]:
    """A descriptor of the folder, made for this user alone where there is none.

    Raises OutputError, which begins with what was being done, for a link, for anything that is no folder, and for a
    folder that belongs to another user or that others may write to; OSError as the system does.
    """
    made = True
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        made = False
    require_own_folder(path, doing, made=made)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _NOT_FOLLOWED)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def require_own_folder(path: Path, doing: str, *, made: bool = False) -> None:
    """Raise as `own_folder` does. Where the folder was just `made`, its mode is the file system's own matter."""
    facts = path.lstat()
    if not stat.S_ISDIR(facts.st_mode):
        raise OutputError(f"{doing}: {path} is {_kind(facts)}, expected a folder of an earlier run; remove it")
    if facts.st_uid != os.geteuid():
        raise OutputError(
            f"{doing}: the folder {path} belongs to {_user(facts.st_uid)}, expected {_user(os.geteuid())}, who writes "
            "here; have it removed, or name another output"
        )
    if facts.st_mode & _OTHERS_WRITE and not made:
        raise OutputError(
            f"{doing}: the folder {path} can be written to by others (mode {stat.S_IMODE(facts.st_mode):o}), who could "
            f"change what is made there; remove it, or name another output"
        )


@contextmanager
def open_own(name: str, folder: int, flags: int, path: Path, doing: str) -> Iterator[int]:
    """A descriptor of the file of that name in a folder, for reading or writing; `path` is what messages call it.

    Raises OutputError for a link, for anything that is no regular file, and for a file of another user or with a
    second name; OSError as the system does.
    """
    try:
        descriptor = os.open(name, flags | _NOT_FOLLOWED | os.O_NONBLOCK, 0o600, dir_fd=folder)
    except OSError:
        facts = _lstat(name, folder)
        if facts is None or stat.S_ISREG(facts.st_mode):
            raise
        raise _irregular(facts, path, doing) from None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1 or facts.st_uid != os.geteuid():
            raise _irregular(facts, path, doing)
        yield descriptor
    finally:
        os.close(descriptor)


def require_own_file(path: Path, doing: str) -> None:
    """Raise OutputError where a file is a link, no regular file, another user's, or one with a second name."""
    facts = path.lstat()
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1 or facts.st_uid != os.geteuid():
        raise _irregular(facts, path, doing)


@contextmanager
def open_log(path: Path, doing: str, error: type[MoeshipError]) -> Iterator[int]:
    """A descriptor for appending to a log, made where there is none. Raises `error` for a link, for anything that is no
    regular file, and where the system refuses."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NOT_FOLLOWED | os.O_NONBLOCK, 0o644)
    except OSError as reason:
        facts = _lstat(os.fspath(path), None)
        found = reason.strerror if facts is None or stat.S_ISREG(facts.st_mode) else f"it is {_kind(facts)}"
        raise error(f"{doing} {path}: {found}; name another file") from reason
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise error(f"{doing} {path}: it is {_kind(facts)}, expected a regular file; name another file")
        yield descriptor
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of the bytes."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_all_at(descriptor: int, data: bytes, position: int) -> None:
    """Write all of the bytes from a position of the file on."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def remove(path: Path) -> None:
    """Remove a file, a folder with all in it, or a link and not what it points to; nothing where nothing is."""
    facts = _lstat(os.fspath(path), None)
    if facts is None:
        return
    if stat.S_ISDIR(facts.st_mode):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lstat(name: str, folder: int | None) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return None


def _irregular(facts: os.stat_result, path: Path, doing: str) -> OutputError:
    return OutputError(f"{doing}: {path} is {_kind(facts)}, expected a file that an earlier run wrote; remove it")


def _kind(facts: os.stat_result) -> str:
    mode = facts.st_mode
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
    if not stat.S_ISREG(mode):
        return kinds.get(stat.S_IFMT(mode), "a device")
    if facts.st_uid != os.geteuid():
        return f"a file of {_user(facts.st_uid)}"
    return "a file with a second name (a hard link)" if facts.st_nlink != 1 else "a file"


def _user(number: int) -> str:
    try:
        return f"the user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"the user with the number {number}"
