"""A request ends once, whatever else is tried, and responses that wait to be sent are merged."""

from __future__ import annotations

import pytest

from triton_repo.contracts.piece import Piece, join_by_answer
from triton_repo.runtime.batching.outlet import Outlet


class Stream:
    """Keeps what it is given; the response "broken" cannot be sent."""

    def __init__(self, **options):
        self.got = []
        self.outlet = Outlet(self._send, lambda error: self.got.append(str(error)), self._is_cancelled, **options)

    def send(self, response, is_last):
        if self.outlet.put(response, is_last):
            self.outlet.flush()

    def _send(self, response, is_last):
        if response == "broken":
            raise OSError("closed")
        self.got.append((response, is_last))

    def _is_cancelled(self):
        self.got.append("asked")
        return False


def test_nothing_follows_the_last_response():
    stream = Stream()
    stream.send("a", False)
    stream.send("b", True)
    stream.send("c", False)
    stream.outlet.fail(ValueError("late"))
    assert stream.outlet.is_cancelled()
    assert stream.got == [("a", False), ("b", True)]


def test_nothing_follows_an_error():
    stream = Stream()
    stream.outlet.fail(ValueError("first"))
    stream.send("a", True)
    stream.outlet.fail(ValueError("second"))
    assert stream.outlet.is_cancelled()
    assert stream.got == ["first"]


@pytest.mark.parametrize("is_last", [False, True])
def test_a_response_that_cannot_be_sent_leaves_room_for_its_error(is_last):
    stream = Stream()
    with pytest.raises(OSError, match="closed"):
        stream.send("broken", is_last)
    stream.outlet.fail(ValueError("broken"))
    stream.send("a", True)
    assert stream.got == ["broken"]


def test_responses_that_wait_are_merged():
    stream = Stream(merge=lambda waiting: ["+".join(waiting)])
    assert stream.outlet.put("a", False)
    assert not stream.outlet.put("b", False)  # a flush is due already
    stream.outlet.flush()
    stream.outlet.flush()
    assert stream.outlet.put("c", False)
    stream.outlet.flush()
    stream.outlet.put("d", False)
    stream.outlet.put("e", True)
    stream.outlet.flush()
    stream.outlet.flush()
    assert stream.got == [("a+b", False), ("c", False), ("d+e", True)]


def test_only_the_last_of_several_responses_is_the_last_one():
    stream = Stream(merge=sorted)
    for response in ("b", "a", "d", "c"):
        stream.outlet.put(response, response == "c")
    stream.outlet.flush()
    assert stream.got == [("a", False), ("b", False), ("c", False), ("d", True)]


def test_pieces_of_each_answer_are_joined():
    pieces = [
        Piece(text="a", token_ids=(1,), num_output_tokens=1, sequence_index=1),
        Piece(text="x", token_ids=(7, 8), log_probs=(-0.5, -1.5), cum_log_prob=-2.0, sequence_index=0),
        Piece(text="b", token_ids=(2,), num_output_tokens=2, sequence_index=1),
        Piece(text="", token_ids=(9,), log_probs=(-0.25,), cum_log_prob=-2.25, finish_reason="stop", sequence_index=0),
    ]
    assert join_by_answer(pieces) == [
        Piece(text="ab", token_ids=(1, 2), num_output_tokens=2, sequence_index=1),
        Piece(
            text="x", token_ids=(7, 8, 9), log_probs=(-0.5, -1.5, -0.25), cum_log_prob=-2.25, finish_reason="stop",
            sequence_index=0,
        ),
    ]  # fmt: skip
