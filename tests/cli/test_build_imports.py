"""`moeship build` imports only the backend that it builds for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from mixtral_checkpoints import write_mixtral_checkpoint

OTHER_BACKEND = ("export.trtllm", "trt_build.trtllm")
BUILD = """
import json, sys
from cli.main import main
status = main(sys.argv[1:])
print(json.dumps([status, sorted(sys.modules)]))
"""


@pytest.fixture
def checkpoint(request, tmp_path, tiny_checkpoint):
    if request.param == "phixtral":
        return tiny_checkpoint
    return write_mixtral_checkpoint(tmp_path / "checkpoint", seed=0)


@pytest.mark.parametrize("checkpoint", ["phixtral", "mixtral"], indirect=True)
def test_a_build_for_onnxruntime_imports_nothing_of_tensorrt_llm(tmp_path, checkpoint):
    words = ["build", "--checkpoint", checkpoint, "--output", tmp_path / "engine", "--precision", "fp32"]
    run = subprocess.run([sys.executable, "-c", BUILD, *map(str, words)], capture_output=True, text=True, check=True)
    status, modules = json.loads(run.stdout.splitlines()[-1])
    assert status == 0, run.stderr
    assert "trt_build.prepare" in modules
    assert [name for name in modules if f"{name}.".startswith(tuple(f"{package}." for package in OTHER_BACKEND))] == []
