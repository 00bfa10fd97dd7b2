"""Hands out the slots of a cache, within a budget of memory.

    slots = Slots(cache, budget=4_000_000_000)
    slots.fits(2, positions=700)       # whether two sequences of so many positions can begin
    slot = slots.take(positions=700)
    slots.give(slot)

A sequence reserves what it may take at most, so that no sequence that has begun must wait for memory. A slot that is
given back keeps its pages for the next sequence, and gives them to the system when others need the memory.
"""

from __future__ import annotations

from typing import Protocol


class SlotCache(Protocol):
    """The parts of `trt_build.ort.cache.Cache` that are used here."""

    num_slots: int
    positions: int
    lengths: list[int]

    @property
    def can_copy(self) -> bool:
        """Whether a slot can take over what another one holds."""

    def bytes_of(self, positions: int) -> int:
        """Bytes of memory that so many positions of one slot take at most."""

    def shorten(self, slot: int, length: int) -> None:
        """Drop the positions of a slot from `length` on."""

    def release(self, slot: int) -> None:
        """Empty a slot and give its memory back to the system."""


class Slots:
    """Which slots are free, what each running sequence has reserved, and what each free slot still holds."""

    def __init__(self, cache: SlotCache, budget: int) -> None:
        self.budget = budget
        self._cache = cache
        self._reserved: dict[int, int] = {}  # slot -> bytes, of running sequences
        self._kept = [0] * cache.num_slots  # bytes of a slot's pages that may be in memory

    @property
    def can_copy(self) -> bool:
        """Whether a slot can take over what another one holds."""
        return self._cache.can_copy

    @property
    def num_slots(self) -> int:
        return self._cache.num_slots

    @property
    def num_free(self) -> int:
        return self.num_slots - len(self._reserved)

    @property
    def taken(self) -> list[int]:
        """The slots of running sequences."""
        return list(self._reserved)

    @property
    def reserved_bytes(self) -> int:
        """What the running sequences may take at most."""
        return sum(self._reserved.values())

    @property
    def held_bytes(self) -> int:
        """What all slots may have in memory."""
        return sum(max(kept, self._reserved.get(slot, 0)) for slot, kept in enumerate(self._kept))

    def most_positions(self, count: int) -> int:
        """The most positions that the budget allows to each of `count` sequences, if nothing else runs."""
        low, high = 0, self._cache.positions
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if count * self._cache.bytes_of(middle) <= self.budget else (low, middle - 1)
        return low

    def fits(self, count: int, positions: int) -> bool:
        """Whether `count` sequences of so many positions can begin beside those that run."""
        return count <= self.num_free and self.reserved_bytes + count * self._cache.bytes_of(positions) <= self.budget

    def take(self, positions: int) -> int:
        """The lowest free slot, so that the slots that a step covers lie close together. Call `fits` first.

        A slot that kept more than the sequence may take is emptied: beside the sequence that could not be done later.
        """
        slot = next(slot for slot in range(self.num_slots) if slot not in self._reserved)
        self._reserved[slot] = self._cache.bytes_of(positions)
        if self._kept[slot] > self._reserved[slot]:
            self._release(slot)
        idle = sorted((s for s in range(self.num_slots) if s not in self._reserved), key=self._kept.__getitem__)
        while self.held_bytes > self.budget:
            self._release(idle.pop())
        return slot

    def count_all(self, slot: int) -> None:
        """Count all that the sequence in a slot has reserved as in memory, where it is not known what was written."""
        self._kept[slot] = self._reserved[slot]

    def give(self, slot: int) -> None:
        """Free a slot. Its pages stay in memory until others need it."""
        self._kept[slot] = max(self._kept[slot], self._cache.bytes_of(self._cache.lengths[slot]))
        del self._reserved[slot]
        self._cache.shorten(slot, 0)

    def _release(self, slot: int) -> None:
        self._cache.release(slot)
        self._kept[slot] = 0
