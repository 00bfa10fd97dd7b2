"""Checks the regular expressions of a tokenizer.json, and refuses those that can take too long on some text.

The tokenizers library matches with Oniguruma, which backtracks. A match is given up after ten million steps, which take
half a second, and then the library panics; and a match begins at every character of a text. A pattern is accepted if
the steps of a match grow at most linearly with the text:

- An unbounded repeat is of one character of a class, or of a group of fixed length that can match in one way only.
- Every path through the pattern has at most two unbounded repeats, and nothing after the second one can fail. Only a
  failure makes the matcher backtrack and distribute the characters over the repeats differently.
- There are no back references and no recursion.

The patterns of GPT-2, Llama 3, Qwen, DeepSeek and o200k fulfil this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from export.errors import shown

MAX_PATTERN = 4096  # most characters of a pattern
_MAX_DEPTH = 16
_MANY = 64  # repeats of up to this many count as bounded, of more as unbounded
_MAX_WAYS = 1024  # most ways to distribute characters over the bounded repeats of one path
_INTERVAL = re.compile(r"\{(\d*)(,?)(\d*)\}")
_GROUP = re.compile(r"\?(?:[imsxWDSPy-]*:|>|<\w+>|'\w+'|P<\w+>)")
_LOOK = re.compile(r"\?<?[=!]")
_FLAGS = re.compile(r"\?[imsxWDSPy-]+\)")
_NAMED_ESCAPE = re.compile(r"[pPxo]\{[^}]*\}")


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """What the check must know about a part of a pattern.

    `repeats` is the number of unbounded repeats on the worst path through the part. `ways` is the number of ways to
    distribute characters over the bounded repeats. `can_fail`: the part does not match every text. `fixed`: it has one
    path only, of fixed length. `ambiguous`: its repeats can match the same characters in several ways, so that a
    failure after the part would try them all.
    """

    repeats: int = 0
    ways: int = 1
    can_fail: bool = True
    fixed: bool = True
    ambiguous: bool = False


def check_patterns(component: Any) -> None:  # noqa: ANN401 - JSON value
    """Check every regular expression in the JSON of a normalizer, pre-tokenizer or decoder. Raises ValueError that
    names the first one that is refused."""
    for pattern in _patterns(component):
        check_pattern(pattern)


def check_pattern(pattern: str) -> None:
    """Check one regular expression. Raises ValueError with the reason if it is refused."""
    try:
        if len(pattern) > MAX_PATTERN:
            raise ValueError(f"it has {len(pattern)} characters, expected at most {MAX_PATTERN}")
        reader = _Reader(pattern)
        reader.alternatives(0)
        if reader.place < len(pattern):
            raise ValueError("it has one ) too many")
    except ValueError as error:
        raise ValueError(f"its pattern {shown(pattern)} can take unlimited time on some text: {error}") from error


def _patterns(component: Any) -> Iterator[str]:  # noqa: ANN401 - JSON value
    for key, value in component.items() if isinstance(component, dict) else enumerate(component):
        if key == "Regex" and isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            yield from _patterns(value)


class _Reader:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self.place = 0

    def alternatives(self, depth: int) -> _Piece:
        """Read alternatives up to the end or a closing parenthesis; returns the worst case over the branches."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {_MAX_DEPTH} groups")
        branches = [self._branch(depth)]
        while self._take("|"):
            branches.append(self._branch(depth))
        return _Piece(
            repeats=max(branch.repeats for branch in branches),
            ways=sum(branch.ways for branch in branches),
            can_fail=all(branch.can_fail for branch in branches),
            fixed=len(branches) == 1 and branches[0].fixed,
            ambiguous=any(branch.ambiguous for branch in branches),
        )

    def _branch(self, depth: int) -> _Piece:
        repeats, ways, can_fail, fixed, ambiguous = 0, 1, False, True, False
        while self.place < len(self._pattern) and self._pattern[self.place] not in "|)":
            piece = self._quantified(self._atom(depth))
            if piece.can_fail and (repeats > 1 or ambiguous):
                raise ValueError(
                    "what follows its repeats can fail, and then each way to divide the text among the repeats is tried"
                )
            repeats, ways = repeats + piece.repeats, ways * piece.ways
            can_fail, fixed = can_fail or piece.can_fail, fixed and piece.fixed
            ambiguous = ambiguous or piece.ambiguous
            if repeats > 2:
                raise ValueError("one way through it has more than two repeats without a bound")
            if ways > _MAX_WAYS:
                raise ValueError(f"its bounded repeats can divide characters in more than {_MAX_WAYS} ways")
        return _Piece(repeats=repeats, ways=ways, can_fail=can_fail, fixed=fixed, ambiguous=ambiguous)

    def _take(self, text: str) -> bool:
        found = self._pattern.startswith(text, self.place)
        self.place += len(text) if found else 0
        return found

    def _match(self, expression: re.Pattern[str]) -> re.Match[str] | None:
        found = expression.match(self._pattern, self.place)
        self.place = found.end() if found else self.place
        return found

    def _atom(self, depth: int) -> _Piece:
        letter = self._pattern[self.place]
        self.place += 1
        if letter == "(":
            return self._group(depth)
        if letter == "[":
            self._class(depth)
        elif letter == "\\":
            return self._escape()
        return _Piece()

    def _group(self, depth: int) -> _Piece:
        if self._match(_FLAGS):
            return _Piece(can_fail=False)
        look = self._match(_LOOK)
        if not look and self._pattern.startswith(("?", "*"), self.place) and not self._match(_GROUP):
            raise ValueError("it has a group of a kind that moeship does not read")
        inside = self.alternatives(depth + 1)
        if not self._take(")"):
            raise ValueError("one of its groups does not end")
        return _Piece(repeats=inside.repeats, ways=inside.ways, fixed=False) if look else inside

    def _class(self, depth: int) -> None:
        """Skip a character class after its opening bracket; it may contain other classes."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {_MAX_DEPTH} groups")
        self._take("^")
        if self._pattern.startswith("]", self.place):
            raise ValueError("one of its character classes begins with a bracket")
        while self.place < len(self._pattern):
            letter = self._pattern[self.place]
            self.place += 2 if letter == "\\" else 1
            if letter == "]":
                return
            if letter == "[":
                self._class(depth + 1)
        raise ValueError("one of its character classes does not end")

    def _escape(self) -> _Piece:
        if not self._match(_NAMED_ESCAPE):
            letter = self._pattern[self.place : self.place + 1]
            self.place += 1
            if letter in "123456789kg" or not letter:
                raise ValueError("it refers back to text that it matched before")
            if letter == "X":  # \X matches a letter with all its combining marks
                return _Piece(repeats=1, fixed=False)
        return _Piece()

    def _quantified(self, piece: _Piece) -> _Piece:
        while True:
            one, bounds = self._match(re.compile(r"[?*+]")), None
            if one:
                least, most = {"?": (0, 1), "*": (0, None), "+": (1, None)}[one[0]]
                self._match(re.compile(r"[?+]"))  # lazy or possessive
            else:
                bounds = _INTERVAL.match(self._pattern, self.place)
                if not bounds or not (bounds[1] or bounds[3]):
                    return piece
                self.place = bounds.end()
                least = int(bounds[1] or 0)
                most = int(bounds[3]) if bounds[3] else None if bounds[2] else least
                self._take("?")
            piece = _repeated(piece, least, most)


def _repeated(piece: _Piece, least: int, most: int | None) -> _Piece:
    """The piece, repeated `least` to `most` times (None: unbounded). Raises ValueError for a repeat of a repeat that
    could take too long."""
    can_fail = piece.can_fail and least > 0
    if most == least == 1:
        return piece
    bounded = most is not None and most <= _MANY
    if bounded and most is not None and piece.fixed:
        return _Piece(ways=most - least + 1, can_fail=can_fail, fixed=most == least)
    if bounded and most is not None:
        return _Piece(
            repeats=piece.repeats * most, ways=piece.ways ** min(most, 16) * (most - least + 1), can_fail=can_fail,
            fixed=False, ambiguous=piece.ambiguous,
        )  # fmt: skip
    if not piece.fixed and (piece.repeats or piece.ways > _MANY):
        raise ValueError("it applies a repeat to a repeat")
    return _Piece(repeats=1, can_fail=can_fail, fixed=False, ambiguous=not piece.fixed)
