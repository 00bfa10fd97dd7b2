"""Prompts that begin like what a slot holds: what is computed of them, what is copied, and what is kept."""

from __future__ import annotations

import random

import pytest
from batching_simulation import Simulation
from batching_standins import Client, Cost, StandInCache, Wish, alone

from triton_repo.runtime.batching.memory.prefixes import LEAST_TOKENS, shared
from triton_repo.runtime.batching.memory.slots import Slots
from triton_repo.runtime.batching.scheduler import MOST_TOKENS

COST = Cost(step_s=0.1, prompt_token_s=0.01)
SYSTEM = bytes(random.Random(3).randrange(1, 48) for _ in range(512))
MEMORY_OF_16 = 2000  # bytes of the stand-in


class Made:
    """A simulation whose slots keep tokens, and its clients."""

    def __init__(self, **more) -> None:
        self.simulation = Simulation(COST, **{"keeps": True, **more})
        self.cache, self.slots = self.simulation.cache, self.simulation.scheduler.slots
        self.stats, self.clients = self.simulation.engine.stats, []

    def submit(self, prompt: bytes, most_tokens: int = 4, **more) -> Client:
        wish = Wish(number=len(self.clients), prompt=prompt, most_tokens=most_tokens, **{"ends": False, **more})
        self.clients.append(self.simulation.submit(wish))
        return self.clients[-1]

    def run(self) -> None:
        """Run to the end. Each answer must be the one that its request would have got alone."""
        self.simulation.run()
        for client in self.clients:
            if client.wish.stop_s is None and not client.reasons:
                texts = [client.tokens_of(index) for index in range(client.wish.count)]
                assert texts == [answer.tokens for answer in alone(client.wish, salt=0)]

    @property
    def counts(self) -> tuple[int, int]:
        """Requests that reused tokens, and tokens that they reused."""
        return self.stats.prefix_hits, self.stats.prefix_reused_tokens


def first_token_s(client: Client) -> float:
    return client.parts[0][0] - client.wish.arrives_s


def test_how_many_tokens_are_shared():
    for one, other, expected in (
        ("", "ab", 0),
        ("abc", "abd", 2),
        ("abc", "abc", 3),
        ("abc", "abcde", 3),
        ("x", "y", 0),
    ):
        assert shared(one, other) == shared(other, one) == expected
    rng = random.Random(1)
    for _ in range(200):
        begin = [rng.randrange(3) for _ in range(rng.randrange(50))]
        assert shared([*begin, 7, *begin], [*begin, 8]) == len(begin)


def test_a_prompt_that_begins_like_an_ended_sequence_goes_on_from_it_in_place():
    made = Made()
    first, second = made.submit(SYSTEM + b"!#"), made.submit(SYSTEM + b"$%&", arrives_s=60)
    made.run()
    assert made.counts == (1, 512)
    assert made.stats.prefix_asked_tokens == 514 + 515
    assert made.stats.prompt_tokens == 514 + 3
    assert first_token_s(second) <= 0.2 * first_token_s(first)
    assert list(made.slots.kept) == [0]


def test_the_next_turn_of_a_conversation_goes_on_behind_the_answer():
    """All but the answer's last token is computed."""
    made = Made()
    first = made.submit(SYSTEM, 20)
    made.simulation.run()
    made.submit(SYSTEM + first.tokens_of(0) + b"++++", arrives_s=60)
    made.run()
    assert made.counts == (1, 512 + 19)


def test_the_last_token_of_a_prompt_is_always_computed():
    made = Made()
    for number in range(3):
        made.submit(SYSTEM, 1, arrives_s=60 * number)
    made.run()
    assert made.counts == (2, 2 * 511)


@pytest.mark.parametrize("more", [{"keeps": False}, {}])
def test_without_the_cache_and_with_too_few_tokens_all_is_computed(more):
    prompt = SYSTEM if more else SYSTEM[: LEAST_TOKENS - 1]
    made = Made(**more)
    for number in range(3):
        made.submit(prompt + bytes([number]), arrives_s=60 * number)
    made.run()
    assert made.counts == (0, 0)
    assert made.stats.prompt_tokens == made.stats.prefix_asked_tokens == 3 * (len(prompt) + 1)


def test_what_a_running_sequence_holds_is_copied_and_it_goes_on():
    made = Made()
    made.submit(SYSTEM + b"!#", 200)
    second = made.submit(SYSTEM + b"$", arrives_s=10)
    made.run()
    assert made.counts == (1, 512)
    assert first_token_s(second) < 2


def test_beside_running_answers_a_copy_is_made_in_parts():
    made = Made()
    made.submit(SYSTEM + b"!#", 200)
    made.submit(SYSTEM + b"$", arrives_s=10)
    parts = []
    copy = made.cache.copy
    made.cache.copy = lambda source, target, length: (parts.append(length), copy(source, target, length))
    made.run()
    assert parts == [MOST_TOKENS * number for number in (1, 2, 3, 4)]


def test_a_device_that_cannot_copy_goes_on_in_place_alone():
    made = Made(can_copy=False)
    made.submit(SYSTEM + b"!#", 100)
    made.submit(SYSTEM + b"$", 100, arrives_s=10)
    made.submit(SYSTEM + b"%&(", arrives_s=60)
    made.run()
    assert made.counts == (1, 512)


