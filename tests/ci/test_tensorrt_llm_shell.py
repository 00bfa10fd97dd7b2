"""ci/gpu/tensorrt_llm.sh: what it has docker do, what it refuses, and the environment that it makes in a container."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from trt_build.machine.readings import container as container_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "ci" / "gpu" / "tensorrt_llm.sh"
IMAGE = container_of(None)
DIGEST = "sha256:" + "5" * 64
# Notes its words, one a line; `pulled` in its folder says whether the image is there, `status` how `docker run` ends.
DOCKER = """#!/bin/bash
folder=$(dirname "$0")
printf '%s\\n' "$@" -- >> "$folder/words"
case $1 in
  image) [[ -f $folder/pulled ]] || exit 1; [[ $3 != --format ]] || echo "nvcr.io/nvidia/tritonserver@sha256:feed" ;;
  pull) [[ ! -f $folder/offline ]] || exit 1; touch "$folder/pulled" ;;
  run) exit "$(cat "$folder/status" 2> /dev/null || echo 0)" ;;
esac
"""
# Stands for the container's python3 where it would ask a registry: its virtualenv is the standard library's venv, with
# a pip that notes its words and brings the packages that this Python has.
PYTHON = """#!/bin/bash
case "$*" in
  "-m pip "*) echo "${{@:3}}" >> "{folder}/pip"; [[ ! -f {folder}/offline ]] || exit 1 ;;
  "-m virtualenv "*)
    "{python}" -m venv --without-pip "${{@: -1}}"
    site=("${{@: -1}}"/lib/python*/site-packages)
    mkdir "${{site[0]}}/pip" && touch "${{site[0]}}/pip/__init__.py"
    cp "{folder}/pip.py" "${{site[0]}}/pip/__main__.py" ;;
  *) exec "{python}" "$@" ;;
esac
"""
PIP = """
import pathlib, sys
with open("{folder}/pip", "a") as file:
    print(*sys.argv[1:], file=file)
pathlib.Path(__file__).parent.with_name("packages.pth").write_text("{packages}\\n")
"""


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Host:
    """A machine with docker and nvidia-smi that note what they are asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_program(folder / "docker", DOCKER)
        write_program(folder / "nvidia-smi", "#!/bin/sh\n")

    def run(self, *words, cwd=None, **variables):
        environment = {**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", **variables}
        return subprocess.run(
            [SCRIPT, *map(str, words)], capture_output=True, text=True, check=False, env=environment, cwd=cwd
        )

    def calls(self) -> list[list[str]]:
        """The words of every call of docker's."""
        return [call.split("\n") for call in (self.folder / "words").read_text().split("\n--\n") if call]


@pytest.fixture
def host(tmp_path):
    (tmp_path / "bin").mkdir()
    return Host(tmp_path / "bin")


def test_docker_runs_the_script_in_the_container_with_the_clone_read_only(host, tmp_path):
    done = host.run("--full", "--precisions", "fp16,int4", "--output", "out", "--tp-size=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    output = tmp_path / "out"
    assert output.is_dir()
    assert host.calls() == [
        ["image", "inspect", IMAGE],
        ["pull", IMAGE],
        ["image", "inspect", "--format", '{{join .RepoDigests " "}}', IMAGE],
        ["run", "--rm", "--init", "--gpus", "all", "--ipc", "host", "--ulimit", "memlock=-1", "--ulimit",
         "stack=67108864", "--volume", f"{ROOT}:{ROOT}:ro", "--volume", f"{output}:{output}", "--workdir", str(ROOT),
         "--env", f"MOESHIP_CONTAINER={IMAGE}",
         "--env", "MOESHIP_CONTAINER_DIGEST=nvcr.io/nvidia/tritonserver@sha256:feed", IMAGE,
         "bash", str(SCRIPT), "--inside", "--full", "--precisions", "fp16,int4", "--tp-size=2",
         "--output", str(output)],
    ]  # fmt: skip


def test_a_digest_gpus_and_a_checkpoint_are_passed_on_and_a_pulled_image_is_not_pulled_again(host, tmp_path):
    (host.folder / "pulled").touch()
    checkpoint = tmp_path / "a model"
    checkpoint.mkdir()
    words = ["--checkpoint", "a model", f"--output={tmp_path}/out"]
    assert host.run(*words, cwd=tmp_path, DIGEST=DIGEST, GPUS="device=1").returncode == 0
    *asked, run = host.calls()
    assert [call[:2] for call in asked] == [["image", "inspect"]] * 2
    assert run[run.index("--gpus") + 1] == "device=1"
    assert f"{checkpoint}:{checkpoint}:ro" in run
    assert f"{IMAGE}@{DIGEST}" in run
    assert run[-4:] == ["--output", f"{tmp_path}/out", "--checkpoint", str(checkpoint)]


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 1), (2, 2), (130, 130), (125, 2)])
def test_it_ends_as_the_container_did(host, tmp_path, status, expected):
    (host.folder / "status").write_text(str(status))
    done = host.run("--output", tmp_path / "out")
    assert done.returncode == expected
    assert ("install nvidia-container-toolkit" in done.stderr) == (status == 125)


