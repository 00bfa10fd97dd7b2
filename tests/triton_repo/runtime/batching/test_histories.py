"""Random histories of the engine of sequences; ci/batching_histories.py runs ten thousand of them."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
from batching_histories import run_history

HISTORIES = 400
PARTS = 8


@pytest.fixture(autouse=True)
def _without_the_log():
    """Clients that cannot be told of their errors are logged with a traceback, thousands of times."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("part", range(PARTS))
def test_no_invariant_is_broken_in_random_histories(part):
    counts: Counter[str] = Counter()
    for seed in range(part, HISTORIES, PARTS):
        counts += run_history(seed).counts
    for what in (
        "answered",
        "ended early",
        "refused",
        "failed steps",
        "failed alone",
        "waited too long",
        "prefix hits",
        "tokens accepted",
    ):
        assert counts[what] > 0, f"the histories have too few of the kind: {what}"


@pytest.mark.parametrize("seed", range(200, 1000, 100))
def test_a_history_is_the_same_each_time(seed):
    first, second = run_history(seed).simulation, run_history(seed).simulation
    assert first.log
    assert first.log == second.log
    assert first.engine.stats.ends == second.engine.stats.ends
