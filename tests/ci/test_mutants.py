"""ci/mutants.py changes what has a meaning, one place at a time, and tells by which tests a change can be seen."""

from __future__ import annotations

from pathlib import Path

import pytest

TEXT = '''"""A docstring of 1 line."""
import logging

logger = logging.getLogger(__name__)
LIMIT: int = 3


class Box:
    def full(self, count: int, *, strict: bool = False) -> bool:
        """1 < 2."""
        logger.debug("%s of %s", count, 7)
        assert count > 0
        if strict and count:
            raise ValueError(f"found {count + 1}")
        self.count = count
        return count <= LIMIT


def tail(names: list[str], start: int) -> list[str]:
    """The rest."""
    kept = [name for name in names[start:] if name]
    return sorted(kept, key=len)
'''
EXPECTED = [
    "3 -> 4",
    "3 -> 2",
    "False -> True",
    "strict and count -> not (strict and count)",
    "strict and count -> (strict or count)",
    'raise ValueError(f"found {count + 1}") -> pass',
    "self.count = count -> pass",
    "return count <= LIMIT -> return None",
    "count <= LIMIT -> (count < LIMIT)",
    "name -> not (name)",
    "start -> (start + 1)",
    "return sorted(kept, key=len) -> return None",
    "sorted(..., key=len) -> without",
]


@pytest.fixture
def finder(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "ci")
    import mutant_finder

    return mutant_finder.Finder("box.py", TEXT)


def test_the_mutants_of_a_file_are_those_counted_by_hand(finder):
    assert sorted(mutant.shown for mutant in finder.found) == sorted(EXPECTED)


def test_every_mutant_is_another_program_that_compiles(finder):
    texts = {TEXT.encode()[: m.begin] + m.after.encode() + TEXT.encode()[m.end :] for m in finder.found}
    assert len(texts - {TEXT.encode()}) == len(finder.found)
    for text in texts:
        compile(text, "box.py", "exec")


def test_a_mutant_knows_the_function_around_it_as_python_calls_it(finder):
    functions = {mutant.shown: mutant.function for mutant in finder.found}
    names = {"box.py:Box.full": "self.count = count -> pass", "box.py:tail": "start -> (start + 1)", "": "3 -> 4"}
    for function, shown in names.items():
        assert functions[shown] == function
