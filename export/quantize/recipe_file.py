"""Recipe files: YAML or JSON that a user writes (docs/recipes.md).

preset: int4                 # or default: {bits: 4, block: 64}
rules:
  - {weight: qkv, bits: 6}
  - {role: expert, layers: [0, -1], bits: 5, block: 32}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.errors import QuantizationError, named, shown, unknown
from export.files.reading import read_json
from export.files.yaml_reading import read_yaml
from export.provider import Provider
from export.quantize.presets import PRESETS, preset
from export.quantize.recipe import Recipe
from export.quantize.recipe_reading import read_recipe

_KEYS = ("name", "preset", "default", "rules")


def read_recipe_file(path: Path, provider: Provider) -> Recipe:
    """The recipe of a file, for a provider. Its name is the file's without ending if it states none.

    Raises QuantizationError for a file that cannot be read or holds no recipe.
    """
    what = "the recipe"
    reader = read_json if path.suffix == ".json" else read_yaml
    values = reader(path, what, QuantizationError)
    try:
        whole, begun = _with_preset(values, path, provider)
        return read_recipe(whole, provider, of_preset=begun)
    except ValueError as error:
        raise QuantizationError(f"reading {what} {named(path)}: {error}") from error


def _with_preset(values: Any, path: Path, provider: Provider) -> tuple[dict[str, Any], int]:  # noqa: ANN401 - YAML value
    """The values with those of the preset that they begin from, and the number of its rules. Raises ValueError."""
    if not isinstance(values, dict):
        raise ValueError(f"found {shown(values, 60)}, expected a table with the keys {', '.join(_KEYS)}")
    own = {"name": path.stem if path.stem not in PRESETS else path.name, **values}
    if own["name"] in PRESETS:
        raise ValueError(f"name is {own['name']}, which is a preset's; take another one")
    if "preset" not in own:
        return own, 0
    begins = own.pop("preset")
    if "default" in own:
        raise ValueError("it has both preset and default, expected one of them")
    if not isinstance(begins, str) or begins not in PRESETS:
        raise ValueError(f"preset: {unknown(begins, PRESETS)}")
    begun = preset(begins, provider)
    rules = own.get("rules", [])
    if not isinstance(rules, list):
        raise ValueError(f"rules is {shown(rules, 60)}, expected a list")
    first = begun.get("rules", ())
    return {**own, "default": begun["default"], "rules": [*first, *rules]}, len(first)
