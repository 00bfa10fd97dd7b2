"""Finds stop and bad words in text and in tokens. The cost does not grow with the number of words.

`StopWatcher` takes pieces of text and gives the text before a stop word:

    watcher = StopWatcher(("\\n\\n",))
    watcher.push("a\\n")   # ("a", False): the line feed may begin the stop word
    watcher.push("\\n b")  # ("", True)

The word that is complete first counts, whatever the pieces; if two end at the same place, the longer one does.
`TextWatcher` says whether a text would complete one of several words. `TokenWatcher` says when the latest tokens are
one of several sequences, as engines match them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.text.automaton import ROOT, Automaton

Ids = npt.NDArray[np.int64]


class StopWatcher:
    """Gives out text up to a stop word. Keeps back only what could be the beginning of a stop word."""

    def __init__(self, words: Sequence[str]) -> None:
        self._automaton = Automaton(words)
        self._state = ROOT
        self._kept = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text. Returns the text to give out, and whether a stop word was met; the text then ends before the
        word."""
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
        """The text that was kept back. Call it when no more text comes."""
        piece, self._kept, self._state = self._kept, "", ROOT
        return piece


class TextWatcher:
    """Says whether further text would complete one of several words."""

    def __init__(self, words: Sequence[str]) -> None:
        self._automaton = Automaton(words)
        self._state = ROOT

    def push(self, text: str) -> None:
        """Add text."""
        for letter in text:
            self._state = self._automaton.step(self._state, letter)

    def would_match(self, text: str) -> bool:
        """Whether a word would become complete within `text` if `text` came next. Adds nothing."""
        state = self._state
        for letter in text:
            state = self._automaton.step(state, letter)
            if self._automaton.matched[state]:
                return True
        return False


class TokenWatcher:
    """Says when the latest tokens are one of several sequences, and which tokens would complete one."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._automaton = Automaton(sequences)
        self._state = ROOT
        automaton = self._automaton
        self._last: dict[int, Ids] = {}  # state to the tokens that complete a sequence there
        for state, edges in enumerate(automaton.edges):
            last = [token for token, next_state in edges.items() if automaton.ends[next_state]]
            if last:
                self._last[state] = np.array(last, dtype=np.int64)

    def push(self, token_id: int) -> bool:
        """Add a token. Returns whether the tokens end with one of the sequences."""
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
