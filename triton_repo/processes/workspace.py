"""The private folder of a server, in the temporary folder; removes what servers left whose `moeship serve` was killed.

    with private_workspace(mark) as workspace:
        (workspace / "backends").mkdir()

Each folder has a file `owner`. The process that made the folder keeps that file locked (flock(2)) until it ends; the
kernel releases the lock however the process dies. If the lock is free, the folder is abandoned. Whoever makes the next
folder kills the processes that are left of that server, and removes its shared memory and its folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from triton_repo.errors import ServerError
from triton_repo.processes.program import clear_memory, kill_left, start_time

logger = logging.getLogger(__name__)

_PREFIX = "moeship-serve-"
_OWNER_FILE = "owner"
# Triton's Python backend starts its processes through a shell without quoting (python_backend, src/stub_launcher.cc),
# and their Python decodes paths as ASCII where the locale is C.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./+,:@%=-]+")
_FALLBACKS = (Path("/tmp"), Path("/var/tmp"))


def is_plain(path: Path) -> bool:
    """Whether Triton's Python backend can use this path: only ASCII letters, digits and `_./+,:@%=-`."""
    return _PLAIN_PATH.fullmatch(str(path)) is not None


@contextlib.contextmanager
def private_workspace(mark: str) -> Iterator[Path]:
    """Make a folder with a plain path that no other user can enter. Remove it when the block ends.

    `mark` is the mark of this server's processes and shared memory. Raises ServerError if no folder can be made.
    """
    parent = _parent()
    _remove_abandoned(parent)
    try:
        workspace = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise ServerError(
            f"making a folder in {parent}: {error.strerror}; name another folder in TMPDIR, or make room"
        ) from error
    try:
        with _owned(workspace, mark):
            yield workspace
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _parent() -> Path:
    """The temporary folder if its path is plain, else a standard one."""
    asked = Path(tempfile.gettempdir()).resolve()
    for folder in (asked, *_FALLBACKS):
        if is_plain(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise ServerError(
        f"making a folder in {asked}: Triton's Python backend cannot take that path, only ASCII letters, digits and "
        "_./+,:@%=-; name another folder in TMPDIR"
    )


@contextlib.contextmanager
def _owned(workspace: Path, mark: str) -> Iterator[None]:
    """Hold the folder's lock. The file gets its name only after it is locked, so that nobody finds it unlocked."""
    partial = workspace / f".{_OWNER_FILE}"
    with partial.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump({"pid": os.getpid(), "start_time": start_time(os.getpid()), "mark": mark}, file)
        file.flush()
        partial.replace(workspace / _OWNER_FILE)
        yield


def _remove_abandoned(parent: Path) -> None:
    """Remove this user's abandoned folders, and the processes and shared memory of their servers."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it was removed meanwhile, or belongs to another user
            if not folder.is_symlink() and folder.stat().st_uid == os.getuid():
                _remove_if_abandoned(folder)


def _remove_if_abandoned(folder: Path) -> None:
    with (folder / _OWNER_FILE).open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        try:
            owner = json.load(file)
            pid, started, mark = int(owner["pid"]), owner["start_time"], str(owner["mark"])
        except (ValueError, LookupError, TypeError):
            return  # moeship did not write this file
    if start_time(pid) == started:  # the owner lives, on a file system without locks
        return
    if not re.fullmatch(r"moeship_[0-9a-f]{16}_", mark):
        return
    logger.debug("removing %s, whose server's parent %d was killed", folder, pid)
    kill_left(None, mark)
    clear_memory(mark)
    shutil.rmtree(folder, ignore_errors=True)
