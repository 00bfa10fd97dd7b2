"""Hands out the slots of a cache, within a budget of memory, and keeps what ended sequences left in them.

    slots = Slots(cache, budget=4_000_000_000, keeps=True)
    slots.fits(2, positions=700)       # whether two sequences of so many positions can begin
    slot = slots.take(positions=700)
    slots.give(slot, tokens)           # the slot goes on holding the keys and values of these tokens
    slots.kept                         # slot -> tokens, the least recently used first
    slots.take(positions=700, slot=slot, length=512)    # a sequence continues the first 512 of them

A sequence reserves what it may take at most, so that no sequence that has begun must wait for memory. A slot that is
given back keeps its pages, and may keep its tokens, for the next sequence. Both go when others need the slot or the
memory: first the pages of slots without tokens, then the tokens that were used least recently. What is kept therefore
never makes a request wait.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol

from triton_repo.runtime.batching.memory.prefixes import LEAST_TOKENS


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

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Have a slot go on, from what it holds, with what another one holds up to `length`."""

    def shorten(self, slot: int, length: int) -> None:
        """Drop the positions of a slot from `length` on."""

    def release(self, slot: int, length: int = 0) -> None:
        """Drop the positions of a slot from `length` on and give their memory back to the system."""


class Slots:
    """Which slots are free, what each running sequence has reserved, and what each free slot still holds."""

    def __init__(self, cache: SlotCache, budget: int, *, keeps: bool = False) -> None:
        """`keeps`: whether free slots keep tokens."""
        self.budget, self.keeps = budget, keeps
        self.kept: dict[int, list[int]] = {}  # free slot -> tokens whose keys and values it holds, the oldest use first
        self._cache = cache
        self._reserved: dict[int, int] = {}  # slot -> bytes, of running sequences
        self._pages = [0] * cache.num_slots  # bytes of a slot's pages that may be in memory

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
        return sum(max(pages, self._reserved.get(slot, 0)) for slot, pages in enumerate(self._pages))

    @property
    def kept_size(self) -> tuple[int, int]:
        """The tokens that free slots keep, and the bytes of their keys and values."""
        lengths = [len(tokens) for tokens in self.kept.values()]
        return sum(lengths), sum(map(self._cache.bytes_of, lengths))

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

    def can_spare(self, slot: int, count: int, positions: int) -> bool:
        """Whether they can begin without the slot, which is free, and copy what it keeps."""
        needed = self._pages[slot] + count * self._cache.bytes_of(positions)
        return self.can_copy and count < self.num_free and self.reserved_bytes + needed <= self.budget

    def take(self, positions: int, slot: int | None = None, length: int = 0) -> int:
        """A free slot for a sequence of so many positions: an empty one, or the one that goes on from the first
        `length` of the tokens that the free slot `slot` keeps. Call `fits` first.

        A slot with more pages than the sequence may take gives them up: beside the sequence that could not be done.
        """
        slot = self._next() if slot is None else slot
        self.kept.pop(slot, None)
        self._cache.shorten(slot, length)
        self._reserved[slot] = self._cache.bytes_of(positions)
        if self._pages[slot] > self._reserved[slot]:
            self._cache.release(slot, length)
            self._pages[slot] = self._cache.bytes_of(length)
        while self.held_bytes > self.budget:
            self._release(self._least_needed())
        return slot

    def copy(self, source: int, target: int, length: int) -> None:
        """Have a slot go on, from what it holds, with what another one holds up to `length`."""
        self._cache.copy(source, target, length)

    def shorten(self, slot: int, length: int) -> None:
        """Drop the positions of a slot from `length` on, whose sequence goes on. Their pages stay in memory."""
        self._pages[slot] = max(self._pages[slot], self._cache.bytes_of(self._cache.lengths[slot]))
        self._cache.shorten(slot, length)

    def touch(self, slot: int) -> None:
        """What the slot keeps, if it does, was used just now."""
        if slot in self.kept:
            self.kept[slot] = self.kept.pop(slot)

    def count_all(self, slot: int) -> None:
        """Count all that the sequence in a slot has reserved as in memory, where it is not known what was written."""
        self._pages[slot] = self._reserved[slot]

    def give(self, slot: int, tokens: Items[int] = ()) -> None:
        """Free a slot. Its pages stay in memory until others need it, and so do the keys and values of the tokens that
        it holds, unless they are too few to be of use."""
        self._pages[slot] = max(self._pages[slot], self._cache.bytes_of(self._cache.lengths[slot]))
        del self._reserved[slot]
        if self.keeps and len(tokens) >= LEAST_TOKENS:
            self.kept[slot] = list(tokens)
        self._cache.shorten(slot, len(self.kept.get(slot, ())))

    def _next(self) -> int:
        """The lowest free slot without tokens, so that the slots that a step covers lie close together; else the one
        whose tokens were used least recently. On a device with its own memory a gap between two slots splits a step
        into two calls, so there a neighbour of a slot that is taken comes first."""
        free = [slot for slot in range(self.num_slots) if slot not in self._reserved and slot not in self.kept]
        free += self.kept
        if self.can_copy:
            return free[0]
        beside = [slot for slot in free if slot - 1 in self._reserved or slot + 1 in self._reserved]
        return (beside or free)[0]

    def _least_needed(self) -> int:
        """The free slot whose memory is given back first."""
        idle = [slot for slot in range(self.num_slots) if slot not in self._reserved and slot not in self.kept]
        most = max(idle, key=self._pages.__getitem__, default=None)
        return most if most is not None and self._pages[most] else next(iter(self.kept))

    def _release(self, slot: int) -> None:
        self.kept.pop(slot, None)
        self._cache.release(slot)
        self._pages[slot] = 0
