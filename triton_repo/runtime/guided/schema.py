"""Checks a JSON schema before it is compiled: that each keyword is known, and that some finite text can meet it.

Keywords are those of JSON Schema 2020-12 and draft 7 that llguidance serves (its docs/json_schema.md). One that is not
served is refused by name: an answer that ignored it might not be valid. A name that no draft has is refused as well,
since it is most often a slip; names that begin with x- are extensions, and left out. Values are checked here as well,
since the library does not look at keywords that a schema's type has no use for. Limits that contradict each other are
the library's to find.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn
from urllib.parse import unquote

_OF_MANY = frozenset({"properties", "patternProperties", "$defs", "definitions"})  # a name and a schema each
_OF_LIST = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_OF_ONE = frozenset({"additionalProperties", "items", "additionalItems"})  # items of draft 7 may be a list
_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")


def _is_count(value: object) -> bool:
    return _is_number(value) and value >= 0 and (isinstance(value, int) or value.is_integer())  # type: ignore


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_type(value: object) -> bool:
    return all(kind in _TYPES for kind in value) if _is_texts(value) and value else value in _TYPES  # type: ignore[attr-defined]


# Other keywords: whether a value fits, and what does.
_Rule = tuple[Callable[[Any], bool], str]
_COUNT: _Rule = (_is_count, "a whole number of 0 or more")
_NUMBER: _Rule = (_is_number, "a number")
_TEXT: _Rule = (_is_text, "a text")
_OTHERS: dict[str, _Rule] = {
    "type": (_is_type, f"one or several of {', '.join(_TYPES)}"),
    "const": (lambda _value: True, ""),
    "enum": (lambda value: isinstance(value, list) and bool(value), "a list of values"),
    "required": (_is_texts, "a list of names"),
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    **dict.fromkeys(("$ref", "pattern", "format"), _TEXT),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _NUMBER),
    **dict.fromkeys(("minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength"), _COUNT),
}
_NOTES = frozenset(
    {
        "$schema", "$id", "$comment", "$anchor", "title", "description", "default", "examples", "example", "deprecated",
        "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema",
    }
)  # fmt: skip
_NOT_SERVED = frozenset(
    {
        "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "uniqueItems", "contains",
        "minContains", "maxContains", "propertyNames", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef",
        "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary",
    }
)  # fmt: skip
# How dates begin. The library takes the 29th of February in every year; and year 0, which many validators do not.
_YEAR = "(?:[1-9][0-9]{3}|0(?:[1-9][0-9]{2}|0(?:[1-9][0-9]|0[1-9])))"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAY = f"^(?:{_YEAR}-(?:0[13-9]|1[0-2])-|{_YEAR}-02-(?:[01]|2[0-8])|{_LEAP_YEAR}-02-29)"
# By the format: it also takes a second 60 at any time, which stands for a leap second.
_NARROWER = {
    "date": (_DAY,),
    "date-time": (_DAY, "^.{10}[Tt ][0-9:]{6}[0-5]"),
    "time": ("^[0-9:]{6}[0-5]",),
}
_EXTENSION = "x-"
LONGEST_PATTERN = 8192  # characters; the library takes a second for some of 50,000
_DEEPEST = 60  # schemas within schemas; the library reads 128 levels of JSON
_MOST_TARGETS = 512  # of references; whether they can be met takes the square of their number

_Schema = Any  # a dict, or a bool


def check_schema(text: str) -> dict[str, Any]:
    """The schema in a text, without extensions and with dates that exist. Raises ValueError, whose text says what is
    wrong and where."""
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("found JSON of too many levels; send a schema that is less deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"found no JSON ({error}), expected a JSON schema") from None
    schema = _without_extensions(schema, "#")
    if schema is False:
        raise ValueError("no value meets the schema false; send another one")
    _check_reach(schema)
    return {} if schema is True else schema


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"found {name}, expected JSON, which has no such number")


def _without_extensions(schema: _Schema, place: str, depth: int = 0) -> _Schema:
    """The schema without keywords that begin with x-, and with dates that exist. Raises ValueError for a keyword that
    is not served."""
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise ValueError(f"found {_shown(schema)} at {place}, expected a schema: an object, true or false")
    if depth > _DEEPEST:
        raise ValueError(f"found schemas of more than {_DEEPEST} levels; send a schema that is less deep")
    kept = {}
    for name, value in schema.items():
        where = f"{place}/{_escaped(name)}"
        if name.startswith(_EXTENSION):
            continue
        if name in _NOT_SERVED and not (name == "uniqueItems" and value is False):
            raise ValueError(f"found the keyword {name!r} at {place}, which is not served; leave it out")
        if name in _OF_MANY and isinstance(value, dict):
            value = {key: _without_extensions(one, f"{where}/{_escaped(key)}", depth + 1) for key, one in value.items()}
        elif (name in _OF_LIST or name == "items") and isinstance(value, list):
            value = [_without_extensions(one, f"{where}/{number}", depth + 1) for number, one in enumerate(value)]
        elif name in _OF_ONE:
            value = _without_extensions(value, where, depth + 1)
        elif name in _OF_MANY | _OF_LIST:
            expected = "an object of schemas" if name in _OF_MANY else "a list of schemas"
            raise ValueError(f"found {_shown(value)} at {where}, expected {expected}")
        elif name in _OTHERS:
            fits, expected = _OTHERS[name]
            if not fits(value):
                raise ValueError(f"found {_shown(value)} at {where}, expected {expected}")
        elif name not in _NOTES | _NOT_SERVED:
            raise ValueError(
                f"found the keyword {name[:60]!r} at {place}, which JSON Schema does not have; mend or leave it out "
                f"(the names of your own notes begin with {_EXTENSION})"
            )
        if name == "pattern" and isinstance(value, str) and len(value) > LONGEST_PATTERN:
            raise ValueError(
                f"found a pattern of {len(value)} characters at {place}, expected at most {LONGEST_PATTERN}; send a "
                "shorter one"
            )
        if name != "uniqueItems":
            kept[name] = value
    narrower = _NARROWER.get(str(kept.get("format")), ())
    if narrower:
        kept["allOf"] = [*kept.get("allOf", ()), *({"pattern": pattern} for pattern in narrower)]
    return kept


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _check_reach(schema: _Schema) -> None:
    """Raise ValueError for a schema that only an endless text would meet, such as an object that needs itself.

    The least fixed point: no reference can be met at first, and a round adds those that can where the ones before can.
    """
    references = set(_references(schema))
    if not references:
        return
    if len(references) > _MOST_TARGETS:
        raise ValueError(f"found {len(references)} references, expected at most {_MOST_TARGETS}; send a smaller schema")
    targets = {pointer: _target(schema, pointer) for pointer in references}
    met: dict[str, bool] = dict.fromkeys(references, False)
    changed = True
    while changed:
        changed = False
        for pointer, target in targets.items():
            if not met[pointer] and _can_be_met(target, met):
                met[pointer] = changed = True
    if not _can_be_met(schema, met):
        raise ValueError("found a schema that needs itself without end, so that no finite answer meets it")


def _references(schema: _Schema) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("$ref"), str):
        yield schema["$ref"]
    for name, value in schema.items():
        if name in _OF_MANY and isinstance(value, dict):
            for one in value.values():
                yield from _references(one)
        elif name in _OF_LIST | _OF_ONE:
            for one in value if isinstance(value, list) else [value]:
                yield from _references(one)


def _target(schema: _Schema, pointer: str) -> _Schema:
    """The schema at a reference within the schema. Others are left to the library, which refuses them."""
    if not pointer.startswith("#"):
        return True
    found = schema
    for part in unquote(pointer[1:]).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        else:
            return True
    return found


def _can_be_met(schema: _Schema, met: Mapping[str, bool]) -> bool:
    """Whether some finite value may meet a schema, as far as references and what objects and arrays need decide it."""
    if not isinstance(schema, dict):
        return schema is not False
    if isinstance(schema.get("$ref"), str) and not met[schema["$ref"]]:
        return False
    if not all(_can_be_met(one, met) for one in _list(schema, "allOf")):
        return False
    for name in ("anyOf", "oneOf"):
        if name in schema and not any(_can_be_met(one, met) for one in _list(schema, name)):
            return False
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return any(
        _object_can_be_met(schema, met)
        if kind == "object"
        else _array_can_be_met(schema, met)
        if kind == "array"
        else True
        for kind in kinds
    )


def _object_can_be_met(schema: Mapping[str, Any], met: Mapping[str, bool]) -> bool:
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    return all(_can_be_met(properties.get(name, True), met) for name in _list(schema, "required"))


def _array_can_be_met(schema: Mapping[str, Any], met: Mapping[str, bool]) -> bool:
    least = schema.get("minItems", 0)
    if not isinstance(least, int) or least < 1:
        return True
    items = schema.get("items", True)
    firsts = items if isinstance(items, list) else _list(schema, "prefixItems")
    others = schema.get("additionalItems", True) if isinstance(items, list) else items
    return all(_can_be_met(one, met) for one in firsts[:least]) and (least <= len(firsts) or _can_be_met(others, met))


def _list(schema: Mapping[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []
