"""A command that has to do with one backend imports nothing of the other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from mixtral_checkpoints import write_mixtral_checkpoint

TENSORRT_LLM = ("export.trtllm", "trt_build.trtllm")
ONNX_RUNTIME = ("export.exporter", "export.onnx_graph", "export.quantize.layout", "trt_build.ort")
COMMAND = """
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


def imported(*words):
    """The modules that a command has imported when it has ended with status 0."""
    run = subprocess.run([sys.executable, "-c", COMMAND, *map(str, words)], capture_output=True, text=True, check=True)
    status, modules = json.loads(run.stdout.splitlines()[-1])
    assert status == 0, run.stderr
    return modules


def of(packages, modules):
    return [name for name in modules if f"{name}.".startswith(tuple(f"{package}." for package in packages))]


@pytest.mark.parametrize("checkpoint", ["phixtral", "mixtral"], indirect=True)
def test_a_build_for_onnxruntime_imports_nothing_of_tensorrt_llm(tmp_path, checkpoint):
    modules = imported("build", checkpoint, "--output", tmp_path / "engine", "--precision", "fp32")
    assert "trt_build.ort.build" in modules
    assert of(TENSORRT_LLM, modules) == []


@pytest.mark.parametrize("checkpoint", ["phixtral", "mixtral"], indirect=True)
def test_a_build_for_tensorrt_llm_imports_nothing_of_onnxruntime(tmp_path, checkpoint):
    words = ["--backend", "tensorrt-llm", "--precision", "fp16", "--until", "checkpoint"]
    modules = imported("build", checkpoint, "--output", tmp_path / "engine", *words)
    assert "trt_build.trtllm.build" in modules
    assert of(ONNX_RUNTIME, modules) == []


@pytest.mark.parametrize(("backend", "other"), [("onnxruntime", TENSORRT_LLM), ("tensorrt-llm", ONNX_RUNTIME)])
def test_a_plan_imports_nothing_of_the_other_backend(tiny_checkpoint, backend, other):
    assert of(other, imported("plan", tiny_checkpoint, "--backend", backend, "--precision", "int8")) == []


def test_inspecting_a_checkpoint_imports_neither_backend(tiny_checkpoint):
    assert of((*TENSORRT_LLM, *ONNX_RUNTIME), imported("inspect", tiny_checkpoint)) == []


def test_an_engine_for_onnxruntime_is_verified_and_packaged_without_tensorrt_llm_and_torch(
    tmp_path, tiny_checkpoint, tiny_engines
):
    engine = shutil.copytree(tiny_engines("fp32"), tmp_path / "engine")  # verify writes into engine.json
    verify = ["verify", engine, "--reference", tiny_checkpoint, "--tokens", "16"]
    package = ["package", engine, "--name", "tiny", "--output", tmp_path / "repository"]
    assert of((*TENSORRT_LLM, "torch", "transformers"), [*imported(*verify), *imported(*package)]) == []


def test_a_command_imports_no_backend_before_it_knows_which():
    code = "import json, sys, cli.build, cli.inspect, cli.package, cli.plan; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = json.loads(run.stdout)
    assert "triton_repo.packaging.package" in modules
    assert of((*TENSORRT_LLM, *ONNX_RUNTIME), modules) == []
