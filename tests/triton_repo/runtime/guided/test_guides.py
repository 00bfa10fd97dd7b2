"""Masks worked by hand, the cache of compiled grammars, and grammars that take too much."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from triton_repo.contracts.wire import MOST_GUIDE_BYTES
from triton_repo.errors import RequestError
from triton_repo.runtime.guided import guides as module
from triton_repo.runtime.guided.guides import Guides

END = 1  # of byte_fallback


@pytest.fixture(scope="module")
def of_bytes(byte_fallback):
    return Guides(byte_fallback)


def byte(letter: str) -> int:
    return 2 + ord(letter)


def ids(guide) -> set[int]:
    return set(np.flatnonzero(guide.allowed()).tolist())


def test_masks_worked_by_hand(of_bytes):
    """Ids of byte_fallback: 1 ends, 2 to 257 are bytes, then "▁", "▁a", "a", "b", "▁b", "é"."""
    guide = of_bytes.compile("regex", "( ?a|b)+é?").start((END,))
    assert ids(guide) == {byte(" "), byte("a"), byte("b"), 258, 259, 260, 261}
    guide.take(258)
    assert ids(guide) == {260}  # behind a space only an a, in the tokenizer's spelling
    guide.take(260)
    assert ids(guide) == {byte(" "), byte("a"), byte("b"), 258, 259, 260, 261, 263, 2 + 0xC3, END}
    guide.take(2 + 0xC3)
    assert ids(guide) == {2 + 0xA9}  # the other half of the é
    assert not guide.is_complete
    guide.take(2 + 0xA9)
    assert guide.is_complete


def test_end_tokens_come_where_the_text_may_end_and_special_tokens_never(byte_level):
    ends = (byte_level.eos_token_id, byte_level.encode("q")[0])
    guide = Guides(byte_level).compile("regex", "[a-z]{2,3}").start(ends)
    allowed = guide.allowed()
    assert not allowed[ends[0]]
    assert not allowed[ends[1]]  # a letter that ends this request's answers is no part of them
    for letter in "ab":
        guide.take(byte_level.encode(letter)[0])
    assert guide.allowed()[list(ends)].all()
    assert guide.allowed().sum() > 2
    guide.take(ends[1])
    assert guide.is_complete


def test_a_guide_counts_the_tokens_that_it_would_take(of_bytes):
    guide = of_bytes.compile("regex", "ab+ a").start((END,))
    assert guide.num_taken([260, 261, 261, 259]) == 4
    assert guide.num_taken([260, 261, 260]) == 2
    assert guide.num_taken([261]) == 0
    assert ids(guide) == {260}  # it has moved nothing


def test_sequences_of_one_grammar_move_alone(of_bytes):
    compiled = of_bytes.compile("regex", "a(b| a)+")
    one, other = compiled.start((END,)), compiled.start(())
    one.take(260)
    assert 260 in ids(other)
    assert ids(one) == {byte(" "), byte("b"), 258, 259, 261}
    one.take(261)
    assert END in ids(one)
    other.take(260)
    other.take(261)
    assert END not in ids(other)  # a request may have no end token


def test_compiled_grammars_are_kept_up_to_a_number(byte_fallback):
    guides = Guides(byte_fallback, most=2)
    first = guides.compile("regex", "a")
    assert guides.compile("regex", "b") is not first
    assert guides.compile("regex", "a") is first  # and is the latest
    guides.compile("ebnf_grammar", 'root ::= "a"')
    assert len(guides) == 2
    assert guides.compile("regex", "a") is first


def test_a_grammar_that_failed_is_compiled_again(byte_fallback):
    guides, explodes = (
        Guides(byte_fallback),
        '{"type": "string", "pattern": "^a+$", "minLength": 90000, "maxLength": 99999}',
    )
    first = guides.compile("json_schema", explodes)

    def follow(guide):
        for _ in range(3):
            guide.take(min(ids(guide)))

    with pytest.raises(RequestError, match="the guide cannot be followed further: it takes too much"):
        follow(first.start((END,)))
    assert guides.compile("json_schema", explodes) is not first
    assert len(guides) == 1


def test_without_the_library_guided_requests_are_refused_and_others_are_not(byte_fallback, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    guides = Guides(byte_fallback)
    with pytest.raises(RequestError, match=r"needs the package llguidance.*install moeship\[cpu\]"):
        guides.compile("regex", "a")


def test_a_mask_that_takes_too_long_ends_its_request_alone(of_bytes, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_MASK_S", 0.05)
    compiled, waits = of_bytes.compile("regex", "[ab]+"), threading.Event()
    slow, other = compiled.start((END,)), compiled.start((END,))
    mask = slow._mask
    monkeypatch.setattr(slow, "_mask", lambda: (waits.wait(30), mask())[1])
    slow.take(260)
    with pytest.raises(RequestError, match="the guide takes more than 0.05 s for a token"):
        slow.allowed()
    waits.set()
    other.take(261)
    monkeypatch.setattr(module, "LONGEST_MASK_S", 30)
    assert 260 in ids(other)


@pytest.mark.parametrize(
    ("guide_type", "guide"),
    [
        ("regex", "(.*a){40}.{200}"),
        ("regex", "(a{1000}){1000}"),
        ("regex", "[xy](a{1000}){1000}"),
        ("regex", "(a?){5000}a{5000}"),
        ("json_schema", '{"type": "string", "pattern": "^(.*a){40}.{200}$"}'),
        ("json_schema", '{"type": "string", "pattern": "^a+$", "minLength": 100000, "maxLength": 200000}'),
        ("ebnf_grammar", 'root ::= (("a"? | root){0,900}){0,900} "b"'),
    ],
)  # fmt: skip
def test_a_grammar_that_explodes_is_refused_or_fails_with_one_error(of_bytes, guide_type, guide):
    said = ""
    try:
        followed = of_bytes.compile(guide_type, guide).start((END,))
        for _ in range(20):
            followed.take(min(ids(followed)))
    except RequestError as error:
        said = str(error)
    assert not said or ("guide" in said and "<state>" not in said)


def _deep_grammar() -> str:
    return "\n".join(['root ::= r0 | "b" root', *(f"r{n} ::= r{n + 1}" for n in range(4200)), 'r4200 ::= "a"'])


def _deep_schema() -> str:
    levels = {f"a{n}": '{"items":' * 10 + f'{{"$ref":"#/$defs/a{n + 1}"}}' + "}" * 10 for n in range(490)}
    chain = ",".join(f'"{name}":{one}' for name, one in levels.items())
    return '{"$defs":{' + chain + ',"a490":{"type":"null"}},"$ref":"#/$defs/a0"}'


@pytest.mark.parametrize(
    ("guide_type", "guide"),
    [("ebnf_grammar", _deep_grammar()), ("json_schema", _deep_schema())],
    ids=["grammar", "schema"],
)
def test_what_lies_deep_within_each_other_does_not_end_the_process(of_bytes, guide_type, guide):
    """On a stack of 8 MB the library's recursion ends it."""
    assert len(guide) < MOST_GUIDE_BYTES
    before = threading.stack_size()
    followed = of_bytes.compile(guide_type, guide).start((END,))
    for _ in range(20):
        if followed.is_complete:
            break
        followed.take(int(np.flatnonzero(followed.allowed())[-1]))
    assert threading.stack_size() == before


def test_errors_of_compiling_reach_the_one_who_asked(of_bytes, monkeypatch):
    monkeypatch.setattr(module, "grammar_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        of_bytes.compile("regex", "not compiled before")
