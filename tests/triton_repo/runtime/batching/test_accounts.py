"""What became of each request: how it ended or why it was refused, its tokens, and its times."""

from __future__ import annotations

import numpy as np
import pytest
from reported import STEP_S, Timed

from triton_repo.errors import RequestError
from triton_repo.runtime.batching.accounts import SAMPLE_INTERVAL_S, Accounts, Ended
from triton_repo.runtime.batching.stats import ENDS, REFUSALS
from triton_repo.runtime.sampling import Choice
from trt_build.ort.routing import Routing
from trt_build.ort.step_call import Row


@pytest.fixture
def timed(scripted, byte_level):
    return lambda text="hello " * 90, **limits: Timed(scripted(text), byte_level, **limits)


def ends(engine) -> list[tuple[str, str, str]]:
    return [(ended.request_id, ended.end, ended.status) for ended in engine.ended]


def counted(engine) -> dict[str, int]:
    stats = engine.engine.stats
    return {how: count for counts in (stats.ends, stats.refusals) for how, count in counts.items() if count}


def test_times_are_since_the_arrival_of_the_request(timed, byte_level):
    engine = timed()
    engine.submit("first", max_tokens=2)
    engine.submit("second", max_tokens=3)
    engine.run()
    prompt = len(byte_level.encode("def main"))
    assert engine.ended == [
        Ended(request_id="first", end="length", status="OK", prompt_tokens=prompt, reused_tokens=0, output_tokens=2,
              queued_s=0.0, first_token_s=STEP_S, total_s=2 * STEP_S),
        Ended(request_id="second", end="length", status="OK", prompt_tokens=prompt, reused_tokens=0, output_tokens=3,
              queued_s=2 * STEP_S, first_token_s=3 * STEP_S, total_s=5 * STEP_S),
    ]  # fmt: skip
    stats = engine.engine.stats
    assert (stats.steps, stats.output_tokens, stats.prompt_tokens) == (5, 5, 2 * prompt)
    assert (stats.queue_s.sum, stats.first_token_s.sum, stats.between_tokens_s.sum) == (1.0, 2.0, 1.5)


def test_an_end_token_and_a_stop_word_are_stops(timed):
    engine = timed("ret")
    engine.submit("end", max_tokens=400)
    engine.submit("word", max_tokens=400, stop_words=("re",))
    engine.run()
    assert ends(engine) == [("end", "stop", "OK"), ("word", "stop", "OK")]


def test_several_answers_to_a_request_are_one_end(timed):
    engine = timed(slots=3)
    engine.submit("several", max_tokens=2, num_return_sequences=3)
    engine.run()
    assert ends(engine) == [("several", "length", "OK")]
    assert engine.ended[0].output_tokens == 6


def test_early_ends_say_why(timed):
    engine = timed(slots=2, max_waiting=9)
    gone = {"run": False, "wait": False}
    for name, more in (("run", {"gone": lambda: gone["run"]}), ("late", {"deadline_s": 1.0})):
        engine.submit(name, max_tokens=400, **more)
    engine.engine.step()
    engine.submit("wait", gone=lambda: gone["wait"])
    engine.submit("stop me")
    assert engine.engine.stop("stop me") == 1
    gone.update(run=True, wait=True)
    engine.engine.look()
    engine.engine.step()
    engine.engine.step()
    assert ends(engine) == [
        ("stop me", "stopped", "OK"), ("run", "disconnected", "OK"), ("wait", "disconnected", "OK"),
        ("late", "deadline", "OK"),
    ]  # fmt: skip
    assert [ended.queued_s for ended in engine.ended] == [None, 0.0, None, 0.0]
    engine.submit("runs", max_tokens=400)
    engine.engine.step()
    engine.engine.stop("runs")
    engine.engine.step()
    engine.submit("at the end", max_tokens=400)
    engine.engine.step()
    engine.engine.end_all()
    assert ends(engine)[4:] == [("runs", "stopped", "OK"), ("at the end", "stopping", "OK")]
    assert counted(engine) == {"stopped": 2, "disconnected": 2, "deadline": 1, "stopping": 1}


def test_refusals_say_why_and_which_status_the_client_got(timed):
    engine = timed(max_wait_s=1.0)
    engine.submit("runs", max_tokens=400)
    engine.engine.step()
    engine.submit("in time", deadline_s=engine.now + 0.2)
    engine.submit("overdue")
    for name, more in (("too many", {}), ("too large", {"num_return_sequences": 2})):
        with pytest.raises(RequestError):
            engine.submit(name, **more)
    for _ in range(4):
        engine.engine.step()
    engine.submit("waits")
    engine.engine.drain()
    with pytest.raises(RequestError, match="stopping"):
        engine.submit("comes late")
    engine.engine.end_running()
    engine.engine.step()
    engine.engine.accounts.unread("wrong", RequestError("found 0"))
    engine.engine.accounts.unread("a fault", KeyError("x"))
    assert ends(engine) == [
        ("too many", "queue_full", "UNAVAILABLE"), ("too large", "too_large", "INVALID_ARGUMENT"),
        ("in time", "deadline", "UNAVAILABLE"), ("overdue", "waited_too_long", "UNAVAILABLE"),
        ("waits", "stopping", "UNAVAILABLE"), ("comes late", "stopping", "UNAVAILABLE"),
        ("runs", "stopping", "OK"),
        ("wrong", "invalid", "INVALID_ARGUMENT"), ("a fault", "failed", "INTERNAL"),
    ]  # fmt: skip
    assert counted(engine) == {
        "queue_full": 1, "too_large": 1, "deadline": 1, "waited_too_long": 1, "stopping": 2, "invalid": 1, "failed": 1
    }  # fmt: skip
    assert [ended.prompt_tokens is None for ended in engine.ended] == [False] * 7 + [True] * 2


