"""Many words at once: the same as each word looked for alone, at a cost that their number does not change."""

from __future__ import annotations

import random

import numpy as np
import pytest

from triton_repo.runtime.options import MAX_WORDS, GenerationOptions
from triton_repo.runtime.single.generation import generate
from triton_repo.runtime.text.automaton import ROOT, Automaton
from triton_repo.runtime.text.stopping import StopWatcher, TextWatcher, TokenWatcher


def run(words, pieces) -> tuple[str, bool]:
    watcher, text = StopWatcher(words), ""
    for piece in pieces:
        given, stopped = watcher.push(piece)
        text += given
        if stopped:
            return text, True
    return text + watcher.flush(), False


def cut_at_the_first(words, text) -> tuple[str, bool]:
    """By definition: the word that is complete first, the longest of those that end there."""
    found = [(text.find(word) + len(word), text.find(word)) for word in words if word in text]
    return (text[: min(found)[1]], True) if found else (text, False)


def test_any_words_in_any_text_end_it_where_the_definition_says():
    draw = random.Random(11)
    for _ in range(3000):
        words = tuple("".join(draw.choices("ab", k=draw.randint(1, 5))) for _ in range(draw.randint(1, 4)))
        text = "".join(draw.choices("abc", k=draw.randint(1, 14)))
        cuts = sorted(draw.choices(range(len(text) + 1), k=2))
        pieces = [text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]]
        assert run(words, pieces) == cut_at_the_first(words, text)


def test_what_is_kept_back_is_the_longest_beginning_of_a_word():
    draw = random.Random(12)
    for _ in range(2000):
        words = ["".join(draw.choices("ab", k=draw.randint(2, 5))) for _ in range(3)]
        text = "".join(draw.choices("ab", k=draw.randint(1, 8)))
        if any(word in text for word in words):
            continue
        kept = max((n for word in words for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
        assert StopWatcher(words).push(text) == (text[: len(text) - kept], False)


def test_a_text_would_match_where_a_word_would_end_in_it():
    draw = random.Random(13)
    for _ in range(2000):
        words = ["".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(3)]
        before, after = ("".join(draw.choices("abc", k=draw.randint(0, 6))) for _ in range(2))
        watcher = TextWatcher(words)
        watcher.push(before)
        ends = [i + len(w) for w in words for i in range(len(before + after)) if (before + after).startswith(w, i)]
        assert watcher.would_match(after) == any(end > len(before) for end in ends)


def test_the_tokens_that_would_complete_a_sequence():
    draw = random.Random(14)
    for _ in range(1000):
        sequences = [draw.choices(range(3), k=draw.randint(1, 4)) for _ in range(4)]
        watcher, tokens = TokenWatcher(sequences), draw.choices(range(4), k=8)
        for end in range(len(tokens)):
            expected = {
                s[-1] for s in sequences if tokens[:end][len(tokens[:end]) - len(s) + 1 :] == s[:-1] or not s[:-1]
            }
            expected = {s[-1] for s in sequences if len(s) == 1 or tokens[max(0, end - len(s) + 1) : end] == s[:-1]}
            assert {token for ids in watcher.completing() for token in ids.tolist()} == expected
            met = any(tokens[max(0, end + 1 - len(s)) : end + 1] == s for s in sequences)
            assert watcher.push(tokens[end]) == met


def test_no_words_and_empty_ones_match_nothing():
    for words in ((), ("",)):
        automaton = Automaton(words)
        assert automaton.step(ROOT, "a") == ROOT
        assert run(words, ["abc"]) == ("abc", False)


class CountingEdges(dict):
    """Counts how often an edge is looked up."""

    count = 0

    def get(self, *arguments):
        CountingEdges.count += 1
        return super().get(*arguments)


@pytest.mark.parametrize(
    "words", [["ab" * 500], [f"{i:04}" for i in range(MAX_WORDS)], ["a" * i for i in range(1, 200)]]
)
def test_steps_are_linear_in_what_is_read_whatever_the_words(words):
    automaton = Automaton(words)
    automaton.edges = [CountingEdges(edges) for edges in automaton.edges]
    text = ("ab" * 499 + "b" + "0123" + "a" * 150 + "c") * 20
    CountingEdges.count, state = 0, ROOT
    for letter in text:
        state = automaton.step(state, letter)
    assert CountingEdges.count <= 2 * len(text)


def test_a_bad_word_for_every_likely_token_takes_few_draws(scripted, byte_level):
    """Tokens are refused in handfuls: a draw for each of them would cost as much as a step of an engine."""
    session = scripted("return")
    ranking = np.linspace(9, 1, byte_level.size, dtype=np.float32)
    texts = [byte_level.decode([token]) for token in range(byte_level.size)]
    words = {text for text in texts[:200] if text.strip() and "\ufffd" not in text}
    session.run = lambda cache, ids: np.concatenate([ranking, np.full(7, 50, np.float32)])
    picks = []
    from triton_repo.runtime.sampling import Sampler

    original = Sampler._pick
    Sampler._pick = lambda self, scores, best: picks.append(1) or original(self, scores, best)
    try:
        options = GenerationOptions(prompt="def ", max_tokens=1, bad_words=tuple(words), end_id=-1)
        [piece] = generate(session, byte_level, options)
    finally:
        Sampler._pick = original
    assert not any(word in piece.text for word in words)
    assert len(picks) <= 5
