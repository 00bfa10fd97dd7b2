"""What a backend gives back to the commands that build and plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.rows import Rows


@dataclass(frozen=True, kw_only=True)
class Built:
    """The result of a build: as text, as JSON, and what is wrong with the engine, None for nothing."""

    text: str
    json_text: str
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The result of a plan: `values` as plain JSON values, and `tables` with a heading each. `num_sequences` is the
    number of sequences that fit the device's memory, None if that is unknown."""

    values: Mapping[str, Any]
    tables: Sequence[tuple[str, Rows]]
    num_sequences: int | None
