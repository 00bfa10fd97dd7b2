"""Requests refuse what no server would take; pieces join to a whole."""

from __future__ import annotations

import dataclasses
import math

import pytest

from clients.errors import RequestRejected
from clients.messages import GenerationRequest, collect
from triton_repo.contracts.model_state import ModelState
from triton_repo.contracts.piece import Piece
from triton_repo.contracts.wire import FIELD_NAMES, INPUTS


def test_every_input_of_the_contract_is_a_field_of_the_request_or_set_by_the_client():
    fields = {field.name for field in dataclasses.fields(GenerationRequest)}
    names = {FIELD_NAMES.get(tensor.name, tensor.name) for tensor in INPUTS}
    assert names - fields == {"stream"}
    assert fields - names == {"model", "request_id", "timeout_s"}


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
