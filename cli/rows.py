"""Prints the results of commands: a heading, and rows of name and value."""

from __future__ import annotations

from export.errors import printable

Rows = list[tuple[str, str]]


def in_units(count: int) -> str:
    """A number of bytes with a unit, such as 1.5 GB; 1 kB is 1000 B."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def print_rows(title: str, rows: Rows) -> None:
    """Print a heading and its rows as plain text. Lines are not wrapped, so a pipe gets them whole."""
    if not rows:
        return
    print(printable(title))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(printable(f"  {name:<{width}}  {value}" if width else f"  {value}"))
