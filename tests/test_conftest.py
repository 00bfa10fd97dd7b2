"""What `tests/conftest.py` sets for every test."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import threadpoolctl


def test_matrices_are_multiplied_in_one_thread_here_and_in_started_processes():
    assert np.dot(np.ones(2), np.ones(2)) == 2
    pools = threadpoolctl.threadpool_info()
    assert {pool["num_threads"] for pool in pools if pool["internal_api"] == "openblas"} == {1}
    code = "import numpy, threadpoolctl; print({pool['num_threads'] for pool in threadpoolctl.threadpool_info()})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{1}\n"


def test_what_was_collected_is_not_searched_for_cycles():
    assert gc.isenabled()
    assert gc.get_freeze_count() > 10_000
