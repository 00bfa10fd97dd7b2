"""build-model of the images: builds, compares and packages once, and goes on where it was interrupted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from deployed import DEPLOY, parsed

from cli import package, verify
from trt_build import build_engine

# Notes its words, and makes what the command that it stands for leaves. FAILS names the command that fails.
STAND_IN = """#!/bin/bash
echo "$*" >> "$NOTED"
words=("$@")
value() { for i in "${!words[@]}"; do [[ ${words[i]} != "$1" ]] || echo "${words[i+1]}"; done; }
command=$2
[[ $command == trt_build.build_engine ]] || command=$3
[[ $command != "$FAILS" ]] || exit 1
case $command in
  trt_build.build_engine) mkdir -p "$(value --output)" && touch "$(value --output)/engine.json" ;;
  package) mkdir -p "$(value --output)/$(value --name)" && touch "$(value --output)/$(value --name)/config.pbtxt" ;;
esac
"""
MODULES = {"trt_build.build_engine": build_engine, "verify": verify, "package": package}


@pytest.fixture
def build_model(tmp_path):
    """(words, fails, tokens) -> the exit status, and the commands that were started: name and words."""
    program = tmp_path / "python"
    program.write_text(STAND_IN, encoding="utf-8")
    program.chmod(0o755)
    noted = tmp_path / "noted"

    def run(*words, fails="", tokens=None):
        noted.write_text("", encoding="utf-8")
        environment = {**os.environ, "MOESHIP_PYTHON": str(program), "NOTED": str(noted), "FAILS": fails}
        if tokens is not None:
            environment["VERIFY_TOKENS"] = tokens
        done = subprocess.run(
            ["bash", DEPLOY / "docker" / "build-model.sh", *map(str, words)],
            env=environment, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        lines = [line.split() for line in noted.read_text("utf-8").splitlines()]
        started = [(words[1], words[2:]) if words[1] in MODULES else (words[2], words[3:]) for words in lines]
        for name, given in started:
            parsed(MODULES[name], given)
        return done.returncode, started

    return run


def test_a_model_is_built_compared_and_packaged_by_words_that_the_commands_take(build_model, tmp_path):
    status, started = build_model("x", "m", tmp_path / "f", "--precision", "int4", "--", "--threads", "4")
    assert (status, [name for name, _ in started]) == (0, ["trt_build.build_engine", "verify", "package"])
    built, compared, packaged = (parsed(MODULES[name], given) for name, given in started)
    assert (built.checkpoint_flag, built.precision, built.output) == ("x", "int4", tmp_path / "f/engine")
    assert (compared.engine, str(compared.reference), compared.tokens) == ([tmp_path / "f/engine"], "x", 2048)
    assert (packaged.name, packaged.threads, packaged.output) == ("m", 4, tmp_path / "f/repository")


def test_an_engine_that_differs_from_its_checkpoint_is_not_packaged(build_model, tmp_path):
    status, started = build_model("x", "m", tmp_path, "--precision", "int4", fails="verify")
    assert (status, started[-1][0]) == (1, "verify")


def test_a_run_goes_on_where_one_was_interrupted_and_does_nothing_where_all_is_done(build_model, tmp_path):
    words = ("x", "m", tmp_path, "--precision", "int4")
    assert build_model(*words, fails="package")[0] == 1
    assert [name for name, _ in build_model(*words)[1]] == ["verify", "package"]
    assert build_model(*words) == (0, [])


@pytest.mark.parametrize("fails", ["", "verify"])
def test_a_folder_that_was_begun_with_other_words_is_refused_and_left_as_it_is(build_model, tmp_path, fails):
    words = ("x", "m", tmp_path / "f", "--precision")
    assert build_model(*words, "int4", fails=fails)[0] == (1 if fails else 0)
    assert build_model(*words, "int8") == (2, [])
    assert build_model(*words, "int4")[0] == 0


def test_words_whose_build_made_nothing_can_be_mended(build_model, tmp_path):
    assert build_model("mistyped", "m", tmp_path / "f", "--precision", "int4", fails="trt_build.build_engine")[0] == 1
    words = ("x", "m", tmp_path / "f", "--precision")
    assert build_model(*words, "int4")[0] == 0
    assert build_model(*words, "int8") == (2, [])


def test_tensorrt_llms_build_compares_by_itself_and_zero_tokens_compare_nothing(build_model, tmp_path):
    trtllm = ("x", "m", tmp_path / "a", "--backend", "tensorrt-llm", "--precision", "int4")
    assert [name for name, _ in build_model(*trtllm)[1]] == ["trt_build.build_engine", "package"]
    plain = ("x", "m", tmp_path / "b", "--precision", "int4")
    assert [name for name, _ in build_model(*plain, tokens="0")[1]] == ["trt_build.build_engine", "package"]


def test_too_few_words_are_told_the_usage():
    done = subprocess.run(
        ["bash", DEPLOY / "docker" / "build-model.sh", "x"],
        env={**os.environ, "MOESHIP_PYTHON": sys.executable}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "build-model CHECKPOINT NAME FOLDER" in done.stderr
