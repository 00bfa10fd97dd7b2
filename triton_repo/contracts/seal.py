"""The seal of a packaged engine: the state of its files when their digests were checked.

A start that finds every file in that state need not hash the files again. The seal is a JSON file beside the engine's
folder. It holds three numbers for each file: bytes, time of the last write in nanoseconds, and inode. Writing to a file
in the usual way, or moving it to another file system, changes one of the three.

Changes that the seal does not detect, so that a start does not detect them either:
- a write to the same file after which size and time are set back (`touch -d`, `cp --preserve` over it);
- a write within the same tick of the kernel's clock (some milliseconds) as the write before;
- a disk that returns other bytes than were written.
The seal makes a start quick. It does not protect from anyone who may write to the repository. If the seal's file is
removed, every start checks every digest.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from export.errors import ConfigError
from export.files.reading import read_json
from trt_build.manifest import MANIFEST_FILE


class FileState(NamedTuple):
    """The state of one file: bytes, time of the last write in ns, inode."""

    num_bytes: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, facts: os.stat_result) -> FileState:
        """The state in the facts that stat(2) gives of a file."""
        return cls(facts.st_size, facts.st_mtime_ns, facts.st_ino)


def write_seal(engine: Path, states: Mapping[str, FileState]) -> None:
    """Write the states, by file name, in which an engine's files were checked. Raises OSError if there is a seal."""
    descriptor = os.open(_seal_path(engine), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(dict(sorted(states.items())), indent=2) + "\n")


def is_sealed(engine: Path) -> bool:
    """Whether the engine has the same files as when the seal was written, each in the same state."""
    try:
        noted = read_json(_seal_path(engine), "the engine's seal")
        found = _states(engine)
    except (ConfigError, OSError):
        return False
    whole = all(isinstance(state, list) and [type(number) for number in state] == [int] * 3 for state in noted.values())
    return whole and MANIFEST_FILE in noted and {name: FileState(*state) for name, state in noted.items()} == found


def _seal_path(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.seal.json")


def _states(engine: Path) -> dict[str, FileState]:
    """The state of everything in the engine's folder except folders. A link gets a state that no seal holds."""
    states = {}
    for path in engine.rglob("*"):
        facts = path.lstat()
        if not stat.S_ISDIR(facts.st_mode):
            regular = stat.S_ISREG(facts.st_mode)
            states[path.relative_to(engine).as_posix()] = FileState.of(facts) if regular else FileState(-1, -1, -1)
    return states
