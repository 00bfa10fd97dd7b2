"""The memory of slots: a page of the stand-in has 16 positions and 1,000 bytes, and a slot takes one page more."""

from __future__ import annotations

import pytest
from batching_standins import StandInCache

from triton_repo.runtime.batching.memory.slots import Slots

PAGES_OF_32 = 3000


def run(slots: Slots, cache: StandInCache, positions: int, *, used: int) -> int:
    """Take a slot for so many positions and write `used` of them."""
    assert slots.fits(1, positions)
    slot = slots.take(positions)
    cache.append(slot, [1] * used)
    return slot


def test_what_runs_may_take_the_budget_and_not_one_page_more():
    cache = StandInCache(slots=4, positions=64)
    slots = Slots(cache, 2 * PAGES_OF_32)
    assert slots.fits(2, 32)
    assert not slots.fits(2, 33)
    assert not slots.fits(3, 32)
    run(slots, cache, 32, used=32)
    assert slots.fits(1, 32)
    assert not slots.fits(1, 33)
    assert slots.most_positions(2) == 32
    assert slots.most_positions(7) == 0


def test_there_are_as_many_sequences_as_slots():
    slots = Slots(StandInCache(slots=2, positions=64), 100 * PAGES_OF_32)
    assert slots.fits(2, 32)
    assert not slots.fits(3, 32)


def test_a_free_slot_keeps_its_pages_until_others_need_them():
    cache = StandInCache(slots=2, positions=64)
    slots = Slots(cache, 2 * PAGES_OF_32)
    first = run(slots, cache, 32, used=20)
    slots.give(first)
    assert cache.lengths[first] == 0
    assert (slots.reserved_bytes, slots.held_bytes, cache.touched_bytes) == (0, PAGES_OF_32, PAGES_OF_32)
    assert run(slots, cache, 32, used=32) == first
    slots.give(first)
    other = slots.take(48)
    assert other == first
    assert cache.touched[other] == 32  # as much as the sequence may take anyway


@pytest.mark.parametrize("first_uses", [10, 48])
def test_a_short_sequence_in_a_slot_that_held_a_long_one_does_not_keep_its_memory(first_uses):
    cache = StandInCache(slots=2, positions=64)
    slots = Slots(cache, 5000)
    slots.give(run(slots, cache, 48, used=first_uses))
    run(slots, cache, 1, used=1)  # takes 2000 bytes
    run(slots, cache, 32, used=32)
    assert slots.reserved_bytes == 5000
    assert cache.touched_bytes <= slots.held_bytes == 5000


def test_a_step_that_failed_may_have_written_all_that_was_reserved():
    cache = StandInCache(slots=2, positions=64)
    slots = Slots(cache, 2 * PAGES_OF_32)
    slot = run(slots, cache, 32, used=1)
    slots.count_all(slot)
    slots.give(slot)
    assert slots.held_bytes == PAGES_OF_32
