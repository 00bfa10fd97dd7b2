"""Every reader on some hundreds of damaged inputs; ci/fuzz.py does the same for longer and with other seeds."""

from __future__ import annotations

import pytest
from fuzz_readers import READERS
from fuzzing import faults


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damaged_inputs_are_taken_or_refused_in_bounds(reader, tmp_path):
    assert faults(reader, seed=9, inputs=250, folder=tmp_path) == []
