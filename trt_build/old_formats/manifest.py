"""engine.json of formats 2 and 3: what it says beside the values of the present format, and what it does not say.

Format 3 adds to format 2 the digest, `resident_bytes`, `kernels` and `tokenizer`. Both have `stages` and
`kernel_layout`, which the present format has not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.errors import names, shown
from trt_build.manifest import digested_text

VERSIONS = (2, 3)
PROBE_GRAPH = "kernels.onnx"  # a few rows of each kind of packed weight
_PACKED_ALONE = 2
_ADDED = ("stages", "kernel_layout", "resident_bytes")
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class OldFormat:
    """`values` are those of engine.json. `kernel_layout` is a digest of how the building machine's kernels pack
    weights, None where none are packed; of the weights a session keeps `resident_bytes` in memory, or all (None)."""

    values: Mapping[str, Any]
    kernel_layout: str | None
    resident_bytes: int | None

    @property
    def is_packed(self) -> bool:
        """Whether weights lie in the data file as ONNX Runtime packs them."""
        return self.kernel_layout is not None

    @property
    def is_packed_alone(self) -> bool:
        """Whether they lie there in no other form."""
        return self.is_packed and self.values["format_version"] == _PACKED_ALONE

    @property
    def names_tokenizer(self) -> bool:
        """Whether engine.json has the facts of the tokenizer."""
        return bool(self.values["format_version"] != _PACKED_ALONE)

    @property
    def files(self) -> tuple[str, ...]:
        """What such an engine has beside the files of every engine."""
        return (PROBE_GRAPH,) if self.is_packed_alone else ()

    def text(self, verification: Mapping[str, Any] | None) -> str:
        """engine.json with this result of a comparison."""
        return digested_text({**self.values, "verification": verification})


def split_old_values(raw: Mapping[str, Any]) -> tuple[dict[str, Any], OldFormat | None]:
    """The values that the present format has too, and the old format, if it is one. Raises ValueError for values that
    no engine has."""
    if raw["format_version"] not in VERSIONS:
        return dict(raw), None
    missing = set(_ADDED[: 2 if raw["format_version"] == _PACKED_ALONE else 3]) - set(raw)
    if missing:
        raise ValueError(f"keys missing: {names(sorted(missing))}")
    layout, resident = raw["kernel_layout"], raw.get("resident_bytes")
    if layout is not None and not (isinstance(layout, str) and _HEX_DIGEST.fullmatch(layout)):
        raise ValueError(f"kernel_layout is {shown(layout, 80)}, expected a SHA-256")
    if "resident_bytes" in raw and (type(resident) is not int or resident < 1):
        raise ValueError(f"resident_bytes is {shown(resident, 40)}, expected 1 or more")
    values = {"kernels": "onnxruntime", **raw}  # which is not said where there was no choice
    if raw["format_version"] == _PACKED_ALONE:
        values["tokenizer"] = None
    for name in _ADDED:
        values.pop(name, None)
    return values, OldFormat(values=raw, kernel_layout=layout, resident_bytes=resident)
