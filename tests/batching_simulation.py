"""Simulates an engine of sequences: what clients get, and when, for a cost of steps."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from batching_standins import VOCABULARY, BrokenInvariantError, Client, Clock, Cost, StandInCache, StandInSession, Wish

from triton_repo.runtime.batching.engine import SequenceEngine
from triton_repo.runtime.batching.memory.slots import Slots
from triton_repo.runtime.batching.scheduler import Limits

_MOST_STEPS = 50_000  # more than any test needs


class Simulation:
    """An engine of sequences over a stand-in session. What clients do happens at its time, in the middle of steps too.

    simulation = Simulation(Cost(), slots=8)
    client = simulation.submit(Wish(number=1, prompt=b"...", most_tokens=5, arrives_s=2.0))
    simulation.run()
    client.parts
    """

    def __init__(
        self,
        cost: Cost,
        *,
        slots: int = 8,
        positions: int = 2048,
        budget: float = 1.0,
        limits: Limits | None = None,
        salt: int = 0,
        broken_one_in: int = 0,
        surprise_one_in: int = 1,
        can_copy: bool = True,
        keeps: bool = False,
        drafts: bool = False,
        post: Callable[[Callable[[], object]], object] = lambda action: action(),
    ) -> None:
        """`budget` is a share of what all slots may take; `keeps` says whether free slots keep tokens. `salt`,
        `broken_one_in` and `surprise_one_in` are those of the logits."""
        self.clock, self.cache = Clock(), StandInCache(slots, positions, can_copy=can_copy)
        self.session = StandInSession(
            cost, salt=salt, broken_one_in=broken_one_in, surprise_one_in=surprise_one_in, advance=self.advance
        )
        num_bytes = int(budget * slots * self.cache.bytes_of(positions))
        self.engine = SequenceEngine(
            self.session, self.cache, Slots(self.cache, num_bytes, keeps=keeps), num_tokens=VOCABULARY,
            limits=limits or Limits(slots=slots), drafts=drafts, clock=self.clock, post=post,
        )  # fmt: skip
        self.scheduler = self.engine._scheduler
        self.log: list[tuple[float, int, object]] = []  # what clients got: when, number of the wish, what
        self.step_ends: list[float] = []
        self.after_event: Callable[[], object] = lambda: None
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()

    def at(self, moment_s: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._events, (moment_s, next(self._order), action))

    def submit(self, wish: Wish) -> Client:
        """Have a client send its request when it arrives. A refusal is its error."""
        client = Client(wish, self.clock, self.log)
        self.at(wish.arrives_s, lambda: client.submit(self.engine))
        return client

    def advance(self, seconds: float) -> None:
        """Let time pass, with what happens meanwhile."""
        until = self.clock.now + seconds
        while self._events and self._events[0][0] <= until:
            moment_s, _, action = heapq.heappop(self._events)
            self.clock.now = max(self.clock.now, moment_s)
            action()
            self.after_event()
        self.clock.now = until

    def wait(self) -> bool:
        """Let time pass until something happens. False if nothing will."""
        if self._events:
            self.advance(max(0.0, self._events[0][0] - self.clock.now))
            return True
        return False

    def run(self) -> None:
        """Step until there is nothing to compute and nobody comes."""
        for _ in range(_MOST_STEPS):
            if self.engine.step():
                self.step_ends.append(self.clock.now)
                self.engine.look()
            elif not self.wait():
                return
        raise BrokenInvariantError("the engine does not come to an end")
