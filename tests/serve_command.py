"""`moeship serve` as a process of its own, and patience with what it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 60


def wait_until(holds: Callable[[], object]) -> object:
    """What `holds` gives once it is true, or the last that it gave."""
    deadline = time.monotonic() + PATIENCE_S
    while not (result := holds()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return result


def start_command(repository: Path, *words: str) -> tuple[subprocess.Popen, dict]:
    """The process, and what it said once it was ready. It heeds SIGHUP, also where these tests ignore it, as under
    nohup."""
    command = subprocess.Popen(
        ["env", "--default-signal=HUP", sys.executable, "-m", "cli.main", "serve", str(repository), "--json", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
        env={**os.environ, "TMPDIR": str(repository.parent)},
    )  # fmt: skip
    return command, json.loads(command.stdout.readline())
