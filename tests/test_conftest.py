"""What `tests/conftest.py` sets for every test."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

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


def test_a_run_that_loaded_sentencepiece_ends_with_the_status_of_its_tests(tmp_path):
    """`tests/export/tokenizer/test_qwen.py` has transformers load it, after torch."""
    file = Path(__file__).parent / "export" / "tokenizer" / "test_qwen.py"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    words = ["-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "of-it"), str(file), "--maxfail", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "-k", "qwen3_moe and template"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, " passed" in done.stdout) == (0, True), done.stdout[-2000:] + done.stderr[-2000:]
