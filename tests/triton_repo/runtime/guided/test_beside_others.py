"""Guides that take long to compile, or to give a mask, beside requests that have nothing to do with them."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from random_logits import RandomSession
from served import Sent

from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.errors import RequestError
from triton_repo.runtime.batching import engine as engine_module
from triton_repo.runtime.batching.loading import start
from triton_repo.runtime.guided import guides as module
from triton_repo.runtime.single.service import Request, Service

PATIENCE_S = 30
SLOW = "[a-b]{2}"  # the guide that is held up


def tensors(guide: str = "", **values) -> dict:
    given = {"text_input": b"def ", "max_tokens": 12, **values}
    if guide:
        given |= {"guided_decoding_guide_type": b"regex", "guided_decoding_guide": guide.encode()}
    return {
        name: np.array([[value]], dtype=object if isinstance(value, bytes) else None) for name, value in given.items()
    }


@pytest.fixture
def service(byte_level):
    made = Service(start(RandomSession(byte_level), ModelParameters(slots=4)), byte_level)
    yield made
    made.runner.close()


@pytest.fixture
def held_up(monkeypatch):
    """Holds up the compiling of SLOW until it is set; `begun` is set when it has begun."""
    goes_on, compiled = threading.Event(), module.grammar_of
    goes_on.begun = threading.Event()

    def slowly(guide_type, guide):
        if guide == SLOW:
            goes_on.begun.set()
            goes_on.wait(PATIENCE_S)
        return compiled(guide_type, guide)

    monkeypatch.setattr(module, "grammar_of", slowly)
    yield goes_on
    goes_on.set()


def ask(service, request_id: str, guide: str = "", **values) -> Sent:
    sent = Sent(Request, request_id=request_id, tensors=tensors(guide, **values))
    service.submit(sent.request)
    return sent


def wait_for(holds) -> None:
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


def test_while_a_guide_is_compiled_other_requests_are_read_and_answered(service, held_up):
    slow = ask(service, "slow", SLOW)
    assert held_up.begun.wait(PATIENCE_S)
    assert len(ask(service, "plain", end_id=np.int32(-1)).all()[0].token_ids) == 12
    assert len(ask(service, "guided", "[c-d]{3}").all()[0].text) == 3
    held_up.set()
    assert set(slow.all()[0].text) <= set("ab")


def test_a_request_whose_guide_is_compiled_can_be_ended(service, held_up):
    """By its id, and by its client's leaving."""
    gone = threading.Event()
    stopped = ask(service, "stopped", SLOW)
    left = Sent(Request, request_id="left", tensors=tensors(SLOW), is_cancelled=gone.is_set)
    service.submit(left.request)
    assert held_up.begun.wait(PATIENCE_S)
    service.runner.stop("stopped")
    assert stopped.all()[0].finish_reason == "cancelled"
    gone.set()
    assert left.all()[0].finish_reason == "cancelled"
    assert service.runner.engine.counts() == (0, 0)
    assert not service.runner.engine.has_work()


def test_a_guide_that_is_not_compiled_in_time_fails_with_one_error(service, held_up, monkeypatch):
    monkeypatch.setattr(engine_module, "AWAITED_S", 0.2)
    with pytest.raises(RequestError, match="compiling the guide: it was not done within 0.2 s; send a simpler one"):
        ask(service, "slow", SLOW).all()
    assert len(ask(service, "plain", end_id=np.int32(-1)).all()[0].token_ids) == 12


def test_only_so_many_guides_wait_to_be_compiled(service, held_up, monkeypatch):
    monkeypatch.setattr(module, "MOST_ASKED", 3)
    monkeypatch.setattr(service._guides._compilers, "_most", 1)
    waiting = [ask(service, "0", SLOW), *(ask(service, f"{number}", f"[a-b]{{{number}}}") for number in (3, 4))]
    with pytest.raises(RequestError, match="2 s, or to another server") as refused:
        ask(service, "one more", "x").all()
    assert refused.value.kind == "UNAVAILABLE"
    same = ask(service, "the same", SLOW)  # it needs no other compiling
    held_up.set()
    assert [len(sent.all()[0].text) for sent in (*waiting, same)] == [2, 3, 4, 2]


def test_a_guide_is_compiled_once_for_the_requests_that_have_it(service, monkeypatch):
    compiled, count = module.grammar_of, []
    monkeypatch.setattr(module, "grammar_of", lambda *guide: (count.append(guide), compiled(*guide))[1])
    for number in range(3):
        ask(service, str(number), SLOW).all()
    assert count == [("regex", SLOW)]


def test_an_answer_whose_mask_takes_long_holds_up_no_other(service, monkeypatch):
    """Its mask is held back until another answer, which began later, is whole; and it is what it is without that."""
    expected = ask(service, "before", SLOW, seed=np.uint64(3)).all()
    goes_on, asked, compute = threading.Event(), threading.Event(), module.Guide._mask

    def late(guide):
        asked.set()
        goes_on.wait(PATIENCE_S)
        return compute(guide)

    monkeypatch.setattr(module.Guide, "_mask", late)
    slow = ask(service, "slow", SLOW, seed=np.uint64(3))
    assert asked.wait(PATIENCE_S)
    assert len(ask(service, "plain", max_tokens=200, end_id=np.int32(-1)).all()[0].token_ids) == 200
    assert slow.found.empty()
    goes_on.set()
    assert slow.all() == expected


def test_an_answer_that_waits_for_its_mask_can_be_ended(service, monkeypatch):
    goes_on, asked, compute = threading.Event(), threading.Event(), module.Guide._mask

    def late(guide):
        asked.set()
        goes_on.wait(PATIENCE_S)
        return compute(guide)

    monkeypatch.setattr(module.Guide, "_mask", late)
    slow = ask(service, "slow", SLOW)
    assert asked.wait(PATIENCE_S)
    service.runner.stop("slow")
    assert slow.all()[0].finish_reason == "cancelled"
    goes_on.set()
    wait_for(lambda: service.runner.engine.counts() == (0, 0))
