"""Random JSON schemas, and random values that meet them.

    schema = random_schema(random.Random(7))
    value = schema.value(random.Random(8))       # valid by schema.json

Strings, numbers and arrays have limits, so that a model's answer ends unless it follows a schema that names itself.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_NAMES = (
    "id",
    "name",
    "kind",
    "size",
    "items",
    "unité",
    "a b",
    "$x",
    "next",
    "値",
    "parent_id",
    "isOpen",
    "x/y",
    "~",
    "",
)
_DEEPEST = 3
_BOUNDED = ""  # among the definitions while a schema is made: none may name itself
# A pattern, and what matches it.
_PATTERNS: tuple[tuple[str, Callable[[random.Random], str]], ...] = (
    ("^[A-Z]{2}-[0-9]{3,4}$", lambda r: f"{_some(r, string.ascii_uppercase, 2, 2)}-{_some(r, string.digits, 3, 4)}"),
    ("^(ab|c){1,4}$", lambda r: "".join(r.choice(["ab", "c"]) for _ in range(r.randint(1, 4)))),
    (r"^\+?[0-9]{1,3}( [0-9]{2,3}){2}$", lambda r: f"+{r.randint(1, 99)} {r.randint(10, 99)} {r.randint(100, 999)}"),
    ('^[^"\\\\\u0000-\u001f]{1,6}$', lambda r: _some(r, "éab 1😀", 1, 6)),
)
_FORMATS: tuple[tuple[str, Callable[[random.Random], str]], ...] = (
    ("date", lambda r: f"{r.randint(1900, 2099)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}"),
    ("uuid", lambda r: "-".join(_some(r, "0123456789abcdef", size, size) for size in (8, 4, 4, 4, 12))),
    ("ipv4", lambda r: ".".join(str(r.randint(0, 255)) for _ in range(4))),
)


@dataclass(kw_only=True)
class Schema:
    """A schema, and what makes values that meet it."""

    json: Any
    value: Callable[[random.Random], Any]
    definitions: dict[str, Any] = field(default_factory=dict)


def random_schema(rng: random.Random, *, bounded: bool = False) -> Schema:
    """An object of one to five properties, with definitions at its root. If it is `bounded`, no schema names itself, so
    that every text that meets it is of bounded length."""
    definitions: dict[str, Any] = {_BOUNDED: {}} if bounded else {}
    made = _object(rng, 0, definitions)
    definitions.pop(_BOUNDED, None)
    if definitions:
        made.json["$defs"] = definitions
    return made


def _some(rng: random.Random, letters: str, least: int, most: int) -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randint(least, most)))


def _any(rng: random.Random, depth: int, definitions: dict[str, Any]) -> Schema:
    simple = (_string, _pattern, _format, _integer, _multiple, _number, _enum, _constant, _boolean)
    deep = (_object, _array, _tuple, _any_of, _one_of, _all_of, _reference, _map, _several)
    makers = simple if depth >= _DEEPEST or rng.random() < 0.6 else deep
    return rng.choice(makers)(rng, depth, definitions)


def _string(rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> Schema:
    least, most = rng.randint(0, 3), rng.randint(3, 20)
    limits = {"minLength": least, "maxLength": most} if least else {"maxLength": most}
    return Schema(json={"type": "string", **limits}, value=lambda r: _some(r, 'abc é"\\\n語/', least, most))


def _pattern(rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> Schema:
    pattern, make = rng.choice(_PATTERNS)
    return Schema(json={"type": "string", "pattern": pattern}, value=make)


def _format(rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> Schema:
    name, make = rng.choice(_FORMATS)
    return Schema(json={"type": "string", "format": name}, value=make)


def _integer(rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> Schema:
    low = rng.randint(-1000, 1000)
    high = low + rng.randint(0, 5000)
    if rng.random() < 0.3:
        return Schema(
            json={"type": "integer", "exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1},
            value=lambda r: r.randint(low, high),
        )
    return Schema(json={"type": "integer", "minimum": low, "maximum": high}, value=lambda r: r.randint(low, high))


def _multiple(rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> Schema:
    step, most = rng.randint(2, 7), rng.randint(5, 50)
    return Schema(
        json={"type": "integer", "multipleOf": step, "minimum": 0, "maximum": step * most},
        value=lambda r: step * r.randint(0, most),
    )


def _number(_rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> Schema:
    return Schema(
        json={"type": "number", "minimum": -5, "maximum": 5, "multipleOf": 0.5},
        value=lambda r: r.randint(-10, 10) / 2,
    )


def _enum(rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> Schema:
    values = rng.sample([1, 2.5, "one", "é", None, True, [1, "a"], {"k": 0}, "", "two words"], rng.randint(1, 5))
    return Schema(json={"enum": values}, value=lambda r: r.choice(values))


def _constant(rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> Schema:
    value = rng.choice(["fixed", 42, None, {"v": [1]}, -0.5])
    return Schema(json={"const": value}, value=lambda _: value)


def _boolean(_rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> Schema:
    return Schema(json={"type": "boolean"}, value=lambda r: r.random() < 0.5)


def _object(rng: random.Random, depth: int, definitions: dict[str, Any]) -> Schema:
    names = rng.sample(_NAMES, rng.randint(1, 5 if depth == 0 else 3))
    inner = {name: _any(rng, depth + 1, definitions) for name in names}
    required = [name for name in names if rng.random() < 0.6]

    def value(r: random.Random) -> dict[str, Any]:
        return {name: one.value(r) for name, one in inner.items() if name in required or r.random() < 0.5}

    return Schema(
        json={
            "type": "object", "properties": {name: one.json for name, one in inner.items()}, "required": required,
            "additionalProperties": False,
        },
        value=value,
    )  # fmt: skip


def _map(rng: random.Random, depth: int, definitions: dict[str, Any]) -> Schema:
    """An object whose names match a pattern."""
    inner = _any(rng, depth + 1, definitions)
    return Schema(
        json={
            "type": "object", "patternProperties": {"^[a-f]{1,3}$": inner.json}, "additionalProperties": False,
            "maxProperties": 3,
        },
        value=lambda r: {name: inner.value(r) for name in r.sample(["a", "bb", "cab"], r.randint(0, 3))},
    )  # fmt: skip


def _array(rng: random.Random, depth: int, definitions: dict[str, Any]) -> Schema:
    inner, least = _any(rng, depth + 1, definitions), rng.randint(0, 2)
    most = least + rng.randint(0, 3)
    return Schema(
        json={"type": "array", "items": inner.json, "minItems": least, "maxItems": most},
        value=lambda r: [inner.value(r) for _ in range(r.randint(least, most))],
    )


def _tuple(rng: random.Random, depth: int, definitions: dict[str, Any]) -> Schema:
    inner = [_any(rng, depth + 1, definitions) for _ in range(rng.randint(1, 3))]
    return Schema(
        json={
            "type": "array", "prefixItems": [one.json for one in inner], "items": False, "minItems": len(inner),
        },
        value=lambda r: [one.value(r) for one in inner],
    )  # fmt: skip


def _any_of(rng: random.Random, depth: int, definitions: dict[str, Any]) -> Schema:
    inner = [_any(rng, depth + 1, definitions) for _ in range(rng.randint(1, 3))]
    return Schema(json={"anyOf": [one.json for one in inner]}, value=lambda r: r.choice(inner).value(r))


def _one_of(rng: random.Random, depth: int, definitions: dict[str, Any]) -> Schema:
    """Schemas of which no value meets two."""
    inner = rng.sample([_string(rng, depth, definitions), _integer(rng, depth, definitions)], 2)
    inner.append(Schema(json={"type": "null"}, value=lambda _: None))
    return Schema(json={"oneOf": [one.json for one in inner]}, value=lambda r: r.choice(inner).value(r))


def _all_of(rng: random.Random, depth: int, definitions: dict[str, Any]) -> Schema:
    inner = _integer(rng, depth, definitions)
    return Schema(json={"allOf": [{"type": "integer"}, inner.json]}, value=inner.value)


def _several(rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> Schema:
    most = rng.randint(1, 9)
    return Schema(
        json={"type": ["string", "null", "boolean"], "maxLength": most},
        value=lambda r: r.choice([None, True, _some(r, "xyz", 0, most)]),
    )


def _reference(rng: random.Random, depth: int, definitions: dict[str, Any]) -> Schema:
    """A list whose entries name the next one, by a schema that names itself; or one entry."""
    name, bounded = f"entry{len(definitions)}", _BOUNDED in definitions
    definitions[name] = {}
    inner = _any(rng, max(depth + 1, _DEEPEST), definitions)
    itself = {"$ref": f"#/$defs/{name}"}
    definitions[name] = {
        "type": "object",
        "properties": {"v": inner.json, "next": {"anyOf": [{"type": "null"}, *([] if bounded else [itself])]}},
        "required": ["v", "next"],
        "additionalProperties": False,
    }

    def value(r: random.Random, left: int) -> dict[str, Any]:
        return {"v": inner.value(r), "next": value(r, left - 1) if left and r.random() < 0.5 else None}

    return Schema(json=itself, value=lambda r: value(r, 0 if bounded else 3))
