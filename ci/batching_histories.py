"""Run random histories of the engine of sequences: python ci/batching_histories.py --histories 10000

The histories and what must hold in them are those of tests/batching_histories.py. A number of --first begins elsewhere.
Exit status 1 where an invariant was broken; each such history is named, and is repeated by --first N --histories 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from batching_histories import run_history  # noqa: E402 - found through the path above

BATCH = 100
MOST_FAULTS = 20


def run_batch(seeds: range) -> tuple[Counter[str], list[str]]:
    """What became of the requests, and the faults."""
    logging.disable()  # errors that clients cannot be told of are logged
    counts: Counter[str] = Counter()
    faults = []
    for seed in seeds:
        try:
            counts += run_history(seed).counts
        except AssertionError as error:
            faults.append(str(error))
    return counts, faults


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--histories", type=int, default=10_000, metavar="N", help="default %(default)s")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first (default %(default)s)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="at a time (default %(default)s)")
    options = parser.parse_args(argv)
    stop = options.first + options.histories
    batches = [range(first, min(first + BATCH, stop)) for first in range(options.first, stop, BATCH)]
    counts: Counter[str] = Counter()
    faults: list[str] = []
    started = time.perf_counter()
    with ProcessPoolExecutor(options.processes) as pool:
        for found, broken in pool.map(run_batch, batches):
            counts += found
            faults += broken
    for fault in faults[:MOST_FAULTS]:
        print(fault)
    print(", ".join(f"{number} {what}" for what, number in sorted(counts.items())))
    print(f"{options.histories} histories, {len(faults)} faults, {time.perf_counter() - started:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
