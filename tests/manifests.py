"""engine.json edited as its writer would, with the digest that goes with the new values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trt_build.manifest import digested_text


def read_values(folder: Path) -> dict[str, Any]:
    """The values of an engine's engine.json, the digest aside."""
    values: dict[str, Any] = json.loads((folder / "engine.json").read_text())
    values.pop("digest", None)
    return values


def write_values(folder: Path, values: dict[str, Any]) -> None:
    """Write engine.json with these values and their digest."""
    (folder / "engine.json").write_text(digested_text(values))


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Change values of engine.json."""
    write_values(folder, {**read_values(folder), **changes})
