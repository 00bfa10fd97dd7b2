"""ONNX Runtime from 1.29 on tells Microsoft of the models that it loads, unless it is told not to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FIRST_IMPORTS = {
    "serving": "from trt_build.ort.engine import open_engine; from trt_build.ort.session import Session\n"
    "Session(open_engine(sys.argv[1]), 1)",
    "verifying": "from trt_build.ort.engine import open_engine; from trt_build.ort.session import ScoringSession\n"
    "ScoringSession(open_engine(sys.argv[1]))",
}
# ONNX Runtime looks at these too, and is silent where tests run.
SILENCERS = ("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI")


@pytest.mark.parametrize("code", FIRST_IMPORTS.values(), ids=FIRST_IMPORTS)
def test_nothing_is_reported_and_no_session_file_is_left(tiny_engine, tmp_path, code):
    environment = {name: value for name, value in os.environ.items() if name not in SILENCERS}
    command = [sys.executable, "-c", f"import sys\n{code}", str(tiny_engine)]
    subprocess.run(command, check=True, env={**environment, "TMPDIR": str(tmp_path)}, timeout=120)
    assert [path.name for path in tmp_path.iterdir()] == []
