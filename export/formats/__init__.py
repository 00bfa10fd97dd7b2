"""Formats in which other tools pack weights. Each format is one file of this folder, with a `FORMAT` record.

A format shows the packed tensors of a checkpoint under their ordinary names, in float32. The rest of moeship therefore
sees an ordinary checkpoint, whose values are the dequantised ones. Nothing else lists the formats.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from export.errors import ConfigError, named
from export.formats.registry import Format
from export.formats.view import Header, PackedTensor, Source

SETTINGS_KEYS = ("quantization_config", "compression_config")  # keys of config.json that say how weights are packed


@cache
def formats() -> tuple[Format, ...]:
    """All formats, in the order of their file names."""
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in found]
    return tuple(module.FORMAT for module in modules if hasattr(module, "FORMAT"))


def methods() -> list[str]:
    """The values of `quant_method` that moeship reads."""
    return sorted(method for one in formats() for method in one.methods)


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The object of config.json that says how the weights are packed; None if there is none, or an empty one."""
    found = [config[key] for key in SETTINGS_KEYS if config.get(key)]
    return found[0] if found and isinstance(found[0], dict) else None


def views_of(
    settings: Mapping[str, Any], headers: Mapping[str, Header], source: Source
) -> dict[str, PackedTensor] | None:
    """The packed tensors of a checkpoint by their ordinary names; None for a method that moeship does not read, which
    the family refuses by name. Raises ConfigError and CheckpointError."""
    method = settings.get("quant_method")
    one = next((one for one in formats() if method in one.methods), None)
    if one is None:
        return None
    found = one.views(settings, headers, source)
    if not found:
        raise ConfigError(
            f"reading the packed weights: config.json says that they are packed by {named(method, 40)}, and no tensor "
            "has the names of that format; is the config from another checkpoint?"
        )
    both = sorted(name for name in found if name in headers and name not in found[name].sources)
    if both:
        raise ConfigError(
            f"reading the packed weights: {named(both[0])} is there both packed and as floats; remove one of the two"
        )
    return found