def test_a_host_that_lacks_something_is_refused_in_one_sentence(host, tmp_path):
    (host.folder / "offline").touch()
    done = host.run("--output", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"cannot run here: docker cannot pull {IMAGE}" in done.stderr
    write_program(host.folder / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    done = host.run("--output", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nvidia-smi finds no GPU; install NVIDIA's driver" in done.stderr
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("bash", "dirname", "mkdir"):
        (bare / name).symlink_to(
            next(Path(folder, name) for folder in ("/usr/bin", "/bin") if Path(folder, name).exists())
        )
    done = host.run("--output", tmp_path / "out", PATH=str(bare))
    assert done.returncode == 2
    assert "no docker on PATH; install Docker Engine and nvidia-container-toolkit" in done.stderr
    assert host.run("--output").returncode == 2
    done = host.run("--checkpoint", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert (done.returncode, "no folder" in done.stderr) == (2, True)


def test_help_names_every_flag_and_runs_nothing(host):
    done = host.run("--help")
    assert done.returncode == 0
    for text in ("ci/gpu/tensorrt_llm.sh [--output DIR]", "--verify-tokens N", "--concurrency N,N", "experimental"):
        assert text in done.stdout
    assert not (host.folder / "words").exists()


def test_the_readme_names_flags_files_and_the_container_that_there_are(host):
    readme = SCRIPT.with_name("README.md").read_text()
    part = readme[readme.index("## TensorRT-LLM") : readme.index("## ONNX Runtime")]
    there = set(re.findall(r"--[a-z-]+", host.run("--help").stdout))
    assert set(re.findall(r"(?<=[` ])--[a-z][a-z-]+", part)) - {"--runtime", "--gpus", "--backend"} <= there
    assert set(re.findall(r"nvcr.io/\S+?py3", part)) == {IMAGE}
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", part) if not link.startswith("https://")]
    assert len(links) == 2
    assert [link for link in links if not (SCRIPT.parent / link).is_file()] == []


@pytest.fixture
def offline_python(tmp_path, container):
    """The container's environment with a python3 that asks no registry; its folder has what pip was asked."""
    folder = tmp_path / "python"
    folder.mkdir()
    write_program(folder / "python3", PYTHON.format(folder=folder, python=sys.executable))
    (folder / "pip.py").write_text(PIP.format(folder=folder, packages=sysconfig.get_path("purelib")))
    variables = {"PATH": f"{folder}:{container.environment['PATH']}", "PYTHON": "", "PIP_CONSTRAINT": "/nowhere"}
    return folder, variables


def test_the_packages_get_an_environment_of_their_own_once(container, offline_python, tmp_path):
    folder, variables = offline_python
    output = tmp_path / "out"
    output.mkdir()
    (output / "results.json").write_text("[]")  # the work ends here, with packages of the environment
    for _ in range(2):
        done = container.run("--output", output, **variables)
        assert done.returncode == 2, done.stderr
        assert f"ConfigError: reading {output}/results.json: not the results of an earlier run" in done.stderr
    virtualenv, torch, packages = (folder / "pip").read_text().splitlines()
    assert virtualenv == f"install --quiet --target {output}/venv.virtualenv virtualenv"
    assert torch.startswith("install --quiet --retries 1 --index-url https://download.pytorch.org/whl/cpu torch==")
    assert {"torch==2.13.0", "tokenizers>=0.22", "tritonclient[grpc]>=2.60"} < set(packages.split())
    assert "nvidia-pytriton" not in packages  # the container has its tritonserver
    [pth] = output.glob("venv/lib/python*/site-packages/moeship.pth")
    assert pth.read_text() == f"{ROOT}\n"


def test_packages_that_cannot_be_had_are_told_and_asked_for_again(container, offline_python, tmp_path):
    folder, variables = offline_python
    (folder / "offline").touch()
    done = container.run("--output", tmp_path / "out", **variables)
    assert done.returncode == 2
    assert f"cannot run here: the packages of moeship cannot be installed into {tmp_path}/out/venv" in done.stderr
    assert not (tmp_path / "out" / "venv" / "ready").exists()


def test_nothing_is_installed_where_it_cannot_run_or_only_a_check_was_asked_for(container, offline_python, tmp_path):
    folder, variables = offline_python
    done = container.run("--output", tmp_path / "out", **variables, STANDIN_GPUS="0")
    assert (done.returncode, done.stdout) == (2, "")
    done = container.run("--check", "--output", tmp_path / "out", **variables)
    assert (done.returncode, done.stdout) == (0, "can run here: Stand-in SM80 (SM 80); TensorRT-LLM 1.2.0\n")
    assert not (folder / "pip").exists()
    assert list((tmp_path / "out").iterdir()) == []
