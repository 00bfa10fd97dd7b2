"""The file of weights that a loaded graph maps into memory, and whether it is still what was loaded."""

from __future__ import annotations

import os
from pathlib import Path

from trt_build.errors import EngineError


class MappedFile:
    """A file whose bytes are read for as long as a graph is loaded. Make it before the file is mapped.

    A file that another one replaced under its name stays in the mapping as it was. But what is written into the file
    itself shows in the mapping at once, and would change what is computed. The kernel notes the time of a write before
    it takes the bytes, so a step computed with changed bytes ends with a changed time. Not noticed is a writer that
    puts size and time back (utimes(2)).
    """

    def __init__(self, path: Path) -> None:
        """Open the file. Raises EngineError if it cannot be opened."""
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise EngineError(
                f"loading the engine {path.parent}: {path.name} cannot be opened ({error.strerror}); "
                f"`moeship doctor {path.parent}` says whether its files are those of the build"
            ) from error
        self._state = self._now()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def require_unchanged(self) -> None:
        """Raise EngineError if the file was written to since the object was made. Takes 1 us."""
        if self._now() != self._state:
            raise EngineError(
                f"computing with {self._path.parent.name}: {self._path.name} was written to while it was in use, so "
                "that results would be wrong; put a new engine beside the old one, never over it, and start the "
                "server again"
            )

    def _now(self) -> tuple[int, int]:
        facts = os.fstat(self._descriptor)
        return facts.st_size, facts.st_mtime_ns
