"""Opens our own folders and files in places where other users may write, and refuses what others have put there.

Another user can guess the name of such a file and create it first: as a symbolic or hard link to another of our files,
as a pipe, or as a folder of their own. The functions here never follow a link, wait for a pipe, or write to a file that
has a second name (a hard link).
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
    """Open our folder `path` and yield its descriptor; a missing folder is created, for this user only.

    Raises OutputError, whose message begins with `doing`, for a link, for anything else that is not a folder, and for a
    folder that belongs to another user or that others may write to. Raises OSError if the system refuses.
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
    """Raise OutputError for the folders that `own_folder` refuses. The mode of a folder that was just `made` is not
    checked, since some file systems set their own."""
    facts = path.lstat()
    if not stat.S_ISDIR(facts.st_mode):
        raise OutputError(f"{doing}: {path} is {_kind(facts)}, expected a folder of an earlier run; remove it")
    if facts.st_uid != os.geteuid():
        raise OutputError(
            f"{doing}: the folder {path} belongs to {_user(facts.st_uid)}, expected {_user(os.geteuid())}, the user "
            "who runs moeship; have it removed, or name another output"
        )
    if facts.st_mode & _OTHERS_WRITE and not made:
        raise OutputError(
            f"{doing}: the folder {path} can be written to by others (mode {stat.S_IMODE(facts.st_mode):o}), who could "
            f"change what is made there; remove it, or name another output"
        )


@contextmanager
def open_own(name: str, folder: int, flags: int, path: Path, doing: str) -> Iterator[int]:
    """Open the file `name` in the folder with the descriptor `folder` and yield its descriptor. `path` is the file's
    name in messages.

    Raises OutputError for a link, for anything else that is not a regular file, and for a file that belongs to another
    user or has a second name. Raises OSError if the system refuses.
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
    """Raise OutputError if a file is a link or not regular, belongs to another user, or has a second name."""
    facts = path.lstat()
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1 or facts.st_uid != os.geteuid():
        raise _irregular(facts, path, doing)


@contextmanager
def open_log(path: Path, doing: str, error: type[MoeshipError]) -> Iterator[int]:
    """Open a log for appending and yield its descriptor; a missing log is created. Raises `error` for a link, for
    anything else that is not a regular file, and if the system refuses."""
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
    """Write all of `data` to a descriptor; a single os.write may write less."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_all_at(descriptor: int, data: bytes, position: int) -> None:
    """Write all of `data` to a file from byte `position` on; a single os.pwrite may write less."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def remove(path: Path) -> None:
    """Remove a file, a folder with its contents, or a link without its target. Does nothing if the path does not
    exist."""
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
