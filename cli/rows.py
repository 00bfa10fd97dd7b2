"""Prints the results of commands: a heading, and rows of name and value."""

from __future__ import annotations

from export.errors import printable
from export.rows import Rows


def print_rows(title: str, rows: Rows) -> None:
    """Print a heading and its rows as plain text. Lines are not wrapped, so a pipe gets them whole."""
    if not rows:
        return
    print(printable(title))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(printable(f"  {name:<{width}}  {value}" if width else f"  {value}"))
