"""Guides that were changed at random: each is compiled, or refused with one RequestError, and followed or failed."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter

import jsonschema
import numpy as np
import pytest

from schemas.random_schemas import random_schema
from triton_repo.errors import RequestError
from triton_repo.runtime.guided.guides import Guides
from triton_repo.runtime.guided.vocabulary import token_bytes

REGEXES = (r"[a-z]+(\\d{2,3}|é)*", r"(a|b)?[^x-z\\]]{1,9}\\.", r"\\p{L}+\\s?\\w", "(?i)x|y", "a{3}(b(c(d)+)?)*")
GRAMMARS = (
    'root ::= "[" (item ("," item)*)? "]"\nitem ::= [0-9]+ | root # x\n', 'root ::= [^"\\n]* "\\u00e9"{2,4} .',
    'root ::= a | "(" root ")"\na ::= ("x" | "")+',
)  # fmt: skip
# Keywords with values that fit them, most of which say something else than the schema that they are put into.
KEYWORDS = {
    "type": ("string", "integer", "object", "array", ["null", "string"], ["object", "number"]),
    "enum": ([1, "a"], [[], {}, None]), "const": (1, "ab", [1], {"a": 2}), "minimum": (-1, 3, 0.5), "maximum": (7, 1e3),
    "exclusiveMinimum": (2,), "multipleOf": (3, 0.5), "minLength": (1, 4), "maxLength": (0, 2, 9), "minItems": (1, 2),
    "maxItems": (0, 2), "minProperties": (1,), "maxProperties": (0, 1), "pattern": ("a+", "^b{2}$", "[0-9]"),
    "format": ("date", "uuid", "ipv4"), "required": (["a"], ["id", "name"], []),
    "items": (False, {"type": "null"}),
    "prefixItems": ([{}, {"const": 1}],), "properties": ({"a": {"type": "integer"}}, {"id": False}),
    "additionalProperties": (True, False, {"type": "boolean"}), "anyOf": ([{"type": "null"}, {"minLength": 2}],),
    "allOf": ([{"maxLength": 5}, {"maximum": 9}],), "oneOf": ([{"type": "string"}, {"type": "integer"}],),
    "$ref": ("#", "#/properties/id", "#/$defs/entry0"), "title": ("t",),
}  # fmt: skip
LETTERS = "(){}[]|*+?\\\"'^$.:,-0123 abé\n#=/<>&~\x00\ud7ff"


def changed(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(text) + 1)
        cut = rng.choice([0, 0, 1, 2, 9])
        added = "".join(rng.choices(LETTERS, k=rng.choice([0, 1, 1, 3])))
        text = text[:place] + added * rng.choice([1, 1, 1, 40]) + text[place + cut :]
    return text


def changed_schema(schema: dict, rng: random.Random) -> str:
    """A schema with other keywords put into it or into schemas in it."""
    inner = [schema]
    for one in inner:
        inner += [value for value in (one.values() if isinstance(one, dict) else one) if isinstance(value, dict | list)]
    for _ in range(rng.randint(1, 3)):
        place = rng.choice([one for one in inner if isinstance(one, dict) and one.keys() & KEYWORDS.keys()])
        name = rng.choice(list(KEYWORDS))
        place[name] = rng.choice(KEYWORDS[name])
    return json.dumps(schema)


def follow(guides: Guides, guide_type: str, text: str, seed: int) -> bool:
    """Whether a guide was compiled and followed for some tokens."""
    rng = np.random.default_rng(seed)
    try:
        guide = guides.compile(guide_type, text).start((1,))
        for _ in range(12):
            guide.take(int(rng.choice(np.flatnonzero(guide.allowed()))))
            if guide.is_complete:
                break
    except RequestError as error:
        return not str(error)
    return True


def test_an_answer_by_a_schema_that_was_changed_at_random_is_valid(byte_fallback):
    """So that each keyword is kept beside each other one, or refused."""
    guides, texts, found = Guides(byte_fallback), token_bytes(byte_fallback), Counter()
    for number in range(250):
        rng = random.Random(number)
        schema = json.loads(changed_schema(random_schema(rng).json, rng))
        try:
            guide, text = guides.compile("json_schema", json.dumps(schema)).start((1,)), b""
            while not guide.is_complete and len(text) < 300:
                token = 1 if guide.allowed()[1] else rng.choice(np.flatnonzero(guide.allowed()).tolist())
                guide.take(token)
                text += texts[token]
        except RequestError:
            found["refused"] += 1
            continue
        if guide.is_complete:
            jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
            found["valid"] += 1
    assert found["valid"] > 120, found


@pytest.mark.parametrize("guide_type", ["json_schema", "regex", "ebnf_grammar"])
def test_what_is_changed_at_random_is_followed_or_refused(byte_fallback, guide_type):
    guides, followed = Guides(byte_fallback), 0
    for number in range(150):
        rng = random.Random(number)
        if guide_type == "json_schema":
            schema = random_schema(rng).json
            text = changed_schema(schema, rng) if number % 3 else changed(json.dumps(schema), rng)
        else:
            text = changed(rng.choice(REGEXES if guide_type == "regex" else GRAMMARS), rng)
        followed += follow(guides, guide_type, text, number)
    assert 10 < followed < 150


def test_what_is_deep_or_long_is_followed_or_refused(byte_fallback):
    guides = Guides(byte_fallback)
    thrice = "".join(f"\nr{n} ::= r{n + 1} r{n + 1} r{n + 1}" for n in range(30))
    chain = "".join(f"\nr{n} ::= r{n + 1}" for n in range(2000))
    for guide_type, text in [
        ("regex", "(" * 4000 + "a" + ")" * 4000), ("regex", "a" * 60_000), ("regex", "|".join(["ab"] * 2000)),
        ("regex", "[" * 8000), ("regex", "(a*)*" * 1500), ("regex", "a{9}" * 2000),
        ("ebnf_grammar", "root ::= " + "(" * 30_000), ("ebnf_grammar", 'root ::= "a"' + "?" * 30_000),
        ("ebnf_grammar", f'root ::= r0{thrice}\nr30 ::= "a"'), ("ebnf_grammar", f'root ::= r0{chain}\nr2000 ::= "a"'),
        ("json_schema", json.dumps({"enum": [str(n) for n in range(6000)]})),
        ("json_schema", json.dumps({"anyOf": [{"const": n} for n in range(3000)]})),
        ("json_schema", json.dumps({"properties": {str(n): {"$ref": "#"} for n in range(1000)}})),
        ("json_schema", json.dumps({"pattern": "a" * 9000})),
    ]:  # fmt: skip
        follow(guides, guide_type, text, 1)


def test_a_panic_of_the_library_is_the_requests_error(byte_fallback, monkeypatch):
    class PanicException(BaseException):
        pass

    def panic(*_words, **_more):
        raise PanicException("index out of bounds")

    guides = Guides(byte_fallback)
    guides.compile("regex", "a")
    monkeypatch.setattr(
        sys.modules["llguidance"], "LLMatcher", type("M", (), {"__new__": panic, "grammar_from_regex": str})
    )
    with pytest.raises(RequestError, match="the library failed \\(index out of bounds\\)"):
        guides.compile("regex", "b")
