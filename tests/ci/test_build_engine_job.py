"""The CI job, run as CI runs it, for both engines; TensorRT-LLM is its stand-in."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from trt_build.ort.engine import open_engine

JOB = Path(__file__).parents[2] / "ci" / "build_engine.sh"


@pytest.fixture
def run_job(reference_python, libraries):
    """The script with these words and variables."""

    def run_job(*words, **variables):
        job = {"PYTHON": str(reference_python), "LD_LIBRARY_PATH": str(libraries)}
        environment = {**os.environ, **job, **variables}
        return subprocess.run([JOB, *map(str, words)], capture_output=True, text=True, check=False, env=environment)

    return run_job


def test_a_checkpoint_becomes_a_verified_packaged_engine(run_job, tmp_path, tiny_checkpoint):
    done = run_job(tiny_checkpoint, "fp32", "tiny", tmp_path / "out", "64")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert report["failures"] == []
    packaged = open_engine(tmp_path / "out" / "repository" / "tiny" / "1" / "engine")
    assert packaged.manifest.verification["num_tokens"] == report["num_tokens"] == 64


def test_a_wrong_checkpoint_ends_the_job_with_status_2(run_job, tmp_path):
    done = run_job(tmp_path / "nowhere", "fp32", "tiny", tmp_path / "out")
    assert done.returncode == 2
    assert "CheckpointError: opening the checkpoint" in done.stderr


def test_missing_words_end_the_job_with_its_usage(run_job, tmp_path):
    done = run_job(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "ci/build_engine.sh CHECKPOINT PRECISION NAME OUTPUT" in done.stderr


def test_an_engine_for_tensorrt_llm_is_verified_by_its_build_and_packaged(
    run_job, tmp_path, tiny_checkpoint, container
):
    variables = {**container.environment, "BACKEND": "tensorrt-llm"}
    done = run_job(tiny_checkpoint, "fp32", "tiny", tmp_path / "out", "8", **variables)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert (report["num_tokens"], report["failures"]) == (8, [])
    steps = {path.parent.name for path in (tmp_path / "out" / "repository").glob("*/config.pbtxt")}
    assert steps == {"tiny", "preprocessing", "tensorrt_llm", "postprocessing"}


def test_without_tensorrt_llm_the_job_ends_with_status_3_and_the_checkpoint(run_job, tmp_path, tiny_checkpoint):
    done = run_job(tiny_checkpoint, "fp16", "tiny", tmp_path / "out", BACKEND="tensorrt-llm")
    assert done.returncode == 3
    assert "building the engine needs TensorRT-LLM" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["engine.checkpoint"]
