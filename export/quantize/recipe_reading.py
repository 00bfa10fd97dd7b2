"""Reads a recipe from plain values: those of a preset, of engine.json or of a recipe file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from export.errors import named, names, shown
from export.provider import PROVIDERS, Provider
from export.quantize.recipe import FLOATS, METHODS, QUANTISED_ROLES, Choice, Recipe, Rule

BITS = (2, 3, 4, 5, 6, 8)
BLOCK_SIZES = (32, 64, 128)
SCALES = ("float16", "float32")
MAX_RULES = 1000
MAX_LAYERS = 1 << 14
_STEP = re.compile(r"(\d{1,5})::(\d{1,5})")
_RANGE = re.compile(r"(\d{1,5})-(\d{1,5})")
_CHOICE = ("bits", "block", "symmetric", "scales", "method")
_MATCH = ("role", "weight", "layers")


def read_recipe(
    values: Any,  # noqa: ANN401 - plain values
    provider: Provider = PROVIDERS["cpu"],
    num_layers: int = 0,
    of_preset: int = 0,
) -> Recipe:
    """The recipe of plain values with the keys name, default and, if there are any, rules. A list may be written as its
    one item, and layers as ranges such as "0-3" and steps such as "1::3" (Rule.layers). The first `of_preset` rules are
    not the file's, whose own are counted from 0.

    Raises ValueError that names the place, what was found and what was expected.
    """
    table = _table(values, "the recipe", ("name", "default", "rules"))
    name = table.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"name is {shown(name, 60)}, expected a text")
    if "default" not in table:
        raise ValueError("default is missing")
    rules = table.get("rules", [])
    if not isinstance(rules, list) or len(rules) > MAX_RULES:
        raise ValueError(f"rules is {shown(rules, 60)}, expected a list of at most {MAX_RULES} rules")
    default = _choice(_table(table["default"], "default", _CHOICE), "default")
    if default.bits is None:
        raise ValueError("default.bits is missing")
    return Recipe(
        name=name,
        default=default,
        rules=tuple(_rule(rule, f"rules[{index}]") for index, rule in enumerate(rules, -of_preset)),
        provider=provider,
        num_layers=num_layers,
        of_preset=of_preset,
    )


def _table(values: Any, where: str, known: tuple[str, ...]) -> Mapping[str, Any]:  # noqa: ANN401 - plain values
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {shown(values, 60)}, expected a table with the keys {', '.join(known)}")
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"{where} has the unknown key {names(map(str, unknown))}, expected {', '.join(known)}")
    return values


def _rule(values: Any, where: str) -> Rule:  # noqa: ANN401 - plain values
    table = _table(values, where, (*_MATCH, *_CHOICE))
    roles = _texts(table.get("role", []), f"{where}.role")
    for role in roles:
        if role not in map(str, QUANTISED_ROLES):
            raise ValueError(
                f"{where}.role is {named(role, 40)}, expected one of {', '.join(map(str, QUANTISED_ROLES))}"
            )
    return Rule(
        role=roles,
        weight=_texts(table.get("weight", []), f"{where}.weight"),
        layers=_layers(table.get("layers", []), f"{where}.layers"),
        choice=_choice({key: table[key] for key in _CHOICE if key in table}, where),
    )


def _choice(values: Mapping[str, Any], where: str) -> Choice:
    bits, sizes = values.get("bits"), values.get("block")
    _check(bits, f"{where}.bits", (*BITS, FLOATS))
    if sizes is not None:
        sizes = tuple(sizes) if isinstance(sizes, list) else (sizes,)
        for size in sizes:
            _check(size, f"{where}.block", BLOCK_SIZES)
    symmetric = values.get("symmetric")
    if symmetric is not None and type(symmetric) is not bool:
        raise ValueError(f"{where}.symmetric is {shown(symmetric, 60)}, expected true or false")
    _check(values.get("scales"), f"{where}.scales", SCALES)
    _check(values.get("method"), f"{where}.method", METHODS)
    return Choice(bits=bits, block=sizes, symmetric=symmetric, scales=values.get("scales"), method=values.get("method"))


def _check(value: Any, where: str, allowed: tuple[Any, ...]) -> None:  # noqa: ANN401 - plain values
    if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
        raise ValueError(f"{where} is {shown(value, 60)}, expected one of {', '.join(map(str, allowed))}")


def _texts(value: Any, where: str) -> tuple[str, ...]:  # noqa: ANN401 - plain values
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{where} is {shown(value, 60)}, expected a text or a list of texts")
    return tuple(texts)


def _layers(value: Any, where: str) -> tuple[int | str, ...]:  # noqa: ANN401 - plain values
    numbers: list[int | str] = []
    for item in value if isinstance(value, list) else [value]:
        span = _RANGE.fullmatch(item) if isinstance(item, str) else None
        step = _STEP.fullmatch(item) if isinstance(item, str) else None
        if type(item) is int and abs(item) <= MAX_LAYERS:
            numbers.append(item)
        elif span is not None and int(span[1]) <= int(span[2]) <= MAX_LAYERS:
            numbers.append(item)  # not written out: a small file could name billions of layers
        elif step is not None and int(step[2]) > 0:
            numbers.append(item)
        else:
            raise ValueError(
                f"{where} is {shown(value, 60)}, expected numbers of layers, ranges such as 0-3 or steps such as 1::3"
            )
    return tuple(numbers)
