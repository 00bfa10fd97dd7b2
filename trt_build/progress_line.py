"""Shows the progress of a conversion in one line of a terminal: parts, bytes, bytes per second, time left."""

from __future__ import annotations

import time
from typing import TextIO

from export.conversion.writer import Progress


class ProgressLine:
    """Called with each Progress; overwrites its line on the terminal, and ends the line after the last part."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        end = "\n" if progress.parts == progress.num_parts else ""
        self._stream.write(f"\r{describe(progress, time.monotonic() - self._started)}\x1b[K{end}")
        self._stream.flush()


def describe(progress: Progress, elapsed_s: float) -> str:
    """The line for a conversion that has run for `elapsed_s` seconds. Rate and time left count only the bytes that this
    run converts."""
    line = (
        f"part {progress.parts} of {progress.num_parts}, "
        f"{progress.bytes / 1e9:.2f} of {progress.num_bytes / 1e9:.2f} GB read"
    )
    read = progress.bytes - progress.resumed_bytes
    if not read or elapsed_s <= 0:
        return line
    rate = read / elapsed_s
    left = round((progress.num_bytes - progress.bytes) / rate)
    return f"{line}, {rate / 1e6:.0f} MB/s, {left // 60}:{left % 60:02d} left"
