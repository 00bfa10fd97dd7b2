"""Grammars: which texts they take, against Python's re and recognisers written out."""

from __future__ import annotations

import itertools
import re
import tracemalloc

import pytest

from triton_repo.errors import RequestError
from triton_repo.runtime.guided.ebnf import lark_of
from triton_repo.runtime.guided.grammars import without_anchors
from triton_repo.runtime.guided.guides import Guides


@pytest.fixture(scope="module")
def guides(byte_fallback):
    return Guides(byte_fallback)


def takes(guides, byte_fallback, guide_type: str, grammar: str):
    """Whether a grammar takes a text from end to end, letter by letter."""
    compiled = guides.compile(guide_type, grammar)

    def taken(text: str) -> bool:
        guide, tokens = compiled.start((1,)), [2 + byte for byte in text.encode()]
        if guide.num_taken(tokens) < len(tokens):
            return False
        for token in tokens:
            guide._matcher.consume_token(token)
        guide._matcher.compute_bitmask()
        return bool(guide._matcher.is_accepting())

    return taken


def texts(letters: str, most: int) -> list[str]:
    return ["".join(found) for size in range(most + 1) for found in itertools.product(letters, repeat=size)]


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ('root ::= [a-b]+ "b"', "[ab]+b"),
        ('root ::= x y\nx ::= [ab]+\ny ::= "ab" | "b" "b"', "[ab]+(ab|bb)"),
        ('root ::= ("a" | "ab") "b"?', "(a|ab)b?"),
        ('root ::= "a"{2} | "b"{1,} | "-"{0,2} # a comment\n', "a{2}|b+|-{0,2}"),
        ('root ::= "" | [^a\\-]', r"|[^a\-]"),
        ("root ::=\n  |\n  [b-]*", "|[b-]*"),
        ('root ::= a-b a_c\na-b ::= "a"\na_c ::= ("b" | "-" "a")*', "a(b|-a)*"),
        ('root ::= "\\x61\\u0062" "\\U0000002d"', "ab-"),
    ],
)  # fmt: skip
def test_grammars_that_need_no_rule_within_itself_are_regular(guides, byte_fallback, grammar, pattern):
    taken = takes(guides, byte_fallback, "ebnf_grammar", grammar)
    for text in texts("ab-", 4):
        assert taken(text) == bool(re.fullmatch(pattern, text)), text


def test_a_grammar_within_itself_loses_no_way_to_read_a_text(guides, byte_fallback):
    # A lexer that takes the longest lexeme would read "aab" as a word and miss the b behind it.
    taken = takes(
        guides, byte_fallback, "ebnf_grammar", 'root ::= word end\nword ::= [ab]+\nend ::= "b" | "(" root ")"'
    )
    inner = re.compile("[ab]+b")

    def expected(text: str) -> bool:
        opened = re.fullmatch(r"([ab]+)\((.*)\)", text)
        return bool(inner.fullmatch(text)) or bool(opened and expected(opened[2]))

    for text in texts("ab()", 6):
        assert taken(text) == expected(text), text
    assert taken("a(b(aab))")


def test_left_recursion_and_nesting(guides, byte_fallback):
    taken = takes(guides, byte_fallback, "ebnf_grammar", 'root ::= root "-" one | one\none ::= "a" | "(" root ")"')

    def expected(text: str) -> bool:
        while (less := re.sub(r"\(a(-a)*\)", "a", text)) != text:
            text = less
        return bool(re.fullmatch("a(-a)*", text))

    for text in texts("a-()", 6):
        assert taken(text) == expected(text), text


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        ("", "no rule root"),
        ('x ::= "a"', "no rule root"),
        ("root ::= foo", "found the rule foo in root, which the grammar does not have"),
        ('root ::= "a" root', "needs itself without end"),
        ('root ::= a\na ::= b "x"\nb ::= a | b', "needs itself without end"),
        ('root ::= "a', "line 1 at '\"a'"),
        ('root ::= "a"\nroot ::= "b"', "line 2 at .*: the rule root is there twice"),
        ("root ::= (", "expected \\) at the end of a group"),
        ('root ::= "a" )', "expected a rule"),
        ("root ::= *", "nothing stands before it"),
        ("root ::= [z-a]", "the range z-a is the wrong way round"),
        ("root ::= []", "expected a character in the class"),
        ('root ::= "a"{3,1}', "n <= m"),
        ('root ::= "a"{99999999999}', "at most 1024"),
        ('root ::= "\\d"', "is no escape"),
        ('root ::= "\\uD800"', "digits of a character's code"),
        ("root ::= " + "(" * 200 + '"a"' + ")" * 200, "more than 100 groups"),
        ("start: /a/", "line 1 at 'start: /a/'"),
    ],
)  # fmt: skip
def test_a_grammar_is_refused_with_its_line(guides, grammar, said):
    with pytest.raises(RequestError, match=said):
        guides.compile("ebnf_grammar", grammar)


@pytest.mark.parametrize(
    "pattern", ["^a|b$", "(a|b-)*", r"a\$", r"\^b", r"[ab]{2}\\$", r"a{0,2}(b|-)?", r"^$", r"\.|\/|-", r"[^a]b?"]
)  # fmt: skip
def test_regular_expressions_match_from_end_to_end(guides, byte_fallback, pattern):
    taken = takes(guides, byte_fallback, "regex", pattern)
    for text in [*texts("ab-", 3), "a$", "^b", "ab\\", "/", "."]:
        assert taken(text) == bool(re.fullmatch(pattern, text)), text


def test_anchors_are_those_that_are_not_escaped():
    assert [without_anchors(text) for text in ("^a$", r"^a\$", r"a\\$", "$", "^", "", "a")] == [
        "a", r"a\$", r"a\\", "", "", "", "a",
    ]  # fmt: skip


@pytest.mark.parametrize("pattern", ["(a", "a(?=b)", r"(a)\1", r"\bfoo", "a{3,1}", "[b-a]", "*"])
def test_a_regular_expression_that_is_none_is_refused(guides, pattern):
    with pytest.raises(RequestError, match="guided_decoding_guide: "):
        guides.compile("regex", pattern)


def test_rules_that_name_long_ones_often_are_not_written_out():
    text = "a" * 6000
    for grammar in (
        f'a ::= "{text}"\nroot ::= ' + "a " * 20_000,
        f'r0 ::= "{text}"\n' + "".join(f'r{n} ::= r{n - 1} "b"\n' for n in range(1, 3000)) + "root ::= r2999",
    ):
        tracemalloc.start()
        lark_of(grammar)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 64 << 20


def test_a_chain_of_rules_is_found_to_end_whichever_way_it_is_written():
    count = 3000
    rules = [f"r{n} ::= r{n + 1}" for n in range(count)]
    for order in (rules, rules[::-1]):
        for last, ends in (('"a"', True), ("root", False)):
            grammar = "\n".join(["root ::= r0", *order, f"r{count} ::= {last}"])
            if ends:
                assert lark_of(grammar)
            else:
                with pytest.raises(ValueError, match="needs itself without end"):
                    lark_of(grammar)
