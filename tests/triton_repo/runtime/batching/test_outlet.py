"""A request ends once, whatever else is tried."""

from __future__ import annotations

import pytest

from triton_repo.runtime.batching.outlet import Outlet


class Stream:
    """Keeps what it is given; the response "broken" cannot be sent."""

    def __init__(self):
        self.got = []
        self.outlet = Outlet(self._send, lambda error: self.got.append(str(error)), self._is_cancelled)

    def _send(self, response, is_last):
        if response == "broken":
            raise OSError("closed")
        self.got.append((response, is_last))

    def _is_cancelled(self):
        self.got.append("asked")
        return False


def test_nothing_follows_the_last_response():
    stream = Stream()
    stream.outlet.send("a", False)
    stream.outlet.send("b", True)
    stream.outlet.send("c", False)
    stream.outlet.fail(ValueError("late"))
    assert stream.outlet.is_cancelled()
    assert stream.got == [("a", False), ("b", True)]


def test_nothing_follows_an_error():
    stream = Stream()
    stream.outlet.fail(ValueError("first"))
    stream.outlet.send("a", True)
    stream.outlet.fail(ValueError("second"))
    assert stream.outlet.is_cancelled()
    assert stream.got == ["first"]


@pytest.mark.parametrize("is_last", [False, True])
def test_a_response_that_cannot_be_sent_leaves_room_for_its_error(is_last):
    stream = Stream()
    with pytest.raises(OSError, match="closed"):
        stream.outlet.send("broken", is_last)
    stream.outlet.fail(ValueError("broken"))
    stream.outlet.send("a", True)
    assert stream.got == ["broken"]
