"""What a packaged engine's files looked like when their digests were checked, so that a start need not hash them again.

Beside the engine's folder lies a file of one line for each of its files: bytes, time of the last write in nanoseconds
and inode. Who writes to a file in the usual way, or brings it to another place, changes one of them.

What the seal does not see, and a start with it does not either:
- a write that puts size and time back as they were, in the same file (`touch -d`, `cp --preserve` over it);
- a write within the same tick of the kernel's clock, some milliseconds, as the one before it;
- bytes that a disk gives back otherwise than it was given them.
It is a way to start quickly and no protection from whoever may write to the repository. Without the seal's file every
start checks every digest.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from export.errors import ConfigError
from export.reading import read_json
from trt_build.manifest import MANIFEST_FILE


class FileState(NamedTuple):
    """Bytes, time of the last write in ns, inode."""

    num_bytes: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, facts: os.stat_result) -> FileState:
        """The state that a file has."""
        return cls(facts.st_size, facts.st_mtime_ns, facts.st_ino)


def write_seal(engine: Path, states: Mapping[str, FileState]) -> None:
    """Note the states in which the engine's files, by name, were checked. Raises OSError where a seal is there."""
    descriptor = os.open(_seal_path(engine), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(dict(sorted(states.items())), indent=2) + "\n")


def is_sealed(engine: Path) -> bool:
    """Whether the engine's files, each of them and no other, are as they were when the seal was written."""
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
    """Of everything in the engine's folder but folders. A link is no file of an engine and has no state that fits."""
    states = {}
    for path in engine.rglob("*"):
        facts = path.lstat()
        if not stat.S_ISDIR(facts.st_mode):
            regular = stat.S_ISREG(facts.st_mode)
            states[path.relative_to(engine).as_posix()] = FileState.of(facts) if regular else FileState(-1, -1, -1)
    return states
