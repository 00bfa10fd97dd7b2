"""Finds out what some finite text can meet, where each part of a guide needs others: all of them, or any.

    needs = Needs()
    tree = needs.later()
    needs.define(tree, needs.any_of([needs.all_of([]), tree]))     # nothing, or a tree
    needs.can_be_met(tree)      # True

This is the least fixed point over the parts: nothing can be met at first, then what needs nothing, then what needs
only that. Each need is looked at once, so that the work grows with the guide and no guide makes it more.
"""

from __future__ import annotations

from collections.abc import Sequence


class Needs:
    """The parts of one guide, by number."""

    def __init__(self) -> None:
        self._missing: list[int] = []  # how many more of its needs a part waits for
        self._users: list[list[int]] = []  # the parts that need it

    def all_of(self, parts: Sequence[int]) -> int:
        """A part that needs all of these. Of none: one that can be met."""
        return self._new(parts, len(parts))

    def any_of(self, parts: Sequence[int]) -> int:
        """A part that needs one of these. Of none: one that cannot be met."""
        return self._new(parts, 1)

    def later(self) -> int:
        """A part that `define` says more of."""
        return self._new((), 1)

    def define(self, part: int, other: int) -> None:
        """A part of `later` can be met where the other one can."""
        self._users[other].append(part)

    def can_be_met(self, part: int) -> bool:
        """Whether some finite text meets a part. Call it once, when every part is there."""
        waiting = [number for number, missing in enumerate(self._missing) if not missing]
        while waiting:
            for user in self._users[waiting.pop()]:
                self._missing[user] -= 1
                if not self._missing[user]:
                    waiting.append(user)
        return self._missing[part] <= 0

    def _new(self, parts: Sequence[int], missing: int) -> int:
        number = len(self._missing)
        self._missing.append(missing)
        self._users.append([])
        for part in parts:
            self._users[part].append(number)
        return number
