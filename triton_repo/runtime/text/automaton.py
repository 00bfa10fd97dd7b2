"""Looks for many sequences at once, in time that does not grow with their number: the automaton of Aho and Corasick
(Efficient string matching: an aid to bibliographic search, Communications of the ACM 18, 1975).

    automaton = Automaton(["he", "she"])
    state = automaton.step(automaton.step(ROOT, "h"), "e")
    automaton.matched[state]     # 2: "he" ends here
    automaton.depth[state]       # 2: length of the longest end of the input that begins a sequence

A sequence is a text or a sequence of token ids. Packages for this (pyahocorasick 2.3, ahocorasick-rs 1.0) report
matches only. Here the state is needed too, to try a candidate without taking it, and so is its depth, which says how
much text to keep back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

ROOT = 0
Symbol = TypeVar("Symbol", str, int)


class Automaton(Generic[Symbol]):
    """Building takes time linear in the total length of the sequences. A step takes constant time on average over the
    input, and at most the length of the longest sequence. Empty sequences are ignored.
    """

    def __init__(self, sequences: Iterable[Sequence[Symbol]]) -> None:
        self.edges: list[dict[Symbol, int]] = [{}]
        self.depth = [0]
        self.matched = [0]  # length of the longest sequence that ends in the state; 0 for none
        self.ends = [False]  # whether the state is itself the end of a sequence
        for sequence in sequences:
            self._add(sequence)
        self.fallback = [ROOT] * len(self.edges)  # state of the longest proper end that begins a sequence
        self._link()

    def _add(self, sequence: Sequence[Symbol]) -> None:
        state = ROOT
        for symbol in sequence:
            next_state = self.edges[state].get(symbol)
            if next_state is None:
                next_state = len(self.edges)
                self.edges[state][symbol] = next_state
                self.edges.append({})
                self.depth.append(self.depth[state] + 1)
                self.matched.append(0)
                self.ends.append(False)
            state = next_state
        if state != ROOT:
            self.matched[state] = self.depth[state]
            self.ends[state] = True

    def _link(self) -> None:
        waiting = deque(self.edges[ROOT].values())
        while waiting:
            state = waiting.popleft()
            for symbol, next_state in self.edges[state].items():
                self.fallback[next_state] = self.step(self.fallback[state], symbol)
                self.matched[next_state] = self.matched[next_state] or self.matched[self.fallback[next_state]]
                waiting.append(next_state)

    def step(self, state: int, symbol: Symbol) -> int:
        """The state after one more symbol."""
        while True:
            next_state = self.edges[state].get(symbol)
            if next_state is not None:
                return next_state
            if state == ROOT:
                return ROOT
            state = self.fallback[state]
