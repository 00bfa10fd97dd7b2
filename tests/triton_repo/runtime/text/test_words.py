"""Words as token sequences: the tensor of TensorRT-LLM worked by hand, and how tokenizers spell."""

from __future__ import annotations

import numpy as np
import pytest

from triton_repo.runtime.text.words import not_starting_in, pack_words, spell, unpack_words


def test_words_lie_one_after_the_other_above_the_places_where_they_end():
    packed = pack_words([[11, 12, 13], [7], [8, 9]])
    assert packed.tolist() == [[11, 12, 13, 7, 8, 9], [3, 4, 6, -1, -1, -1]]
    assert packed.dtype == np.int32


def test_words_of_one_token_each_leave_no_padding():
    assert pack_words([[5], [6]]).tolist() == [[5, 6], [1, 2]]


def test_what_was_packed_unpacks_with_and_without_the_batch_dimension():
    words = ((11, 12, 13), (7,), (8, 9))
    packed = pack_words(words)
    assert unpack_words(packed) == unpack_words(packed[None]) == words


def test_tokens_past_the_last_end_are_padding_as_upstreams_own_preprocessing_writes_it():
    assert unpack_words(np.array([[4, 5, 0, 0], [2, -1, -1, -1]])) == ((4, 5),)


@pytest.mark.parametrize(
    "ends",
    [[2, 1, -1], [4, -1, -1], [0, -1, -1], [1, -1, 2], [1, 1, -1]],
    ids=["falling", "far", "zero", "gap", "same"],
)
def test_ends_that_are_no_rising_places_are_refused(ends):
    with pytest.raises(ValueError, match="expected rising ones up to 3, then -1"):
        unpack_words(np.array([[4, 5, 6], ends]))


def test_a_word_is_spelled_as_it_is_and_after_a_space(byte_level):
    spelled = spell(byte_level, ["hello"])
    assert set(spelled) == {tuple(byte_level.encode("hello")), tuple(byte_level.encode(" hello"))}
    assert len(spelled) == 2


def test_a_special_token_is_spelled_though_it_shows_in_no_text(byte_level):
    assert spell(byte_level, ["<|end|>"]) == ((byte_level.eos_token_id,),)


def test_a_word_of_text_and_special_tokens_is_not_spelled_since_its_text_would_stay(byte_level):
    assert spell(byte_level, ["x<|end|>"]) == ()


def test_a_character_of_bytes_is_spelled_as_its_bytes(byte_fallback):
    assert tuple(byte_fallback.encode("語")) in spell(byte_fallback, ["語"])
    assert len(byte_fallback.encode("語")) == 3


def test_a_word_may_start_in_the_prompt_where_the_prompt_ends_with_its_beginning():
    starting, others = ((3, 4), (2, 3, 4), (1, 2, 3, 1)), ((2, 4), (1, 2, 3), (3,), (4, 3))
    assert not_starting_in((1, 2, 3), starting + others) == others
    assert not_starting_in((), starting) == starting
    for word in starting + others:
        assert not_starting_in((1, 2, 3), (word,)) == ((word,) if word in others else ())


def test_words_that_start_in_the_prompt_are_those_of_which_it_ends_with_a_beginning():
    random = np.random.default_rng(5)
    for _ in range(300):
        prompt = tuple(random.integers(3, size=random.integers(12)).tolist())
        words = tuple(tuple(random.integers(3, size=random.integers(1, 6)).tolist()) for _ in range(4))
        expected = tuple(w for w in words if not any(prompt[-n:] == w[:n] for n in range(1, len(w)) if prompt))
        assert not_starting_in(prompt, words) == expected