def test_on_such_a_device_a_request_begins_beside_those_that_run():
    """A gap between two slots splits its step."""
    slots = Slots(StandInCache(8, 64, can_copy=False), 1 << 30, keeps=True)
    for _ in range(8):
        slots.take(20)
    for slot in range(8):
        slots._cache.append(slot, range(slot, slot + 20))
        slots.give(slot, list(range(slot, slot + 20)))
    assert [slots.take(20, 5, 16), slots.take(20), slots.take(20)] == [5, 4, 3]


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed_and_may_be_reused():
    made = Made()
    made.submit(SYSTEM + b"!")
    echo = made.submit(SYSTEM + b"#$", echo=True, arrives_s=60)
    made.submit(SYSTEM + b"#$%", arrives_s=120)
    made.run()
    assert len(echo.parts[-1][1].prompt_log_probs) == 513
    assert made.counts == (1, 514)


def test_prompts_that_come_together_and_begin_alike_are_computed_once():
    made = Made()
    for number in range(6):
        made.submit(SYSTEM + bytes([number] * 5))
    made.run()
    assert made.counts == (5, 5 * 512)
    assert made.stats.prompt_tokens == 512 + 6 * 5


def test_nobody_waits_for_a_prompt_that_takes_narrow_steps():
    """It gets the logits of all of its positions."""
    made = Made()
    echo, plain = made.submit(SYSTEM + b"!", echo=True), made.submit(SYSTEM + b"#")
    made.run()
    assert first_token_s(plain) < first_token_s(echo)


@pytest.mark.parametrize("count", [1, 2])
def test_who_waits_for_a_prompt_that_is_given_up_goes_on_with_what_there_is(count):
    made = Made()
    made.submit(SYSTEM + b"!", count=count, stop_s=3.0)
    made.submit(SYSTEM + b"#", count=count)
    made.submit(SYSTEM + b"$")
    made.simulation.at(3.0, lambda: made.simulation.engine.stop("0"))
    made.run()
    assert made.stats.ends["stopped"] == 1
    assert made.stats.prompt_tokens == 384 + 2 * (128 + 1)  # the two that wait took over 384


def test_a_conversation_that_shares_little_is_kept_for_its_own_next_turn():
    """It is copied into an empty slot; where there is none, it is continued in place."""
    for slots, kept in ((8, [0, 1]), (1, [0])):
        made = Made(slots=slots)
        made.submit(SYSTEM)
        made.submit(SYSTEM[:100] + b"+++++++", arrives_s=60)
        made.run()
        assert made.counts == (1, 100)
        assert list(made.slots.kept) == kept


def test_what_failed_is_not_kept():
    made = Made()
    made.submit(SYSTEM + b"!", writing_fails=2).reasons.add("writing")
    made.submit(SYSTEM + b"#", arrives_s=60)
    made.run()
    assert made.counts == (0, 0)


def test_a_step_that_fails_leaves_nothing_of_those_in_it():
    made = Made()
    made.submit(SYSTEM + b"!", 100).reasons.add("step")
    made.simulation.session.fails = lambda rows: 0 if 8 < made.simulation.clock.now < 8.2 else None
    made.submit(SYSTEM + b"#", arrives_s=60)
    made.run()
    assert made.stats.ends["failed"] == 1
    assert made.counts == (0, 0)


def test_what_was_used_least_recently_goes_first():
    made = Made(slots=3)
    prompts = [bytes([number]) * 40 for number in range(4)]
    for number, prompt in enumerate([*prompts[:3], prompts[0], prompts[3], prompts[0], prompts[2], prompts[1]]):
        made.submit(prompt, 1, arrives_s=10.0 * number)
    made.run()
    assert made.counts == (3, 3 * 39)  # the first one twice, the third once; the second one made room for the fourth


def test_what_is_kept_goes_before_a_request_would_wait_for_memory():
    cache = StandInCache(slots=3, positions=64)
    slots = Slots(cache, 3 * MEMORY_OF_16, keeps=True)
    for slot in range(3):
        assert slots.take(16) == slot
        cache.append(slot, [slot] * 16)
    for slot in (1, 2, 0):
        slots.give(slot, [slot] * 16)
    assert slots.kept_size == (48, 3 * MEMORY_OF_16)
    assert slots.fits(1, 32)  # 3,000 bytes: two of the three go, though the slot of one would do
    taken = slots.take(32)
    assert taken == 1
    assert list(slots.kept) == [0]
    assert cache.lengths == [16, 0, 0]
    assert slots.held_bytes == 3000 + MEMORY_OF_16 <= slots.budget


def test_a_sequence_that_goes_on_from_a_longer_one_gives_up_the_memory_behind():
    """The slot had more pages than the sequence may come to take."""
    cache = StandInCache(slots=1, positions=64)
    slots = Slots(cache, 5000, keeps=True)
    slots.take(64)
    cache.append(0, [1] * 64)
    slots.give(0, [1] * 64)
    slots.take(32, 0, 20)
    assert (cache.lengths, cache.touched) == ([20], [20])
    assert slots.held_bytes == slots.reserved_bytes == 3000
