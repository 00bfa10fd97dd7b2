"""Progress messages that do not come too often."""

from __future__ import annotations

import time
from collections.abc import Callable

PROGRESS_S = 5.0  # seconds between two progress messages


def every(seconds: float, tell: Callable[[str], None]) -> Callable[[str], None]:
    """A function that calls `tell` only if `seconds` have passed since it was made or since its last call of `tell`."""
    last = time.monotonic()

    def throttled(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            tell(text)

    return throttled
