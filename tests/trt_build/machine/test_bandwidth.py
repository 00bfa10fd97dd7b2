"""The measured read bandwidth: what it reads, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from export.errors import ConfigError
from trt_build.machine import bandwidth
from trt_build.machine.bandwidth import measure_read_bandwidth


def test_the_rate_is_the_buffer_over_the_fastest_turn(monkeypatch):
    # Each turn asks the clock twice: turns of 5, 4, 2, 3 and 6 seconds.
    clock = iter([0, 5, 10, 14, 20, 22, 30, 33, 40, 46])
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(clock))
    assert measure_read_bandwidth(num_bytes=8_000_000, threads=3) == 4_000_000


def test_a_turn_that_leaves_bytes_out_is_caught(monkeypatch):
    whole = np.array_split
    monkeypatch.setattr(bandwidth.np, "array_split", lambda buffer, count: whole(buffer, count)[1:])
    with pytest.raises(AssertionError, match="a turn summed 666666 ones, expected 1000000"):
        measure_read_bandwidth(num_bytes=8_000_000, threads=3)


@pytest.mark.parametrize(("num_bytes", "threads"), [(7, 1), (100, 0), (16, 3)])
def test_a_buffer_that_cannot_be_shared_out_is_refused(num_bytes, threads):
    with pytest.raises(ConfigError, match=f"found {num_bytes} bytes for {threads} threads, expected at least one"):
        measure_read_bandwidth(num_bytes=num_bytes, threads=threads)


def test_a_buffer_that_memory_does_not_hold_is_refused():
    with pytest.raises(ConfigError, match=r"no memory for a buffer of .* GB; measure a smaller one"):
        measure_read_bandwidth(num_bytes=1 << 60)