def test_a_step_that_fails_is_the_failure_of_its_requests(timed):
    engine = timed(slots=2)
    for name in ("one", "two"):
        engine.submit(name, max_tokens=400)
    engine.engine.step()
    engine.broken = True
    engine.engine.step()
    assert sorted(ends(engine)) == [("one", "failed", "INTERNAL"), ("two", "failed", "INTERNAL")]
    assert counted(engine) == {"failed": 2}


def test_every_kind_of_end_is_counted_from_the_start(timed):
    stats = timed().engine.stats
    assert (dict(stats.ends), dict(stats.refusals)) == (dict.fromkeys(ENDS, 0), dict.fromkeys(REFUSALS, 0))


def test_the_experts_of_some_steps_are_counted(scripted, byte_level):
    """The steps take half a second and 0.1 s; all of the tokens choose experts 2 and 0 in layer 3, 0 and 1 in 5."""
    session, logits = scripted("return hello"), np.array([[[3, 1, 4]], [[1, 1, 1]]], np.float32)
    plain, sampled = session.step, []

    def step(cache, rows, router_logits=None):
        sampled.append(router_logits is not None)
        if router_logits is not None:
            router_logits[:] = logits
        return plain(cache, rows)

    session.step = step
    routing = Routing(layers=(3, 5), expert_order=(0, 1, 2), experts_per_token=2)
    engine = Timed(session, byte_level, routing=routing)
    engine.submit("one", max_tokens=4)
    engine.run()
    assert sampled == [True] * 4
    tokens = len(byte_level.encode("def main")) + 3
    assert engine.engine.stats.expert_tokens.tolist() == [[tokens, 0, tokens], [tokens, tokens, 0]]
    sampled.clear()
    engine.submit("two", max_tokens=4)
    while engine.engine.step():
        engine.now -= STEP_S - 0.1
    assert sampled == [True, False, False, True]
    assert SAMPLE_INTERVAL_S == 0.25


def test_tokens_of_drafts_that_were_rejected_count_for_no_expert():
    accounts = Accounts(Routing(layers=(0,), expert_order=(0, 1, 2), experts_per_token=1), lambda: 0.0, lambda _: None)
    rows = [Row(slot=0, token_ids=[5, 6]), Row(slot=1, token_ids=[7, 8, 9], num_logits=3), Row(slot=2, token_ids=[4])]
    room = accounts.room_for_routers(rows, wanted=False)
    room[0] = np.eye(3, dtype=np.float32)[[0, 0, 1, 2, 2, 1]]  # the expert of each token
    accounts.count_experts(room, rows, rejected=[0, 2, 0])
    assert accounts.stats.expert_tokens.tolist() == [[2, 2, 0]]
    accounts.count_experts(room, rows, rejected=[0, 0, 0])
    assert accounts.stats.expert_tokens.tolist() == [[4, 4, 2]]


def test_routers_are_looked_at_where_it_is_time_or_a_request_of_the_step_wants_it():
    now = [0.0]
    accounts = Accounts(
        Routing(layers=(4,), expert_order=(1, 0, 2), experts_per_token=2), lambda: now[0], lambda _: None
    )
    rows = [Row(slot=0, token_ids=[5, 6]), Row(slot=1, token_ids=[7, 8, 9], num_logits=2), Row(slot=2, token_ids=[4])]
    assert accounts.room_for_routers(rows, wanted=False).shape == (1, 6, 3)
    now[0] = SAMPLE_INTERVAL_S / 2
    assert accounts.room_for_routers(rows, wanted=False) is None
    assert accounts.routed(None, rows, [True] * 3) == [()] * 4
    room = accounts.room_for_routers(rows, wanted=True)
    room[0] = [[0, 0, 9], [0, 9, 0], [0, 0, 9], [9, 0, 5], [5, 9, 9], [9, 9, 9]]
    chosen = accounts.routed(room, rows, [False, True, False])
    assert [[[expert for expert, _ in layer] for layer in token] for token in chosen] == [[], [[1, 2]], [[0, 2]], []]
    accounts.count_experts(room, rows, rejected=[0, 0, 0])
    assert accounts.stats.expert_tokens.sum() == 0  # not sampled
    assert accounts.with_routing(Choice(token_id=5, log_prob=None), chosen[1]).num_experts == 3
    assert accounts.with_routing(Choice(token_id=5, log_prob=None), ()) == Choice(token_id=5, log_prob=None)
