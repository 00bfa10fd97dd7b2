"""Stop words as text: pieces of text in, text without what follows a stop word out.

    watcher = StopWatcher(("\\n\\n",))
    watcher.push("a\\n")   # ("a", False): the line feed may be the beginning of the stop word
    watcher.push("\\n b")  # ("", True)

The word that is complete first wins, whatever the pieces; of two that end together, the longer.
"""

from __future__ import annotations


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


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that begins `word` without being it."""
    longest = min(len(text), len(word) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(word[:size])), 0)
