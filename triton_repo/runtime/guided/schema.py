"""Checks a JSON schema before it is compiled: that each keyword is known, and that some finite text can meet it.

Keywords are those of JSON Schema 2020-12 and draft 7 that llguidance serves (its docs/json_schema.md). One that is not
served is refused by name: an answer that ignored it might not be valid. A name that no draft has is refused as well,
since it is most often a slip; names that begin with x- are extensions, and left out. Values are checked here as well,
since the library does not look at keywords that a schema's type has no use for. Limits that contradict each other are
the library's to find.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any, NoReturn
from urllib.parse import unquote

from triton_repo.runtime.guided.needs import Needs

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
_COUNTS = ("minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength")
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
    **dict.fromkeys(_COUNTS, _COUNT),
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
_DEEPEST = 60  # schemas within schemas
_DEEPEST_JSON = 120  # objects and lists within each other; the library reads 128 levels
_MOST_DIGITS = 300  # of a whole number, which the library reads as a float64
_MOST_TARGETS = 512  # of references
_MOST_NAME_PATTERNS = 100  # each is compared with each: 0.04 s for 100, 4 s for 300, more than 12 s for 1,000
_MOST_STEPS = 100_000  # 0.7 s and 50 MB
_REPEATS = ("*", "+", "{")
_MOST_SEARCHING = 10  # 0.02 s and 60 MB; 17 take 6 s and 280 MB, and each more twice as much
_MOST_TOGETHER = 50  # different patterns; the library takes 0.2 s for 60, 1 s for 100 and more than 8 s for 150

_Schema = Any  # a dict, or a bool


def check_schema(text: str) -> dict[str, Any]:
    """The schema in a text, without extensions and with dates that exist. Raises ValueError, whose text says what is
    wrong and where."""
    schema = _without_extensions(_parsed(text), "#")
    if schema is False:
        raise ValueError("no value meets the schema false; send another one")
    if _levels(schema) > _DEEPEST_JSON:
        raise ValueError(f"found JSON of more than {_DEEPEST_JSON} levels; send a schema that is less deep")
    _check_numbers(schema)
    _check_reach(schema)
    _check_patterns(schema)
    _check_sizes(schema)
    return {} if schema is True else schema


def _parsed(text: str) -> _Schema:
    """The JSON of a text. Raises ValueError, also for what other readers of JSON do not take."""
    try:
        found = json.loads(text, parse_constant=_refuse_constant, parse_int=_read_int)
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("found JSON of too many levels; send a schema that is less deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"found no JSON ({error}), expected a JSON schema") from None
    except UnicodeEncodeError:
        raise ValueError("found half of a pair such as \\ud83d\\ude00 in a text, expected both halves") from None
    return found


def _read_int(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"found a number of {len(text)} digits, expected at most {_MOST_DIGITS}")
    return int(text)


def _check_numbers(schema: _Schema) -> None:
    try:
        json.dumps(schema, allow_nan=False)
    except ValueError:
        raise ValueError("found a number beyond 1.7e308, the largest that readers of JSON take") from None


def _levels(value: object) -> int:
    """How many objects and lists lie within each other."""
    levels, found = 0, [value]
    while found := [one for each in found for one in _inner(each)]:
        levels += 1
    return levels


def _inner(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


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
    kept: dict[str, Any] = {}
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
            kept[name] = int(value) if name in _COUNTS else value  # the library takes no 1.0
    narrower = _NARROWER.get(str(kept.get("format")), ())
    if narrower:
        kept["allOf"] = [*kept.get("allOf", ()), *({"pattern": pattern} for pattern in narrower)]
    return kept


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _check_reach(schema: _Schema) -> None:
    """Raise ValueError for a schema that only an endless text would meet, such as an object that needs itself."""
    references = set(_references(schema))
    if not references:
        return
    if len(references) > _MOST_TARGETS:
        raise ValueError(f"found {len(references)} references, expected at most {_MOST_TARGETS}; send a smaller schema")
    if not _Reach(schema).can_be_met():
        raise ValueError("found a schema that needs itself without end, so that no finite answer meets it")


def _references(schema: _Schema) -> Iterator[str]:
    return (one["$ref"] for one in _schemas(schema) if isinstance(one.get("$ref"), str))


def _schemas(schema: _Schema) -> Iterator[dict[str, Any]]:
    """A schema and those in it, but for true and false."""
    if isinstance(schema, dict):
        yield schema
        for one in _parts(schema):
            yield from _schemas(one)


def _parts(schema: Mapping[str, Any]) -> Iterator[_Schema]:
    for name, value in schema.items():
        if name in _OF_MANY:
            yield from value.values()
        elif name in _OF_LIST | _OF_ONE:
            yield from value if isinstance(value, list) else [value]


def _check_patterns(schema: _Schema) -> None:
    """Raise ValueError where a value may have to meet very many patterns together: those that allOf leads to, or a
    reference beside other keywords."""
    waiting = [part for one in _schemas(schema) for part in _joined(one)]
    seen: set[int] = set()
    patterns: set[str] = set()
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict) and id(part) not in seen:
            seen.add(id(part))
            patterns.update(part[name] for name in ("pattern", "format") if name in part)
            waiting += _parts(part)
            waiting += [_target(schema, part["$ref"])] if "$ref" in part else []
    if len(patterns) > _MOST_TOGETHER:
        raise ValueError(
            f"found {len(patterns)} patterns and formats that allOf or references beside other keywords join, expected "
            f"at most {_MOST_TOGETHER}; send fewer"
        )
    searching = sum(1 for pattern in patterns if _searches(pattern))
    if searching > _MOST_SEARCHING:
        raise ValueError(
            f"found {searching} patterns that may match at many places and that allOf or references beside other "
            f"keywords join, expected at most {_MOST_SEARCHING}; send fewer, or write ^ and the whole text"
        )


def _searches(pattern: str) -> bool:
    """Whether a pattern may match in many places of a text. Each that is joined with others doubles the states."""
    return not pattern.startswith("^") or any(sign in pattern for sign in _REPEATS)


def _check_sizes(schema: _Schema) -> None:
    """Raise ValueError for steps and patterns of names that the library takes minutes, or all memory, to compile."""
    names = sum(len(one.get("patternProperties", ())) for one in _schemas(schema))
    if names > _MOST_NAME_PATTERNS:
        raise ValueError(f"found {names} patternProperties, expected at most {_MOST_NAME_PATTERNS}; send fewer")
    steps = {_step(one["multipleOf"]) for one in _schemas(schema) if "multipleOf" in one}
    if sum(steps) > _MOST_STEPS:
        raise ValueError(
            f"found multipleOf whose digits add up to {sum(steps)}, powers of ten left aside, expected at most "
            f"{_MOST_STEPS}; send smaller ones"
        )


def _step(value: float) -> int:
    """The digits of a number as a whole number, 0 for a power of ten. The library has a state for each remainder."""
    _, digits, exponent = Decimal(str(value)).as_tuple()
    step = int("".join(map(str, digits)).lstrip("0")) * 10 ** max(0, int(exponent))
    return 0 if str(step).rstrip("0") == "1" else step


def _joined(schema: Mapping[str, Any]) -> list[_Schema]:
    """The schemas that a value must meet together."""
    beside = "$ref" in schema and not schema.keys() <= _NOTES | {"$ref", "$defs", "definitions"}
    return [*_list(schema, "allOf"), *([schema] if beside else [])]


def _target(schema: _Schema, pointer: str) -> _Schema:
    """The schema at a reference within the schema. Those that lead nowhere are left to the library, which refuses them.
    Raises ValueError for one that leads to something else, which nobody has checked."""
    if pointer != "#" and not pointer.startswith("#/"):
        return True
    found, is_schema, holds = schema, True, False  # holds: it has schemas by name or number
    for part in unquote(pointer[1:]).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and name in found:
            found, is_schema = found[name], holds or name in _OF_ONE
            holds = not holds and (name in _OF_MANY or (name in _OF_LIST | _OF_ONE and isinstance(found, list)))
        elif isinstance(found, list) and holds and name in map(str, range(len(found))):
            found, is_schema, holds = found[int(name)], True, False
        else:
            return True
        if not (is_schema or holds):
            break
    if holds or not is_schema:
        raise ValueError(f"found the reference {_shown(pointer)}, which leads to no schema; mend or leave it out")
    return found


class _Reach:
    """Whether some finite value may meet a schema, as far as references and what objects and arrays need decide it."""

    def __init__(self, schema: _Schema) -> None:
        self._schema, self._needs = schema, Needs()
        self._parts: dict[int, int] = {}  # by the identity of a schema
        self._waiting = [schema]  # schemas whose needs are not known yet

    def can_be_met(self) -> bool:
        part = self._part(self._schema)
        while self._waiting:
            one = self._waiting.pop()
            self._needs.define(self._part(one), self._needs.all_of(self._needed(one)))
        return self._needs.can_be_met(part)

    def _part(self, schema: _Schema) -> int:
        if not isinstance(schema, dict):
            return self._needs.any_of([]) if schema is False else self._needs.all_of([])
        if id(schema) not in self._parts:
            self._parts[id(schema)] = self._needs.later()
            self._waiting.append(schema)
        return self._parts[id(schema)]

    def _needed(self, schema: Mapping[str, Any]) -> list[int]:
        """What a value that meets a schema meets, too."""
        parts = [self._part(one) for one in _list(schema, "allOf")]
        if isinstance(schema.get("$ref"), str):
            parts.append(self._part(_target(self._schema, schema["$ref"])))
        for name in ("anyOf", "oneOf"):
            if name in schema:
                parts.append(self._needs.any_of([self._part(one) for one in _list(schema, name)]))
        kinds = schema.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        return [*parts, self._needs.any_of([self._needs.all_of(self._of_kind(schema, kind)) for kind in kinds])]

    def _of_kind(self, schema: Mapping[str, Any], kind: str | None) -> list[int]:
        """What an object or an array needs; other values need nothing."""
        if kind == "object":
            properties = schema.get("properties", {})
            return [self._part(properties.get(name, True)) for name in _list(schema, "required")]
        least = schema.get("minItems", 0)
        if kind != "array" or not least:
            return []
        items = schema.get("items", True)
        firsts = items if isinstance(items, list) else _list(schema, "prefixItems")
        others = schema.get("additionalItems", True) if isinstance(items, list) else items
        return [self._part(one) for one in (firsts[:least] if least <= len(firsts) else [*firsts, others])]


def _list(schema: Mapping[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []
