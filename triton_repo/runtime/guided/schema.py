"""Checks a JSON schema before it is compiled: that each keyword is known, and that some finite text can meet it.

Keywords are those of JSON Schema 2020-12 and draft 7 that llguidance serves (its docs/json_schema.md). One that is not
served is refused by name: an answer that ignored it might not be valid. A name that no draft has is refused as well,
since it is most often a slip; names that begin with x- are extensions, and left out. What values fit a keyword, and
limits that contradict each other, the library checks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn
from urllib.parse import unquote

_OF_MANY = frozenset({"properties", "patternProperties", "$defs", "definitions"})  # a name and a schema each
_OF_LIST = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_OF_ONE = frozenset({"additionalProperties", "items", "additionalItems"})  # items of draft 7 may be a list
_OTHERS = frozenset(
    {
        "type", "const", "enum", "$ref", "required", "minProperties", "maxProperties", "minItems", "maxItems",
        "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
        "multipleOf",
    }
)  # fmt: skip
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
_EXTENSION = "x-"
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
        raise ValueError(f"found {json.dumps(schema)[:60]} at {place}, expected a schema: an object, true or false")
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
            value = [_without_extensions(one, f"{where}/{place}", depth + 1) for place, one in enumerate(value)]
        elif name in _OF_ONE:
            value = _without_extensions(value, where, depth + 1)
        elif name not in _OF_MANY | _OF_LIST | _OTHERS | _NOTES | _NOT_SERVED:
            raise ValueError(
                f"found the keyword {name[:60]!r} at {place}, which JSON Schema does not have; mend or leave it out "
                f"(the names of your own notes begin with {_EXTENSION})"
            )
        if name != "uniqueItems":
            kept[name] = value
    if kept.get("format") in ("date", "date-time") and isinstance(kept.get("allOf", []), list):
        kept["allOf"] = [*kept.get("allOf", []), {"pattern": _DAY}]
    return kept


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
    return all(_can_be_met(properties.get(name, True), met) for name in _list(schema, "required") if _is_text(name))


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


def _is_text(value: object) -> bool:
    return isinstance(value, str)
