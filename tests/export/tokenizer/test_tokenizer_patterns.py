"""Patterns of tokenizers in the field are taken; those on which matching takes for ever are refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from checkpoints import write_tokenizer

from export.errors import CheckpointError
from export.tokenizer.loading import load_tokenizer
from export.tokenizer.patterns import check_pattern

FIELD = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "cl100k, possessive": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s*[\r\n]|\s+(?!\S)|\s",
    "deepseek": "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
    " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    "bloom": " ?[^(\\s|[.,!?…。，、।۔،])]+",
    "kimi": r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    "digits by threes": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
    "spaces": " {2,}",
    "a literal brace": "a{b}{,}",
}
REFUSED = {
    "(a+)+$": "a repeat to a repeat",
    "(a*)*b": "a repeat to a repeat",
    "((((a*)*)*)*)*b": "a repeat to a repeat",
    "(a|a)*$": "its repeats can fail",
    "(a|ab|b)+c": "its repeats can fail",
    "(?:a?)*b": "its repeats can fail",
    "(?:a{1,1000}){1,1000}b": "a repeat to a repeat",
    "a{1,3}+b": "its repeats can fail",
    "a*a*$": "its repeats can fail",
    "a*a*a*": "more than two repeats",
    "(?:a*b?){3}": "more than two repeats",
    "[ab]*[bc]*d": "its repeats can fail",
    "a{0,1000}a{0,1000}b": "its repeats can fail",
    "a{0,30}a{0,30}a{0,30}b": "more than 1024 ways",
    r"(a)\1*b": "refers back to text that it matched before",
    r"(?<n>a|b\g<n>c)": "refers back to text that it matched before",
    "(?~abc)": "a kind that moeship does not read",
    "(*FAIL)": "a kind that moeship does not read",
    "(?=a*a*b)c": "its repeats can fail",
    "x" * 5000: "expected at most 4096",
    "(" * 40 + ")" * 40: "nested deeper",
    "[" * 40 + "a" + "]" * 40: "nested deeper",
}


@pytest.mark.parametrize("name", FIELD)
def test_patterns_of_the_field_are_taken_and_read_to_their_end(name):
    check_pattern(FIELD[name])
    with pytest.raises(ValueError, match="a repeat to a repeat"):
        check_pattern(f"{FIELD[name]}|(a+)+$")


@pytest.mark.parametrize("pattern", REFUSED)
def test_patterns_that_take_for_ever_are_refused(pattern):
    with pytest.raises(ValueError, match="can take unlimited time on some text") as caught:
        check_pattern(pattern)
    assert REFUSED[pattern] in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("most", [1, 4, 20, 40, 63, 64, 65, 1000])
@pytest.mark.parametrize("around", ["{}", "({})+", "(x{}){{2,9}}", "({}){{0,64}}"])
def test_a_lazy_interval_is_judged_as_the_greedy_one(around, most):
    """It matches the same texts and tries the same ways, in another order."""

    def judged(pattern):
        try:
            check_pattern(pattern)
        except ValueError as refused:
            return str(refused).replace(pattern, "")
        return None

    for interval in (f"a{{0,{most}}}", f"a{{1,{most}}}", f"[ab]{{{most}}}"):
        assert judged(around.format(interval)) == judged(around.format(f"{interval}?")), interval


# Texts on which matchers that backtrack are slow: runs of what a pattern repeats, and what then makes it fail.
RUNS = (
    "a" * 3000 + "!", " " * 3000 + "x", "1" * 3000 + "x", "!" * 3000 + "a", "aA" * 1500 + "!", "漢" * 1000 + "a",
    "\n" * 3000,
)  # fmt: skip
MATCH = """
import json, sys, time
from tokenizers import Regex, pre_tokenizers
for pattern, texts in json.load(sys.stdin):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    for text in texts:
        split.pre_tokenize_str(text)
print(time.process_time())
"""


def test_what_is_taken_matches_runs_in_no_time():
    every = json.dumps([(pattern, RUNS) for pattern in FIELD.values()])
    done = subprocess.run(
        [sys.executable, "-c", MATCH], input=every, capture_output=True, text=True, check=True, timeout=60
    )
    assert float(done.stdout) < 20


def with_component(folder, **components):
    write_tokenizer(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **components}))
    return folder


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("place", ["normalizer", "pre_tokenizer", "decoder", "deep"])
def test_a_tokenizer_with_such_a_pattern_is_not_loaded(tmp_path, place):
    pattern = {"Regex": "(a+)+$"}
    replace = {"type": "Replace", "pattern": pattern, "content": "x"}
    if place == "deep":
        split = {"type": "Sequence", "pretokenizers": [{**SPLIT, "pattern": pattern}]}
        components = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split]}}
    else:
        components = {place: {**SPLIT, "pattern": pattern} if place == "pre_tokenizer" else replace}
    with pytest.raises(CheckpointError, match=r"its pattern '\(a\+\)\+\$' can take unlimited time on some text"):
        load_tokenizer(with_component(tmp_path, **components))


def test_a_key_that_is_spelled_in_escapes_is_found_too(tmp_path):
    folder = with_component(tmp_path, pre_tokenizer={**SPLIT, "pattern": {"Regex": "(a+)+$"}})
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"Regex"', '"\\u0052egex"'))
    with pytest.raises(CheckpointError, match="can take unlimited time"):
        load_tokenizer(folder)


def test_patterns_of_the_field_are_loaded(tmp_path):
    for name, pattern in FIELD.items():
        folder = with_component(tmp_path / name, pre_tokenizer={**SPLIT, "pattern": {"Regex": pattern}})
        assert load_tokenizer(folder).size == 257
