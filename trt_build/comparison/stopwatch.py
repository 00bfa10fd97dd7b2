"""Tells how long the parts of a verification took."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds by part, in the order in which the parts ended. A part that ends twice counts both times."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def ended(self, part: str) -> None:
        """A part ended here. It began where the part before ended, or where this was made."""
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now
