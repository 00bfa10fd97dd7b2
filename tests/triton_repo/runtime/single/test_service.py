"""From wire tensors to wire tensors without Triton."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from served import PATIENCE_S, Sent, answers

from export.errors import MoeshipError
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.contracts.piece import Piece
from triton_repo.contracts.wire import ADDED_OUTPUTS, OUTPUTS
from triton_repo.errors import RequestError
from triton_repo.runtime.batching.loading import start
from triton_repo.runtime.responses import failure, wire_outputs
from triton_repo.runtime.single.service import Request, Service


def request(**values) -> dict:
    return {
        name: np.array([[value]], dtype=object if isinstance(value, bytes) else None) for name, value in values.items()
    }


def test_a_request_that_does_not_stream_has_one_piece_with_all(scripted, byte_level):
    asked = {"text_input": b"def ", "max_tokens": 50}
    [whole] = answers(scripted("return hello"), byte_level, request(**asked))
    pieces = answers(scripted("return hello"), byte_level, request(**asked, stream=True))
    assert whole.text == "".join(piece.text for piece in pieces) == "return hello"
    assert whole.finish_reason == "stop"


def test_the_first_piece_of_a_stream_is_sent_before_the_answer_goes_on(scripted, byte_level):
    session, has_come = scripted("return hello"), threading.Event()
    step, first = session.step, session.script[0]

    def step_after_the_first_piece(cache, rows, *more):
        if list(rows[0].token_ids) == [first]:
            assert has_come.wait(PATIENCE_S)
        return step(cache, rows, *more)

    session.step = step_after_the_first_piece
    tensors = request(text_input=b"def ", max_tokens=50, stream=True)
    sent = Sent(Request, request_id="", tensors=tensors)
    service = Service(start(session, ModelParameters(slots=1)), byte_level)
    try:
        service.submit(sent.request)
        pieces = [sent.next()[0]]
        has_come.set()
        pieces += sent.all()
    finally:
        service.runner.close()
    assert (pieces[0].token_ids, pieces[0].finish_reason) == ((first,), None)
    assert "".join(piece.text for piece in pieces) == "return hello"


def test_outputs_are_those_of_the_contract_with_its_types():
    piece = Piece(
        text="né", token_ids=(4, 5), log_probs=(-0.5, -0.25), sequence_index=3,
        top_log_probs=(((4, -0.5), (7, -1.0)), ((9, -0.125), (5, -0.25))),
        prompt_token_ids=(1, 2), prompt_log_probs=(-4.0,), prompt_top_log_probs=(((6, -0.75), (2, -4.0)),),
        cum_log_prob=-2.0, finish_reason="length",
        num_input_tokens=3, num_output_tokens=9, num_experts=4,
        routing=((((0, 0.75), (3, 0.25)),), (((2, 0.5), (1, 0.5)),)),
    )  # fmt: skip
    outputs = wire_outputs(piece)
    dtypes = {"STRING": np.object_, "INT32": np.int32, "FP32": np.float32}
    assert {name: value.dtype.type for name, value in outputs.items()} == {
        tensor.name: dtypes[tensor.dtype] for tensor in (*OUTPUTS, *ADDED_OUTPUTS)
    }
    assert outputs["text_output"].tolist() == ["né".encode()]
    assert outputs["token_ids"].tolist() == [[4, 5]]
    assert outputs["output_log_probs"].tolist() == [[-0.5, -0.25]]
    assert outputs["cum_log_probs"].tolist() == [[-2.0]]
    assert outputs["finish_reason"].tolist() == [[b"length"]]
    assert outputs["top_token_ids"].tolist() == [[[4, 7], [9, 5]]]
    assert outputs["top_log_probs"].tolist() == [[[-0.5, -1.0], [-0.125, -0.25]]]
    assert (outputs["prompt_token_ids"].tolist(), outputs["prompt_log_probs"].tolist()) == ([[1, 2]], [[-4.0]])
    assert outputs["prompt_top_token_ids"].tolist() == [[[6, 2]]]
    assert outputs["prompt_top_log_probs"].tolist() == [[[-0.75, -4.0]]]
    assert outputs["routed_experts"].tolist() == [[[[0, 3]], [[2, 1]]]]
    assert outputs["expert_weights"].tolist() == [[[[0.75, 0.25]], [[0.5, 0.5]]]]
    assert (outputs["sequence_index"].tolist(), outputs["num_experts"].tolist()) == ([[3]], [[4]])
    assert (outputs["num_input_tokens"].tolist(), outputs["num_output_tokens"].tolist()) == ([[3]], [[9]])


def test_a_failure_of_the_requests_own_keeps_its_status_and_text():
    assert failure(RequestError("found 0")) == ("INVALID_ARG", "INVALID_ARGUMENT: found 0")
    assert failure(RequestError("NaN", kind="INTERNAL")) == ("INTERNAL", "INTERNAL: NaN")


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), MoeshipError("by zero")])
def test_any_other_failure_is_internal_and_logged(error, caplog):
    ours = isinstance(error, MoeshipError)
    reason = "by zero" if ours else "the server failed; its log has the reason"
    assert failure(error) == ("INTERNAL", f"INTERNAL: answering the request: {reason}")
    assert "because of a fault in the server" in caplog.text


@pytest.mark.parametrize("kind", ["INVALID_ARG", "INTERNAL"])
def test_a_message_stays_below_2_kb_and_has_no_control_characters(kind):
    for text in ("日" * 5000, "a" * 5000, "a\x00\x1b[2Jb\u202e\n  - c" * 900):
        _, message = failure(RequestError(text, kind=kind))
        assert len(message.encode()) < 2000
        assert all(letter == "\n" or letter.isprintable() for letter in message)
    assert failure(RequestError("a\x07\n  - né"))[1] == "INVALID_ARGUMENT: a\\x07\n  - né"
