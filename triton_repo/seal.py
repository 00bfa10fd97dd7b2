"""What a packaged engine's files looked like when their digests were checked, so that a start need not hash them again.

Beside the engine's folder lies a file of one line for each of its files: bytes, time of change in nanoseconds and
inode. Whatever writes to a file, or brings it to another place, changes one of them.
"""

from __future__ import annotations

import json
from pathlib import Path


def write_seal(engine: Path) -> None:
    """Note the state of the engine's files, which have just been checked."""
    _seal_path(engine).write_text(json.dumps(_states(engine), indent=2) + "\n", encoding="utf-8")


def is_sealed(engine: Path) -> bool:
    """Whether the engine's files are as they were when the seal was written."""
    try:
        noted = json.loads(_seal_path(engine).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(noted == _states(engine))


def _seal_path(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.seal.json")


def _states(engine: Path) -> dict[str, list[int]]:
    files = [path for path in sorted(engine.rglob("*")) if not path.is_dir()]
    states = {path.relative_to(engine).as_posix(): path.stat() for path in files}
    return {name: [state.st_size, state.st_mtime_ns, state.st_ino] for name, state in states.items()}
