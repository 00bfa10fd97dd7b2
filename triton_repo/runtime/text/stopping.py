"""Stop and bad words, as text and as tokens. What is read costs the same however many words there are.

Pieces of text in, text without what follows a stop word out:

    watcher = StopWatcher(("\\n\\n",))
    watcher.push("a\\n")   # ("a", False): the line feed may be the beginning of the stop word
    watcher.push("\\n b")  # ("", True)

The word that is complete first wins, whatever the pieces; of two that end together, the longer.
`TextWatcher` tells whether a text would complete one of several words, `TokenWatcher` when the latest tokens are one of
several sequences, as engines match them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.text.automaton import ROOT, Automaton

Ids = npt.NDArray[np.int64]


class StopWatcher:
    """Keeps back what could be the beginning of a stop word, and nothing else."""

    def __init__(self, words: Sequence[str]) -> None:
        self._automaton = Automaton(words)
        self._state = ROOT
        self._kept = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; returns what may be given out, and whether a stop word was met (the text then ends before it)."""
        automaton, state = self._automaton, self._state
        for place, letter in enumerate(text, start=1):
            state = automaton.step(state, letter)
            if matched := automaton.matched[state]:
                piece = (self._kept + text[:place])[:-matched]
                self._kept, self._state = "", ROOT
                return piece, True
        self._state = state
        whole = self._kept + text
        safe = len(whole) - automaton.depth[state]
        piece, self._kept = whole[:safe], whole[safe:]
        return piece, False

    def flush(self) -> str:
        """The text kept back, when no more is coming."""
        piece, self._kept, self._state = self._kept, "", ROOT
        return piece


class TextWatcher:
    """Remembers of a text which beginnings of words it ends with."""

    def __init__(self, words: Sequence[str]) -> None:
        self._automaton = Automaton(words)
        self._state = ROOT

    def push(self, text: str) -> None:
        """Add text."""
        for letter in text:
            self._state = self._automaton.step(self._state, letter)

    def would_match(self, text: str) -> bool:
        """Whether a word would be complete somewhere in `text` if it came next. Nothing is added."""
        state = self._state
        for letter in text:
            state = self._automaton.step(state, letter)
            if self._automaton.matched[state]:
                return True
        return False


class TokenWatcher:
    """Remembers of the tokens so far which beginnings of sequences they end with."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._automaton = Automaton(sequences)
        self._state = ROOT
        automaton = self._automaton
        self._last: dict[int, Ids] = {}  # state to the tokens that complete a sequence there
        for state, edges in enumerate(automaton.edges):
            last = [token for token, following in edges.items() if automaton.ends[following]]
            if last:
                self._last[state] = np.array(last, dtype=np.int64)

    def push(self, token_id: int) -> bool:
        """Add a token; whether the tokens end with one of the sequences."""
        self._state = self._automaton.step(self._state, token_id)
        return self._automaton.matched[self._state] > 0

    def completing(self) -> list[Ids]:
        """The tokens that would complete a sequence if they came next, as arrays that may overlap."""
        found, state = [], self._state
        while True:
            if state in self._last:
                found.append(self._last[state])
            if state == ROOT:
                return found
            state = self._automaton.fallback[state]
