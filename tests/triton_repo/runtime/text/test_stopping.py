"""Stop words across the borders of pieces."""

from __future__ import annotations

import itertools

import pytest

from triton_repo.runtime.text.stopping import StopWatcher


def run(words: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    watcher, text = StopWatcher(words), ""
    for piece in pieces:
        given, stopped = watcher.push(piece)
        text += given
        if stopped:
            return text, True
    return text + watcher.flush(), False


def splits(text: str):
    """Every way to cut a text into pieces."""
    for cuts in itertools.product((False, True), repeat=len(text) - 1):
        pieces = [text[0]]
        for letter, cut in zip(text[1:], cuts, strict=True):
            if cut:
                pieces.append(letter)
            else:
                pieces[-1] += letter
        yield pieces


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        (("cd",), "abcdef", ("ab", True)),
        (("aab",), "aaaabx", ("aa", True)),
        (("abab",), "abaabab", ("aba", True)),
        (("xyz",), "abxyw", ("abxyw", False)),
        (("b", "abc"), "zabcz", ("za", True)),
        (("bc", "abc"), "zabcz", ("z", True)),
        (("\n\n",), "a\nb\n\nc", ("a\nb", True)),
        (("語。",), "日本語。x", ("日本", True)),
        ((), "abc", ("abc", False)),
        (("abc",), "abab", ("abab", False)),
    ],
)
def test_the_text_ends_before_the_word_however_it_is_cut_into_pieces(words, text, expected):
    assert {run(words, pieces) for pieces in splits(text)} == {expected}


def test_only_what_could_begin_a_stop_word_is_kept_back():
    watcher = StopWatcher(("STOP", "\n\n"))
    assert watcher.push("go on S") == ("go on ", False)
    assert watcher.push("T") == ("", False)
    assert watcher.push("ART\n") == ("START", False)
    assert watcher.push("x") == ("\nx", False)
    assert watcher.flush() == ""
