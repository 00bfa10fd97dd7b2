"""Whatever is wrong with a guide is said in our own words: what was found or cannot be, and what to do."""

from __future__ import annotations

import json
import re

import pytest

from triton_repo.errors import RequestError
from triton_repo.runtime.guided.guides import Guides

# Words that only the library and the crates below it use.
THEIRS = re.compile(r"regex parse error|in regex|start: /|Unsatisfiable|SearchRegex|Pointer '|registry|lookarounds")
BAD: tuple[tuple[str, object, str], ...] = (
    ("regex", "(", "found the regular expression '(', expected one of Rust's regex: unclosed group; mend it"),
    ("regex", "a{5,2}", "invalid repetition count range"),
    ("regex", "(?=a)b", "look-around, including look-ahead and look-behind, is not supported; mend it"),
    ("regex", "^a$b", "found $ within a regular expression, expected ^ and $ at its ends alone"),
    ("regex", r"\bword", r"found \b within a regular expression"),
    ("regex", "[^\\x00-\\U0010FFFF]", "no text begins as it demands; send one that can be met"),
    ("json_schema", {"pattern": "("}, "found the regular expression '(', expected one of Rust's regex"),
    ("json_schema", {"patternProperties": {"[": {}}}, "found the regular expression '['"),
    ("json_schema", {"const": 1, "type": "string"}, "since its parts ask for different types; send one that can"),
    ("json_schema", {"type": "array", "minItems": 3, "maxItems": 1}, "minItems (3) is greater than maxItems (1);"),
    ("json_schema", {"anyOf": []}, "since anyOf has no schema; send one that can be met"),
    ("json_schema", {"type": "string", "pattern": "^a", "maxLength": 0}, "since no text meets its patterns,"),
    ("json_schema", {"type": "object", "required": ["a"], "properties": {"a": False}}, "'a' can have no value;"),
    ("json_schema", {"$ref": "http://x/y"}, "found the reference 'http://x/y', expected one within the schema"),
    ("json_schema", {"type": "number", "minimum": 1e308}, "found limits of a number that are too far apart"),
    ("json_schema", {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefg"]}, "too much to"),
)  # fmt: skip


def test_errors_of_guides_are_one_sentence_in_our_form(byte_fallback):
    guides = Guides(byte_fallback)
    for guide_type, guide, expected in BAD:
        with pytest.raises(RequestError) as caught:
            guides.compile(guide_type, guide if isinstance(guide, str) else json.dumps(guide))
        said = str(caught.value)
        assert said.startswith("reading the request:\n  - guided_decoding_guide: "), said
        assert expected in said
        assert not THEIRS.search(said), said
        assert said.count("\n") == 1
