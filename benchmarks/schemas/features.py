"""Keywords of JSON Schema with a text that is valid and one that is not, and schemas that no server should serve."""

from __future__ import annotations

import json
from typing import Any

# Keyword: schema, a valid value, an invalid value.
FEATURES: dict[str, tuple[Any, Any, Any]] = {
    "type": ({"type": "integer"}, 5, "5"),
    "type, several": ({"type": ["integer", "null"]}, None, "5"),
    "const": ({"const": {"a": [1]}}, {"a": [1]}, {"a": [2]}),
    "enum": ({"enum": ["a", 1]}, 1, 2),
    "properties": ({"type": "object", "properties": {"a": {"type": "null"}}}, {"a": None}, {"a": 1}),
    "required": ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, {"a": 1}, {}),
    "additionalProperties false": (
        {"type": "object", "properties": {"a": {}}, "additionalProperties": False},
        {},
        {"b": 1},
    ),
    "additionalProperties schema": (
        {"type": "object", "additionalProperties": {"type": "null"}},
        {"b": None},
        {"b": 1},
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^a+$": {"type": "null"}}, "additionalProperties": False},
        {"aa": None},
        {"b": None},
    ),
    "minProperties": ({"type": "object", "minProperties": 1}, {"a": 1}, {}),
    "maxProperties": ({"type": "object", "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 1}),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^a+$"}}, {"aa": 1}, {"b": 1}),
    "dependentRequired": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
        {"a": 1, "b": 1},
        {"a": 1},
    ),
    "items": ({"type": "array", "items": {"type": "null"}}, [None], [1]),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "null"}], "items": False}, [None], [None, 1]),
    "minItems": ({"type": "array", "minItems": 2}, [1, 2], [1]),
    "maxItems": ({"type": "array", "maxItems": 1}, [1], [1, 2]),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, [1, 2], [1, 1]),
    "contains": ({"type": "array", "contains": {"const": 1}}, [2, 1], [2]),
    "minLength": ({"type": "string", "minLength": 2}, "é語", "a"),
    "maxLength": ({"type": "string", "maxLength": 2}, "é語", "abc"),
    "pattern": ({"type": "string", "pattern": "^a+b$"}, "aab", "ba"),
    "pattern, unanchored": ({"type": "string", "pattern": "b"}, "abc", "ac"),
    "pattern with maxLength": ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "aaa", "aaaa"),
    "format date": ({"type": "string", "format": "date"}, "2024-02-29", "2024-2-1"),
    "format date-time": ({"type": "string", "format": "date-time"}, "2024-02-29T10:00:00Z", "2024-02-29 10"),
    "format email": ({"type": "string", "format": "email"}, "a@b.org", "a.b.org"),
    "format uuid": ({"type": "string", "format": "uuid"}, "123e4567-e89b-12d3-a456-426614174000", "123e4567"),
    "format ipv4": ({"type": "string", "format": "ipv4"}, "10.0.0.255", "10.0.0.256"),
    "format uri": ({"type": "string", "format": "uri"}, "https://a.org/b", "a b"),
    "minimum": ({"type": "integer", "minimum": 10}, 10, 9),
    "maximum": ({"type": "integer", "maximum": 10}, -3, 11),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 10}, 11, 10),
    "minimum of a number": ({"type": "number", "minimum": 0.5}, 0.75, 0.25),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, 49, 50),
    "anyOf": ({"anyOf": [{"type": "null"}, {"type": "string"}]}, "a", 1),
    "oneOf, apart": ({"oneOf": [{"type": "null"}, {"type": "string"}]}, "a", 1),
    "oneOf, overlapping": ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 10}]}, 3, 12),
    "allOf": ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, 3, 2),
    "$ref": ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}, None, 1),
    "$ref to itself": ({"type": "array", "items": {"$ref": "#"}}, [[], [[]]], [1]),
    "not": ({"type": "integer", "not": {"const": 3}}, 4, 3),
    "if, then": ({"type": "integer", "if": {"minimum": 5}, "then": {"minimum": 8}}, 4, 6),
    "unevaluatedProperties": (
        {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False},
        {"a": 1},
        {"b": 1},
    ),
    "no keyword": ({}, {"a": [1, None]}, float("nan")),
}

_CHAIN = {f"d{place}": {"anyOf": [{"$ref": f"#/$defs/d{place + 1}"}] * 2} for place in range(24)}
# What a server gets from clients that err, or mean harm.
BAD: dict[str, str] = {
    "no JSON": '{"type":',
    "not a schema": "[]",
    "unknown type": '{"type": "strng"}',
    "a slip in a keyword": '{"type": "object", "propertys": {"a": {"type": "null"}}}',
    "a reference to nothing": '{"$ref": "#/$defs/nothing"}',
    "a reference to a server": '{"$ref": "https://example.org/schema.json"}',
    "a reference to itself": '{"$ref": "#"}',
    "needs itself without end": '{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}',
    "minimum above maximum": '{"type": "integer", "minimum": 3, "maximum": 1}',
    "an empty enum": '{"enum": []}',
    "false": "false",
    "a pattern that is none": '{"type": "string", "pattern": "(a"}',
    "a pattern with look-ahead": '{"type": "string", "pattern": "^(?!a)b$"}',
    "an exploding pattern": '{"type": "string", "pattern": "^(.*a){40}.{200}$"}',
    "a long repetition": '{"type": "string", "pattern": "^(a{1000}){1000}$"}',
    "strings of 100,000 and more": '{"type": "string", "pattern": "^a+$", "minLength": 100000, "maxLength": 200000}',
    "arrays of 100,000 and more": '{"type": "array", "items": {}, "minItems": 100000, "maxItems": 200000}',
    "2 to the 24th ways": json.dumps({"$ref": "#/$defs/d0", "$defs": {**_CHAIN, "d24": {"type": "null"}}}),
    "arrays 500 deep": '{"type": "array", "items": ' * 500 + "{}" + "}" * 500,
    "5,000 properties": json.dumps(
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(5000)}}
    ),
}
