"""Incremental decoding against the tokenizers library's own decoding of the whole."""

from __future__ import annotations

import numpy as np
import pytest

from triton_repo.runtime.text.detokenizer import Detokenizer

TEXTS = (
    "def main() -> None:",
    "smile 😀 and 😀😁 again",
    "👩‍👩‍👧 🏳️‍🌈",
    "日本語の文章と漢字",
    "한국어 텍스트 ไทย",
    "cafe\u0301 nai\u0308ve",
    "  leading and trailing  ",
    "a b a b \n\t b",
    "a written \ufffd stays",
    "\ufffd",
)


def pieces_of(tokenizer, ids) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_pieces_join_to_the_decoding_of_the_whole(request, name, text):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_text_comes_back_whole(byte_level, text):
    assert "".join(pieces_of(byte_level, byte_level.encode(text))) == text


def test_a_character_of_several_tokens_comes_with_its_last_and_no_later(byte_level):
    ids = byte_level.encode("Ω★")
    assert len(ids) == 5
    assert pieces_of(byte_level, ids) == ["", "Ω", "", "", "★", ""]


def test_a_token_that_ends_inside_a_character_gives_the_part_before(byte_level):
    emoji = byte_level.encode("😁")
    pieces = pieces_of(byte_level, [*byte_level.encode("def"), *emoji[:2]])
    assert "".join(pieces[:-1]) == "def"
    assert pieces[-1] == byte_level.decode(emoji[:2]) == "\ufffd"


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_random_tokens_join_to_the_decoding_of_the_whole(request, name):
    tokenizer = request.getfixturevalue(name)
    rng = np.random.default_rng(5)
    for size in (1, 2, 3, 15, 16, 17, 40, 200):
        for _ in range(30):
            ids = rng.integers(0, tokenizer.size, size).tolist()
            assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_long_run_of_special_tokens_strips_no_space_later(byte_fallback):
    ids = [*byte_fallback.encode(" a b"), *[byte_fallback.eos_token_id] * 50, *byte_fallback.encode(" b") * 40]
    assert "".join(pieces_of(byte_fallback, ids)) == byte_fallback.decode(ids)


def test_a_preview_adds_nothing(byte_level):
    ids = byte_level.encode("a語")
    detokenizer = Detokenizer(byte_level)
    given = [detokenizer.push(token) for token in ids[:-1]]
    assert [detokenizer.preview(ids[-1]), detokenizer.preview(ids[-1])] == ["語", "語"]
    assert "".join([*given, detokenizer.push(ids[-1])]) == "a語"


def test_the_cost_of_a_step_does_not_grow_with_the_text(byte_level, monkeypatch):
    longest = 0
    plain = type(byte_level).decode

    def counting(self, ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return plain(self, ids)

    monkeypatch.setattr(type(byte_level), "decode", counting)
    pieces_of(byte_level, byte_level.encode("some words 語 " * 200))
    assert longest <= 40
