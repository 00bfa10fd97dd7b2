"""Reads engine.json of formats 2, 3 and 4: splits the values of the present format from those of the old formats.

Formats 2 and 3 have `stages` and `kernel_layout`, which the present format does not have. Format 3 adds the digest,
`resident_bytes`, `kernels` and `tokenizer` to format 2. Format 4 has the values of the present format; its engines lack
the serving graph. Engines of format 5 may have bits by role in place of a recipe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.errors import names, shown
from export.quantize.recipe import FLOATS
from trt_build.manifest import digested_text

VERSIONS = (2, 3, 4)
PROBE_GRAPH = "kernels.onnx"  # a few rows of each kind of packed weight
_PACKED_ALONE, _PACKED_TOO = 2, 3
_ADDED = ("stages", "kernel_layout", "resident_bytes")
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class OldFormat:
    """What engine.json of an old format says. `values` are all its values. `kernel_layout` is a digest of the packed
    form on the machine that built the engine, None if no weights are packed. `resident_bytes` is the number of bytes
    of weights that a session keeps in memory, None for all."""

    values: Mapping[str, Any]
    kernel_layout: str | None
    resident_bytes: int | None

    @property
    def is_packed(self) -> bool:
        """Whether the data file has weights in the packed form of ONNX Runtime's kernels."""
        return self.kernel_layout is not None

    @property
    def is_packed_alone(self) -> bool:
        """Whether the data file has weights in the packed form only."""
        return self.is_packed and self.values["format_version"] == _PACKED_ALONE

    @property
    def names_tokenizer(self) -> bool:
        """Whether engine.json describes the tokenizer."""
        return bool(self.values["format_version"] != _PACKED_ALONE)

    @property
    def files(self) -> tuple[str, ...]:
        """Files of such an engine that engines of the present format do not have."""
        return (PROBE_GRAPH,) if self.is_packed_alone else ()

    def text(self, verification: Mapping[str, Any] | None) -> str:
        """The text of engine.json with `verification` as the result of the last comparison."""
        return digested_text({**self.values, "verification": verification})


def split_old_values(raw: Mapping[str, Any]) -> tuple[dict[str, Any], OldFormat | None]:
    """Split the values of engine.json into those of the present format and the old format, None for the present format.
    Raises ValueError for missing or impossible values."""
    if raw["format_version"] not in VERSIONS:
        return dict(raw), None
    if raw["format_version"] > _PACKED_TOO:
        return dict(raw), OldFormat(values=raw, kernel_layout=None, resident_bytes=None)
    missing = set(_ADDED[: 2 if raw["format_version"] == _PACKED_ALONE else 3]) - set(raw)
    if missing:
        raise ValueError(f"keys missing: {names(sorted(missing))}")
    layout, resident = raw["kernel_layout"], raw.get("resident_bytes")
    if layout is not None and not (isinstance(layout, str) and _HEX_DIGEST.fullmatch(layout)):
        raise ValueError(f"kernel_layout is {shown(layout, 80)}, expected a SHA-256")
    if "resident_bytes" in raw and (type(resident) is not int or resident < 1):
        raise ValueError(f"resident_bytes is {shown(resident, 40)}, expected 1 or more")
    values = {"kernels": "onnxruntime", **raw}  # format 2 had no other kernels and does not name them
    if raw["format_version"] == _PACKED_ALONE:
        values["tokenizer"] = None
    for name in _ADDED:
        values.pop(name, None)
    return values, OldFormat(values=raw, kernel_layout=layout, resident_bytes=resident)


def with_recipe(precision: Any) -> Any:  # noqa: ANN401 - JSON value
    """The values of `precision` with a recipe, for an engine that has bits by role in its place. Values that are none
    are left to the reader."""
    if not isinstance(precision, dict) or "recipe" in precision or not {"bits", "block_sizes"} <= set(precision):
        return precision
    bits, sizes = precision["bits"], precision["block_sizes"]
    if not isinstance(bits, dict) or not isinstance(sizes, list):
        raise ValueError("precision.bits and precision.block_sizes are no object and list")
    others = {name: value for name, value in precision.items() if name not in ("bits", "block_sizes")}
    rules = [{"role": [role], "bits": own, "block": sizes} for role, own in bits.items()]
    recipe = {"name": precision.get("name"), "default": {"bits": FLOATS}, "rules": rules}
    roles = {role: {"bits": [own], "block_sizes": sizes} for role, own in bits.items()}
    return {**others, "recipe": recipe, "roles": roles}
