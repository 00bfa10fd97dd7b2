"""What is said of schemas that are malformed, use what is not served, or cannot be met."""

from __future__ import annotations

import json
import sys
from datetime import date, timedelta

import pytest

from triton_repo.errors import RequestError
from triton_repo.runtime.guided.guides import Guides
from triton_repo.runtime.guided.schema import check_schema

TREE = {
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {"left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
            "required": ["left"],
        }
    },
    "$ref": "#/$defs/tree",
}
# Each reference leads to one that has a pattern of its own beside it.
CHAIN = {
    "$defs": {f"a{n}": {"pattern": f"{n}", "$ref": f"#/$defs/a{n + 1}"} for n in range(60)} | {"a60": {}},
    "$ref": "#/$defs/a0",
}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "found no JSON .*, expected a JSON schema"),
        ("NaN", "found NaN, expected JSON"),
        ("[]", r"found \[\] at #, expected a schema"),
        ('{"items": 3}', "found 3 at #/items, expected a schema"),
        ('{"properties": {"a/b": {"not": {}}}}', "found the keyword 'not' at #/properties/a~1b, which is not served"),
        ('{"uniqueItems": true}', "found the keyword 'uniqueItems' at #, which is not served"),
        ('{"anyOf": [{}, {"propertys": {}}]}', "found the keyword 'propertys' at #/anyOf/1, which JSON"),
        ('{"type": "strng"}', 'found "strng" at #/type, expected one or several of array, boolean'),
        ('{"type": []}', r"found \[\] at #/type"),
        ('{"enum": []}', r"found \[\] at #/enum, expected a list of values"),
        ('{"type": "object", "minItems": "a"}', 'found "a" at #/minItems, expected a whole number of 0 or more'),
        ('{"items": {"maxLength": true}}', "found true at #/items/maxLength, expected a whole number"),
        ('{"minimum": "3"}', 'found "3" at #/minimum, expected a number'),
        ('{"maxLength": 1e999}', "found Infinity at #/maxLength, expected a whole number"),
        ('{"multipleOf": 0}', "found 0 at #/multipleOf, expected a number above 0"),
        ('{"required": "a"}', 'found "a" at #/required, expected a list of names'),
        ('{"pattern": 3}', "found 3 at #/pattern, expected a text"),
        ('{"properties": []}', r"found \[\] at #/properties, expected an object of schemas"),
        ('{"anyOf": {}}', "found {} at #/anyOf, expected a list of schemas"),
        ("false", "no value meets the schema false"),
        ('{"type": "integer", "minimum": 3, "maximum": 1}', r"no value meets the schema, since minimum \(3\)"),
        ('{"required": ["a"], "additionalProperties": false, "type": "object"}', "'a' can have no value"),
        ('{"$ref": "#/$defs/a"}', r"found the reference '#/\$defs/a', which leads to nothing"),
        ('{"$ref": "https://example.org/s"}', "example.org"),
        ('{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf of schemas that one value may meet together"),
        ('{"type": "string", "pattern": "a(?=b)"}', "look-ahead"),
        ('{"type": "string", "format": "colour"}', "found the format .colour., expected date, "),
        ('{"$ref": "#"}', "needs itself without end"),
        ('{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}', "needs itself without end"),
        ('{"type": "array", "items": {"$ref": "#"}, "minItems": 1}', "needs itself without end"),
        ('{"allOf": [{"$ref": "#"}, {}]}', "needs itself without end"),
        ('{"items":' * 300 + "{}" + "}" * 300, "schemas of more than 60 levels"),
        ('{"items":' * 9000 + "{}" + "}" * 9000, "too many levels"),
        ('{"const":' + "[" * 900 + "]" * 900 + "}", "JSON of more than 120 levels"),
        ('{"maxItems": 1' + "0" * 400 + "}", "a number of 401 digits, expected at most 300"),
        ('{"minimum": 1' + "0" * 5000 + "}", "a number of 5001 digits, expected at most 300"),
        ('{"enum": [1e999]}', "found a number beyond 1.7e308"),
        (r'{"type": "\ud800"}', "found half of a pair"),
        ('{"$ref": "#/default", "default": {"$ref": "#/title"}}', 'reference "#/default", which leads to no schema'),
        ('{"$ref": "#/default", "default": {"type": "object", "required": [["a"]]}}', "leads to no schema"),
        ('{"$ref": "#/enum/0", "enum": [{"$ref": "#/enum/0"}]}', 'the reference "#/enum/0", which leads to no schema'),
        ('{"properties": {"a": {}}, "$ref": "#/properties"}', "leads to no schema"),
        ('{"prefixItems": [{"$ref": "#/prefixItems/\u00b2"}]}', "unexpected character at index 14"),
        ('{"type": "array", "items": {"$ref": "#"}, "minItems": 1.0}', "needs itself without end"),
        (json.dumps({"allOf": [{"pattern": f"{n}"} for n in range(51)]}), "found 51 patterns and formats that allOf"),
        ('{"multipleOf": 9999991}', "multipleOf whose digits add up to 9999991, .* expected at most 100000"),
        ('{"items": {"multipleOf": 6.0001}, "prefixItems": [{"multipleOf": 40001}]}', "add up to 100002"),
        (json.dumps({"patternProperties": {f"^a{n}$": {} for n in range(101)}}), "found 101 patternProperties"),
        (json.dumps(CHAIN), "found 60 patterns and formats that allOf"),
    ],
)  # fmt: skip
def test_a_schema_is_refused_with_one_clear_error(byte_fallback, text, said):
    with pytest.raises(RequestError, match=said) as caught:
        Guides(byte_fallback).compile("json_schema", text)
    assert str(caught.value).count("guided_decoding_guide: ") == 1
    assert "\n" not in str(caught.value).partition("guided_decoding_guide: ")[2]


