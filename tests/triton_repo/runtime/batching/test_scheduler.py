"""What a step takes on. The fairness in time is in test_pauses.py, that of histories in test_histories.py."""

from __future__ import annotations

import pytest
from batching_standins import Client, StandInCache, Wish

from triton_repo.runtime.batching.memory.slots import Slots
from triton_repo.runtime.batching.scheduler import FEWEST_TOKENS, MOST_TOKENS, Limits, Pace, Scheduler


class Made:
    """A scheduler whose sequences are put into the state that a test wants."""

    def __init__(self, slots: int = 8):
        self.cache = StandInCache(slots, 2048)
        self.scheduler = Scheduler(Slots(self.cache, 1 << 40), Limits(slots=slots))

    def begin(self, size: int, *, computed: int = 0, count: int = 1):
        """The first sequence of a request with a prompt of `size` tokens; `computed` of them are computed already."""
        wish = Wish(number=1, prompt=bytes([1] * size), most_tokens=10, count=count)
        self.scheduler.waiting.append(Client(wish).request)
        first = self.scheduler.begin()[0]
        first.num_computed = computed
        return first

    def shares(self) -> dict[int, int]:
        """Slot -> tokens of its prompt, 0 for a sequence that answers."""
        return {share.sequence.slot: share.num_tokens for share in self.scheduler.shares()}


def test_a_long_prompt_alone_takes_a_whole_step():
    made = Made()
    made.begin(1000)
    assert made.shares() == {0: MOST_TOKENS}


def test_beside_running_answers_prompts_share_the_pace_between_the_oldest_and_the_one_that_got_least():
    made = Made()
    made.begin(5, computed=5)
    made.begin(1000, computed=512)
    made.begin(1000, computed=256)
    made.begin(1000, computed=0)
    made.scheduler.pace.num_tokens = 31
    assert made.shares() == {0: 0, 1: 16, 3: 15}


def test_what_a_short_prompt_leaves_goes_to_the_next():
    made = Made()
    made.begin(5, computed=5)
    made.begin(1000, computed=512)
    made.begin(3)
    made.begin(1000, computed=256)
    made.scheduler.pace.num_tokens = 40
    assert made.shares() == {0: 0, 1: 20, 2: 3, 3: 17}


def test_a_step_is_never_wider_than_the_session_computes_at_once():
    made = Made()
    for _ in range(7):
        made.begin(5, computed=5)
    made.begin(1000)
    made.scheduler.pace.num_tokens = MOST_TOKENS
    shares = made.shares()
    assert shares[7] == MOST_TOKENS - 7
    assert list(shares.values()).count(0) == 7


def test_a_short_rest_of_a_prompt_is_computed_at_once_with_others_at_the_pace():
    made = Made()
    made.begin(1000, computed=128)
    made.begin(40, computed=10)
    made.begin(1000, computed=64)
    made.scheduler.pace.num_tokens = 16
    assert made.shares() == {0: 8, 1: 30, 2: 8}


def test_sequences_of_one_request_compute_its_prompt_once():
    made = Made()
    made.begin(50, count=3)
    assert made.shares() == {0: 50}


def test_nothing_runs_in_an_empty_scheduler():
    assert Made().shares() == {}


# Pace(1.0) aims at 0.85 s, so that a machine which becomes twice as slow keeps within 2 s.


def test_the_pace_approaches_what_fits_the_target_and_never_passes_it():
    pace = Pace(1.0)
    widths = []
    for _ in range(100):
        pace.learn(pace.num_tokens, 0.1 + 0.01 * pace.num_tokens)
        widths.append(pace.num_tokens)
    assert 74 <= widths[-1] <= 76
    assert max(widths) <= 76
    assert widths == sorted(widths) or widths[-1] != widths[-2]


def test_a_slow_step_lowers_the_pace_at_once():
    pace = Pace(1.0)
    pace.num_tokens = 100
    pace.learn(100, 2.0)
    assert pace.num_tokens == 42
    pace.learn(42, 100.0)
    assert pace.num_tokens == FEWEST_TOKENS


def test_a_narrow_step_does_not_raise_the_pace():
    pace = Pace(1.0)
    pace.num_tokens = 50
    pace.learn(3, 0.01)
    assert pace.num_tokens == 50


def test_a_step_of_prompts_alone_teaches_the_pace_before_any_answer_runs():
    pace = Pace(0.25)
    pace.learn(128, 1.7)
    assert pace.num_tokens == FEWEST_TOKENS
    pace = Pace(0.25)
    pace.learn(128, 0.02)
    assert pace.num_tokens == MOST_TOKENS


@pytest.mark.parametrize(("answers_s", "fits"), [(0.1, 32.5), (0.4, 31.9)])
def test_prompts_get_a_part_of_the_target_however_long_answers_take(answers_s, fits):
    """The aim is 0.425 s: 32.5 tokens of 0.01 s beside 0.1 s of answers. Beside 0.4 s it is 0.75 * 0.425 s more."""
    pace = Pace(0.5)
    for _ in range(100):
        pace.learn(0, answers_s)
        pace.learn(pace.num_tokens, answers_s + 0.01 * pace.num_tokens)
    assert abs(pace.num_tokens - fits) < 1.6  # it tries one token more now and then
