"""Requests refuse what no server would take; pieces join to a whole."""

from __future__ import annotations

import dataclasses
import math

import pytest

from clients.errors import RequestRejected
from clients.messages import GenerationRequest, collect, collect_all
from triton_repo.contracts.model_state import ModelState
from triton_repo.contracts.piece import Piece
from triton_repo.contracts.wire import FIELD_NAMES, INPUTS


def test_every_input_of_the_contract_is_a_field_of_the_request_or_set_by_the_client():
    fields = {field.name for field in dataclasses.fields(GenerationRequest)}
    names = {FIELD_NAMES.get(tensor.name, tensor.name) for tensor in INPUTS}
    assert names - fields == {"stream", "logit_bias_ids", "logit_bias_values"}
    assert fields - names == {"model", "request_id", "timeout_s", "logit_bias"}


def test_a_request_cannot_be_changed(request_of):
    with pytest.raises(dataclasses.FrozenInstanceError):
        request_of().max_tokens = 9


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"model": ""}, "model is empty"),
        ({"model": 5}, "model is 5, expected a text"),
        ({"model": "\udc80"}, "model is .*, expected a text that UTF-8 can hold"),
        ({"request_id": "\udc80"}, "request_id is .*, expected a text that UTF-8 can hold"),
        ({"request_id": None}, "request_id is None, expected a text"),
        *(
            ({"timeout_s": timeout_s}, "timeout_s is .*, expected a finite number of seconds above 0")
            for timeout_s in (0, -1, True, "5", math.inf, math.nan, 1j)
        ),
        ({"stop_words": "\n\n"}, "stop_words is one text; give a tuple of texts"),
        ({"bad_words": "x"}, "bad_words is one text"),
        ({"logit_bias": ((5, 1.0),)}, "logit_bias is .*, expected token ids with a number each; give a dict"),
    ],
)
def test_a_request_that_is_wrong_for_every_server_is_refused(request_of, fields, text):
    with pytest.raises(RequestRejected, match=text):
        request_of(**fields)


def test_pieces_join_to_a_whole_whose_counts_are_the_last_ones():
    pieces = [
        Piece(
            text="a", token_ids=(1, 2), num_input_tokens=3, num_output_tokens=2, cum_log_prob=-1.0, log_probs=(-0.5,)
        ),
        Piece(text="b", token_ids=(7,), num_input_tokens=3, num_output_tokens=3, finish_reason="stop"),
    ]
    whole = collect(pieces)
    assert (whole.text, whole.token_ids, whole.finish_reason) == ("ab", (1, 2, 7), "stop")
    assert (whole.num_input_tokens, whole.num_output_tokens) == (3, 3)
    assert (whole.cum_log_prob, whole.log_probs) == (-1.0, (-0.5,))


ROUTED = (((0, 0.75), (3, 0.25)), ((2, 0.5), (1, 0.5)))  # of one token in two layers


def test_pieces_of_several_answers_join_by_their_index_and_keep_what_only_the_first_piece_has():
    top = ((5, -0.5), (6, -1.5))
    pieces = [
        Piece(text="a", token_ids=(1,), sequence_index=1, top_log_probs=(top,), prompt_token_ids=(8, 9),
              prompt_log_probs=(-2.0,), routing=(ROUTED,), num_experts=4),
        Piece(text="x", token_ids=(3,), sequence_index=0, top_log_probs=(top,)),
        Piece(text="b", token_ids=(2,), sequence_index=1, top_log_probs=(top[::-1],), finish_reason="stop",
              routing=(ROUTED[::-1],)),
        Piece(text="y", sequence_index=0, finish_reason="length"),
    ]  # fmt: skip
    first, second = collect_all(pieces)
    assert (first.text, first.sequence_index, first.finish_reason) == ("xy", 0, "length")
    assert (first.top_log_probs, first.prompt_token_ids) == ((top,), ())
    assert (second.text, second.sequence_index, second.token_ids) == ("ab", 1, (1, 2))
    assert second.top_log_probs == (top, top[::-1])
    assert (second.prompt_token_ids, second.prompt_log_probs) == ((8, 9), (-2.0,))
    assert (second.routing, second.num_experts, first.routing) == ((ROUTED, ROUTED[::-1]), 4, ())
    assert collect_all([]) == ()


def test_no_pieces_make_an_empty_whole():
    assert collect([]).text == ""
    assert collect([]).finish_reason is None


@pytest.mark.parametrize(
    ("state", "reason", "text"),
    [
        ("READY", "", "m version 2 READY"),
        ("", "", "m version 2 not loaded"),
        ("LOADING", "why", "m version 2 LOADING (why)"),
    ],
)
def test_a_models_state_reads_as_one_phrase(state, reason, text):
    assert str(ModelState(name="m", version="2", state=state, reason=reason)) == text
