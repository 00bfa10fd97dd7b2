"""Measures the memory read bandwidth of this machine, which limits the speed of decoding.

Each thread sums its share of a buffer that is larger than any cache. This is repeated several times, and the fastest
repetition counts, as in McCalpin's STREAM. numpy is enough: its sum of unsigned integers is vectorised and releases
Python's global interpreter lock.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from export.errors import ConfigError

NUM_BYTES = 4_000_000_000  # several times the largest cache of a server
NUM_TURNS = 5
_ITEM_BYTES = 8


def measure_read_bandwidth(num_bytes: int = NUM_BYTES, threads: int | None = None) -> float:
    """Bytes per second that `threads` threads (None: one for each core this process may use) read together.

    Allocates `num_bytes`. Raises ConfigError if `num_bytes` is too small for the threads or too large for the memory.
    """
    count = threads if threads is not None else len(os.sched_getaffinity(0))
    if count < 1 or num_bytes < count * _ITEM_BYTES:
        raise ConfigError(
            f"measuring the read bandwidth: found {num_bytes} bytes for {count} threads, expected at least one thread "
            f"and {_ITEM_BYTES} bytes for each"
        )
    try:
        buffer = np.ones(num_bytes // _ITEM_BYTES, dtype=np.uint64)  # ones, as writing allocates every page
    except MemoryError as error:
        raise ConfigError(
            f"measuring the read bandwidth: no memory for a buffer of {num_bytes / 1e9:.2f} GB; measure a smaller one"
        ) from error
    shares = np.array_split(buffer, count)
    fastest = float("inf")
    with ThreadPoolExecutor(max_workers=count) as pool:
        for _ in range(NUM_TURNS):
            started = time.perf_counter()
            total = sum(int(part) for part in pool.map(np.add.reduce, shares))
            fastest = min(fastest, time.perf_counter() - started)
            if total != len(buffer):
                raise AssertionError(f"a turn summed {total} ones, expected {len(buffer)}")
    return buffer.nbytes / fastest
