"""Results as rows of name and value, and numbers of bytes as text."""

from __future__ import annotations

Rows = list[tuple[str, str]]


def in_units(count: int) -> str:
    """A number of bytes with a unit, such as 1.5 GB; 1 kB is 1000 B."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
