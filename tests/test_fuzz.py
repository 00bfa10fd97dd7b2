"""Every reader on a hundred damaged inputs; ci/fuzz.py does the same for longer and with other seeds."""

from __future__ import annotations

import time

import pytest
from fuzz_readers import READERS
from fuzz_requests import answer_alone, answer_in_steps, damaged_requests
from fuzzing import MAX_SECONDS, faults

from triton_repo.errors import RequestError


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damaged_inputs_are_taken_or_refused_in_bounds(reader, tmp_path):
    assert faults(reader, seed=9, inputs=100, folder=tmp_path) == []


@pytest.mark.parametrize("answer", [answer_alone, answer_in_steps])
@pytest.mark.parametrize("seed", [1, 2])
def test_requests_at_the_ends_of_every_range_are_answered_or_refused(answer, seed):
    answered, refusals = 0, []
    for request in damaged_requests(seed, 300):
        started = time.perf_counter()
        try:
            answered += bool(answer(request))
        except RequestError as error:
            refusals.append(str(error))
        assert time.perf_counter() - started < MAX_SECONDS
    assert 20 < answered < 280
    assert all(text.startswith(("reading the request:", "choosing a token: bad_words")) for text in refusals)
    assert max(len(f"INVALID_ARGUMENT: {text}".encode()) for text in refusals) < 2000
