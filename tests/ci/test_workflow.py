"""ci/build_engine.yml and ci/wheels.yml: what they would run is there, and the engines' steps run as GitHub would
run them, docker aside."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
# What the expressions may name, and what each is worth in a run by hand with the workflow's own defaults.
KNOWN = {
    "inputs.full && '--full' || ''": "", "inputs.precisions": "fp16,int4", "inputs.tp-size": "1",
    "runner.temp": "/tmp/runner",
}  # fmt: skip
DOCKER = """#!/bin/bash
[[ $1 != run ]] || printf '%s\\n' "$@" > "$(dirname "$0")/words"
"""


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "ci" / "build_engine.yml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def workflow(text):
    return yaml.safe_load(text)


def steps(workflow, key):
    return [step for job in workflow["jobs"].values() for step in job["steps"] if key in step]


def test_two_jobs_of_which_only_a_person_starts_the_one_on_the_gpu(workflow):
    triggers = workflow[True]  # YAML 1.1 reads the key `on` so
    assert set(triggers) == {"push", "pull_request", "workflow_dispatch"}
    cpu, gpu = workflow["jobs"]["cpu"], workflow["jobs"]["gpu"]
    assert "if" not in cpu
    assert gpu["if"] == "github.event_name == 'workflow_dispatch'"
    assert "self-hosted" in gpu["runs-on"]
    assert set(workflow["permissions"].values()) == {"read"}


def test_the_cpu_job_and_the_wheels_are_of_the_oldest_python_that_installs(workflow):
    """What needs a newer one would otherwise first fail at a user. Wheels are for this Python and all later ones."""
    [asked] = [
        step["with"]["python-version"]
        for step in workflow["jobs"]["cpu"]["steps"]
        if step.get("uses", "").startswith("actions/setup-python@")
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["requires-python"] == f">={asked}"
    assert project["tool"]["cibuildwheel"]["build"].startswith(f"cp{asked.replace('.', '')}-")


def test_every_command_exists(workflow):
    commands = [step["run"].split() for step in steps(workflow, "run")]
    assert [words[0] for words in commands] == ["make", "ci/gpu/tensorrt_llm.sh", "ci/gpu/tensorrt_llm.sh"]
    makefile = (ROOT / "Makefile").read_text()
    for program, *words in commands:
        if program == "make":
            assert all(re.search(rf"^{word}:", makefile, re.MULTILINE) for word in words)
        else:
            assert os.access(ROOT / program, os.X_OK)
    for step in steps(workflow, "uses"):
        assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])


def test_nothing_is_left_to_be_filled_in(workflow, text):
    assert {found[1] for found in EXPRESSION.finditer(text)} == set(KNOWN)
    assert not re.search(r"TODO|FIXME|xxx|<[\w .-]+>|your-", text, re.IGNORECASE)
    named = {name for found in EXPRESSION.finditer(text) for name in re.findall(r"inputs\.([\w-]+)", found[1])}
    assert set(workflow[True]["workflow_dispatch"]["inputs"]) == named
    for step in steps(workflow, "run"):
        used = set(re.findall(r"\$\{?([A-Z_]+)", step["run"]))
        assert used <= {"RUNNER_TEMP", *step.get("env", {})}


@pytest.mark.parametrize("full", [False, True])
def test_the_gpu_steps_start_the_container_with_what_was_asked_for(workflow, tmp_path, full):
    for name, text in (("docker", DOCKER), ("nvidia-smi", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    check, work = [step for step in workflow["jobs"]["gpu"]["steps"] if "run" in step]
    values = {**KNOWN, "inputs.full && '--full' || ''": "--full" if full else ""}
    for step, expected in (
        (check, ["--check"]),
        (work, ["--precisions", "fp16,int4", "--tp-size", "1", *(["--full"] if full else [])]),
    ):
        variables = {
            name: EXPRESSION.sub(lambda found: values[found[1]], value) for name, value in step.get("env", {}).items()
        }
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RUNNER_TEMP": str(tmp_path)}
        done = subprocess.run(
            ["bash", "-e", "-c", step["run"]], env={**environment, **variables}, cwd=ROOT, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        words = (tmp_path / "words").read_text().splitlines()
        inside = words[words.index("--inside") + 1 :]
        assert inside == [*expected, "--output", str(tmp_path / "gpu-results")]


def test_the_results_are_kept_whatever_became_of_them(workflow):
    [upload] = [step for step in workflow["jobs"]["gpu"]["steps"] if step.get("uses", "").startswith("actions/upload")]
    assert upload["if"] == "always()"
    assert "gpu-results/results.json" in upload["with"]["path"]


def test_wheels_are_made_and_checked_by_what_is_there():
    text = (ROOT / "ci" / "wheels.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert {found[1] for found in EXPRESSION.finditer(text)} == {"matrix.machine"}
    used = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", name) for name in used)
    build, check = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert re.fullmatch(r"pipx run cibuildwheel==[\d.]+ --output-dir wheels", build)
    assert os.access(ROOT / check.split()[0], os.X_OK)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]
    [script] = re.findall(r"\{project\}/(\S+)", settings["test-command"])
    assert (ROOT / script).is_file()
