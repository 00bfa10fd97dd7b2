"""A build that ends while the library's program runs: the program ends too, with all that it started."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trtllm.building import build, words
from trtllm.library import ROOT

WITHIN_S = 20


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def comes(what) -> bool:
    """Whether it becomes true in time."""
    deadline = time.monotonic() + WITHIN_S
    while not (found := what()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(found)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_the_librarys_program_ends_with_the_build(tmp_path, small_phixtral, trtllm_build, number, status):
    build(small_phixtral, tmp_path / "engine", until="checkpoint")
    told = tmp_path / "pids"
    worker = f"import os, time; open({str(told)!r}, 'a').write(str(os.getpid()) + '\\n'); time.sleep(120)"
    lines = ["import os, subprocess, sys", f"subprocess.Popen([sys.executable, '-c', {worker!r}])", worker]
    trtllm_build.write_text(f"#!{sys.executable}\n" + "\n".join(lines))
    script = [sys.executable, str(ROOT / "trt_build/build_engine.py"), *words(small_phixtral, tmp_path / "engine")]
    with subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert comes(lambda: told.is_file() and len(told.read_text().splitlines()) == 2)
        pids = [int(line) for line in told.read_text().splitlines()]
        process.send_signal(number)
        assert process.wait(WITHIN_S) == status
    if number == signal.SIGINT:  # nothing is half-written
        assert {path.name for path in tmp_path.iterdir()} == {"standin-bin", "engine.checkpoint", "pids"}
        assert not any(map(is_alive, pids))
    else:  # the kernel asks the program alone
        assert comes(lambda: not all(map(is_alive, pids)))
    for pid in filter(is_alive, pids):
        subprocess.run(["kill", str(pid)], check=False)