@pytest.mark.parametrize(
    "schema",
    [
        TREE,
        {"type": "array", "items": {"$ref": "#"}},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 0, "maxItems": 2},
        {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
        {"anyOf": [{"type": "null"}, {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}]},
        {"title": "t", "description": "d", "examples": [1], "x-order": 3, "default": None, "$comment": "c"},
        {"items": [{"type": "null"}], "additionalItems": False},
        {"type": "array", "minItems": 1.0, "maxItems": 2.0},
        {"anyOf": [{"multipleOf": step} for step in (86400, 1e-5, 1000000000, 0.25, 97, 97)]},
        {"properties": {f"a{n}": {"pattern": f"{n}"} for n in range(60)}, "allOf": [{"minLength": 1}]},
        {"properties": {"properties": {"properties": {"items": {"$ref": "#/properties/properties"}}}}},
        {"type": "array", "prefixItems": [{}, {"anyOf": [{"$ref": "#/prefixItems/0"}]}]},
        True,
    ],
    ids=str,
)  # fmt: skip
def test_a_schema_that_can_be_met_is_compiled(byte_fallback, schema):
    Guides(byte_fallback).compile("json_schema", json.dumps(schema))


def test_dates_are_those_that_exist(byte_fallback):
    compiled = Guides(byte_fallback).compile(
        "json_schema", '{"properties": {"d": {"type": ["string", "null"], "format": "date"}}, "required": ["d"]}'
    )
    days = [date(2023, 1, 1) + timedelta(days=day) for day in range(0, 800)]
    odd = ["1900-02-29", "2000-02-29", "2023-02-29", "2023-02-30", "2023-04-31", "0000-01-01", "0004-02-29"]
    for text in [*map(str, days), *odd]:
        tokens = [2 + byte for byte in f'{{"d":"{text}"'.encode()]
        try:
            exists = bool(date.fromisoformat(text))
        except ValueError:
            exists = False
        assert (compiled.start(()).num_taken(tokens) == len(tokens)) == exists, text


def test_extensions_are_left_out_and_properties_of_such_names_are_not():
    schema = {"x-guidance": {"lenient": True}, "properties": {"x-a": {"x-b": 1, "type": "null"}}}
    assert check_schema(json.dumps(schema)) == {"properties": {"x-a": {"type": "null"}}}


def test_patterns_that_search_are_bounded_where_they_are_joined():
    """Each that is joined with others doubles time and memory: 17 take 6 s and 280 MB."""

    def joined(count: int) -> str:
        return json.dumps({"type": "string", "allOf": [{"pattern": f"{letter}.*"} for letter in "abcdefghijk"[:count]]})

    check_schema(joined(10))
    with pytest.raises(ValueError, match="found 11 patterns that may match at many places"):
        check_schema(joined(11))
    check_schema(json.dumps({"anyOf": [{"pattern": f"{number}.*"} for number in range(40)]}))


def test_the_work_for_references_grows_with_the_schema():
    """A chain of references, the last of which a schema of many parts needs, which others name at each of its levels:
    looked at anew whenever something was found, these parts are looked at a hundred million times."""
    length, levels = 300, 50
    last: dict = {"allOf": [{}] * 9000 + [{"$ref": "#/$defs/a0"}]}
    named = ["#/$defs/deep" + "/allOf/0" * level for level in range(levels)]
    chain = {f"a{number}": {"$ref": f"#/$defs/a{number + 1}"} for number in range(length)}
    deep = last
    for _ in range(levels):
        deep = {"allOf": [deep]}
    ends = {**chain, f"a{length}": {"type": "null"}, "deep": deep}
    schema = {"$defs": ends, "anyOf": [{"$ref": pointer} for pointer in named]}
    calls = _calls_of(lambda: check_schema(json.dumps(schema)))
    assert calls < 60 * len(json.dumps(schema))


def _calls_of(action) -> int:
    """How many functions of Python an action calls."""
    count = 0

    def profile(_frame, event, _argument):
        nonlocal count
        count += event == "call"
        if count > 10_000_000:
            raise AssertionError("more than ten million calls")

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count
