"""Stop words, as text and as tokens.

Pieces of text in, text without what follows a stop word out:

    watcher = StopWatcher(("\\n\\n",))
    watcher.push("a\\n")   # ("a", False): the line feed may be the beginning of the stop word
    watcher.push("\\n b")  # ("", True)

The word that is complete first wins, whatever the pieces; of two that end together, the longer.
`TokenWatcher` tells when the latest tokens are one of several sequences, as engines match them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopWatcher:
    """Keeps back what could be the beginning of a stop word, and nothing else."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = words
        self._kept = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; returns what may be given out, and whether a stop word was met (the text then ends before it)."""
        self._kept += text
        found = [(start + len(word), start) for word in self._words if (start := self._kept.find(word)) >= 0]
        if found:
            _, start = min(found)
            piece, self._kept = self._kept[:start], ""
            return piece, True
        safe = len(self._kept) - max((_overlap(self._kept, word) for word in self._words), default=0)
        piece, self._kept = self._kept[:safe], self._kept[safe:]
        return piece, False

    def flush(self) -> str:
        """The text kept back, when no more is coming."""
        piece, self._kept = self._kept, ""
        return piece


class TokenWatcher:
    """Remembers as many tokens as the longest sequence has, and no more."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._sequences = [list(sequence) for sequence in sequences]
        self._recent: deque[int] = deque(maxlen=max(map(len, self._sequences), default=0))

    def push(self, token_id: int) -> bool:
        """Add a token; whether the tokens end with one of the sequences."""
        self._recent.append(token_id)
        return any(self._ends_with(sequence) for sequence in self._sequences)

    def completing(self) -> set[int]:
        """The tokens that would complete a sequence if they came next."""
        return {sequence[-1] for sequence in self._sequences if self._ends_with(sequence[:-1])}

    def _ends_with(self, sequence: list[int]) -> bool:
        return not sequence or list(self._recent)[-len(sequence) :] == sequence


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that begins `word` without being it."""
    longest = min(len(text), len(word) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(word[:size])), 0)
