"""A live Triton past its limits: what ci/overload.py sends, in small numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from serve_command import PATIENCE_S, start_command

from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.packaging.package import PackageOptions, package_engine

ROOT = Path(__file__).resolve().parents[3]
NAME = "tiny"
# Bars of time and memory, which a busy machine and few requests may miss.
OF_AMOUNT = re.compile(r"took|grew|got its first token|came to its end|did not use")


def test_bursts_mixed_requests_torn_and_unread_connections_leave_a_server_right_and_free(tmp_path, tiny_engines):
    repository, said = tmp_path / "repository", tmp_path / "server.json"
    parameters = ModelParameters(threads=1, slots=4, max_waiting=16)
    package_engine(PackageOptions(engine=tiny_engines("fp32"), name=NAME, output=repository, onnxruntime=parameters))
    command, ready = start_command(repository)
    said.write_text(f"{json.dumps(ready)}\n")
    try:
        done = subprocess.run(
            [
                sys.executable, ROOT / "ci" / "overload.py", "--server", said, "--model", NAME,
                "--only", "burst", "--only", "mixed", "--only", "unread", "--burst", "100", "--different", "9",
                "--requests", "36", "--clients", "8", "--torn", "4", "--unread", "2",
            ],
            capture_output=True, text=True, check=False, timeout=2 * PATIENCE_S,
        )  # fmt: skip
    finally:
        command.terminate()
        _, errors = command.communicate(timeout=PATIENCE_S)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    faults = [fault for name in ("burst", "mixed", "unread") for fault in found[name]["faults"]]
    assert [fault for fault in faults if not OF_AMOUNT.search(fault)] == []
    assert found["burst"]["counts"]["answered"] + found["burst"]["counts"]["refused"] == 100
    assert found["mixed"]["counts"]["torn"] == 4
    assert found["mixed"]["counts"]["read_whole"] >= 20
    assert found["unread"]["tokens"] > 2 * 500
    assert command.returncode == 0, errors
