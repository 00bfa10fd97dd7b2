"""The loop over a scripted session: pieces, reasons to finish, stop and bad words, cancellation."""

from __future__ import annotations

import pytest

from triton_repo.contracts.piece import join
from triton_repo.errors import RequestError
from triton_repo.runtime.options import GenerationOptions
from triton_repo.runtime.single.generation import generate
from trt_build.ort.session import PREFILL_CHUNK_TOKENS

TEXT = "return 😀 hello 語."


def pieces_of(session, tokenizer, is_cancelled=lambda: False, **fields):
    options = GenerationOptions(**{"prompt": "def ", "max_tokens": 200, **fields})
    return list(generate(session, tokenizer, options, is_cancelled))


def test_the_pieces_are_the_text_in_whole_characters(scripted, byte_level):
    pieces = pieces_of(scripted(TEXT), byte_level)
    assert "".join(piece.text for piece in pieces) == TEXT
    assert all(piece.text and "\ufffd" not in piece.text for piece in pieces[:-1])
    ids = [token for piece in pieces for token in piece.token_ids]
    assert ids == [*byte_level.encode(TEXT), byte_level.eos_token_id]
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert pieces[-1].num_output_tokens == len(ids)
    assert {piece.num_input_tokens for piece in pieces} == {len(byte_level.encode("def "))}


def test_the_length_ends_the_answer_and_gives_out_what_was_kept_back(scripted, byte_level):
    ids = byte_level.encode("語")
    answer = join(pieces_of(scripted("語"), byte_level, max_tokens=2))
    assert (answer.text, answer.finish_reason) == (byte_level.decode(ids[:2]), "length")
    kept = join(pieces_of(scripted("def ab"), byte_level, max_tokens=1, stop_words=("def main",)))
    assert (kept.text, kept.finish_reason) == (byte_level.decode(byte_level.encode("def ab")[:1]), "length")


def test_the_context_ends_the_answer_when_max_tokens_does_not(scripted, byte_level):
    size = len(byte_level.encode("def "))
    answer = join(pieces_of(scripted(TEXT, max_sequence=size + 3), byte_level, max_tokens=1000))
    assert (answer.num_output_tokens, answer.finish_reason) == (3, "length")


def test_a_prompt_that_fills_the_context_is_refused_before_anything_runs(scripted, byte_level):
    session = scripted(TEXT, max_sequence=len(byte_level.encode("def ")))
    with pytest.raises(RequestError, match="expected at most"):
        generate(session, byte_level, GenerationOptions(prompt="def ", max_tokens=1))
    assert session.fed == []


def test_a_stop_word_of_several_tokens_is_cut_off(scripted, byte_level):
    pieces = pieces_of(scripted(TEXT), byte_level, stop_words=("never", " hello"))
    assert "".join(piece.text for piece in pieces) == "return 😀"
    assert pieces[-1].finish_reason == "stop"


def test_an_end_id_of_the_request_ends_the_answer_and_shows_no_text(scripted, byte_level):
    dot = byte_level.encode(".")[0]
    answer = join(pieces_of(scripted("return 語.x"), byte_level, end_id=dot))
    assert (answer.text, answer.finish_reason, answer.token_ids[-1]) == ("return 語", "stop", dot)


@pytest.mark.parametrize("word", ["h", "hello", "ello", " hello 語", "😀", "語"])
def test_a_bad_word_never_appears_however_it_is_cut_into_tokens(scripted, byte_level, word):
    free = join(pieces_of(scripted(TEXT), byte_level, max_tokens=40))
    assert word in free.text
    answer = join(pieces_of(scripted(TEXT), byte_level, bad_words=(word, "zzz"), max_tokens=40))
    assert word not in answer.text
    # The script has no other way, so the answer ends there, if need be within a character.
    assert answer.finish_reason == "stop"
    assert TEXT.startswith(answer.text.rstrip("\ufffd"))


def test_the_prompt_comes_first_where_it_is_asked_for(scripted, byte_level):
    pieces = pieces_of(scripted("x"), byte_level, exclude_input_in_output=False)
    assert "".join(piece.text for piece in pieces) == "def x"
    assert pieces[0].num_output_tokens == 1


def test_a_stream_never_repeats_the_prompt(scripted, byte_level):
    pieces = pieces_of(scripted("x"), byte_level, exclude_input_in_output=False, stream=True)
    assert "".join(piece.text for piece in pieces) == "x"


def test_log_probabilities_are_one_a_token_and_sum_up(scripted, byte_level):
    pieces = pieces_of(scripted(TEXT), byte_level, return_log_probs=True)
    answer = join(pieces)
    assert all(len(piece.token_ids) == len(piece.log_probs) for piece in pieces)
    assert answer.cum_log_prob == pytest.approx(sum(answer.log_probs))
    assert len(answer.log_probs) == answer.num_output_tokens
    silent = join(pieces_of(scripted(TEXT), byte_level))
    assert (silent.log_probs, silent.cum_log_prob) == ((), None)


def test_a_long_prompt_is_fed_in_steps_and_in_order(scripted, byte_level):
    prompt = "a語" * 150
    session = scripted("x", max_sequence=2048)
    pieces_of(session, byte_level, prompt=prompt, max_tokens=1)
    assert [token for step in session.fed for token in step] == byte_level.encode(prompt)
    assert max(len(step) for step in session.fed) == PREFILL_CHUNK_TOKENS


def test_cancellation_stops_before_the_next_step(scripted, byte_level):
    session = scripted(TEXT)
    pieces = pieces_of(session, byte_level, is_cancelled=lambda: len(session.fed) == 3)
    assert len(session.fed) == 3
    assert pieces[-1].finish_reason == "cancelled"
    assert pieces[-1].num_output_tokens == 3


def test_cancellation_during_the_prompt_runs_no_further_step(scripted, byte_level):
    session = scripted("x", max_sequence=2048)
    [piece] = pieces_of(session, byte_level, lambda: len(session.fed) == 1, prompt="語" * 150)
    assert len(session.fed) == 1
    assert (piece.finish_reason, piece.num_output_tokens, piece.token_ids) == ("cancelled", 0, ())
