"""Where the library's program is missing, or fails: what is kept, what is told, and what it is called with."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from trtllm.building import build, options_of
from trtllm.library import ROOT

from trt_build.build_engine import add_arguments
from trt_build.errors import EngineError, LibraryMissing
from trt_build.trtllm.build import command_of
from trt_build.trtllm.command import read_trtllm_options


def command_in(message):
    """The words after `python` of the command that a message ends with, and the folders that it mounts."""
    line = message.partition("docker run")[2].replace("\\\n", " ")
    docker = shlex.split(line)
    volumes = [docker[place + 1].partition(":")[0] for place, word in enumerate(docker) if word == "-v"]
    inside = docker[docker.index("-c") + 1].rpartition("&&")[2]
    return shlex.split(inside)[1:], volumes


def parsed(command):
    """The options that a command line of build_engine.py is read to."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert Path(command[0]) == ROOT / "trt_build/build_engine.py"
    arguments = parser.parse_args(command[1:])
    assert arguments.backend == "tensorrt-llm"
    return read_trtllm_options(arguments, arguments.output)


def as_read(options):
    """Options as a command line gives them, which leaves the method of quantising open."""
    return replace(options, calibration=replace(options.calibration, automatic=True))


def test_without_the_library_the_checkpoint_is_kept_and_the_message_finishes_the_job(
    tmp_path, small_phixtral, no_library
):
    with pytest.raises(LibraryMissing) as caught:
        build(small_phixtral, tmp_path / "engine")
    told, folder = str(caught.value), tmp_path / "engine.checkpoint"
    assert caught.value.exit_status == 3
    assert told.startswith(
        "building the engine needs TensorRT-LLM 1.0 to 1.2 and a GPU: no trtllm-build on PATH; no GPU is visible to "
        f"nvidia-smi. The checkpoint is written: {folder}. The same command continues from it on a machine with a GPU:"
    )
    assert "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3" in told
    assert "--gpus all" in told
    command, volumes = command_in(told)
    assert parsed(command) == as_read(options_of(small_phixtral, tmp_path / "engine"))
    assert {str(tmp_path), str(small_phixtral), str(ROOT)} <= set(volumes)
    assert [path.name for path in tmp_path.iterdir()] == ["engine.checkpoint"]


def test_what_is_missing_is_told(tmp_path, small_phixtral, trtllm_build, monkeypatch):
    monkeypatch.setenv("STANDIN_GPUS", "0")
    with pytest.raises(LibraryMissing, match="and a GPU: no GPU is visible to nvidia-smi. The checkpoint"):
        build(small_phixtral, tmp_path / "engine")
    monkeypatch.delenv("STANDIN_GPUS")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    told = rf"and a GPU: the Python that runs {trtllm_build} has no package tensorrt_llm. The checkpoint"
    with pytest.raises(LibraryMissing, match=told):
        build(small_phixtral, tmp_path / "engine")


def test_links_into_a_hubs_cache_are_mounted_with_what_they_lead_to(tmp_path, small_phixtral, no_library):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(small_phixtral, blobs)
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    (tmp_path / "out").mkdir()
    with pytest.raises(LibraryMissing) as caught:
        build(snapshot, tmp_path / "out/engine")
    assert {str(snapshot), str(blobs), str(tmp_path / "out")} <= set(command_in(str(caught.value))[1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "fp16", "tp_size": 2, "moe_ep_size": 2, "verify_tokens": 2048},
        {"precision": "int4_gptq", "group_size": 64, "dtype": "bfloat16", "gpu_sm": 90, "max_seq_len": 48},
        {"plain_weights": True, "experts_per_token": 3, "kv_cache_fraction": 0.55, "until": "engine"},
        {"trtllm_checkpoint": Path("/a folder/ranks"), "max_batch_size": 4, "max_num_tokens": 128, "workers": 2},
        {"pp_size": 2, "moe_tp_size": 1, "tp_size": 4},
    ],
    ids=lambda options: "-".join(options) or "none",
)
def test_the_command_that_finishes_a_build_is_read_to_the_same_options(tmp_path, monkeypatch, options):
    (tmp_path / "it's a folder").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = options_of("it's a folder", Path("an engine"), **options)
    found = parsed(shlex.split(shlex.join(command_of(asked))))
    whole = replace(asked, checkpoint=str(tmp_path / "it's a folder"), output=tmp_path / "an engine")
    assert found == as_read(whole)
    assert parsed(command_of(replace(asked, checkpoint="owner/name"))).checkpoint == "owner/name"


# A program that fails -------------------------------------------------------------------------------------------------


@pytest.fixture
def program_that(trtllm_build):
    """(shell commands) -> trtllm-build does these instead; its first line still names the library's Python."""

    def program_that(commands):
        body = f"import subprocess, sys\nsys.exit(subprocess.call(['sh', '-c', {commands!r}, *sys.argv]))\n"
        trtllm_build.write_text(f"#!{sys.executable}\n{body}")

    return program_that


def test_the_last_words_of_a_program_that_fails_are_told_and_nothing_stays_but_the_checkpoint(
    tmp_path, small_phixtral, program_that, capfd
):
    program_that("for i in $(seq 30); do echo line $i; done; echo RuntimeError: no tactic >&2; exit 7")
    with pytest.raises(EngineError) as caught:
        build(small_phixtral, tmp_path / "engine")
    told = str(caught.value)
    assert "ended with status 7; the checkpoint is kept, and the same command continues from it" in told
    assert told.endswith("\n    line 29\n    line 30\n    RuntimeError: no tactic")
    assert told.count("\n    ") == 15
    assert "line 1\n" in capfd.readouterr().err  # all of it was seen meanwhile
    assert {path.name for path in tmp_path.iterdir()} == {"standin-bin", "engine.checkpoint"}


def test_a_program_that_ends_well_and_leaves_nothing_is_told(tmp_path, small_phixtral, program_that):
    program_that("exit 0")
    with pytest.raises(
        EngineError, match="trtllm-build ended with status 0 and did not write config.json, rank0.engine"
    ):
        build(small_phixtral, tmp_path / "engine")
    assert {path.name for path in tmp_path.iterdir()} == {"standin-bin", "engine.checkpoint"}


def test_the_program_is_called_with_what_the_contract_has(tmp_path, small_phixtral, program_that, capfd):
    program_that('for word in "$@"; do echo "$word"; done; exit 1')
    with pytest.raises(EngineError):
        build(small_phixtral, tmp_path / "engine", max_batch_size=4, max_seq_len=48)
    said = capfd.readouterr().err.splitlines()
    contract = json.loads((Path(__file__).parent / "contract.json").read_text())["trtllm_build"]
    flags = [word for word in said if word.startswith("--")]
    allowed = {*contract["flags"], *(f"--{name}" for name in contract["plugin_flags"])}
    assert set(flags) <= allowed
    assert not set(flags) & set(contract["absent"])
    given = dict(itertools.pairwise(said))
    assert {flag: given[flag] for flag in flags if flag != "--output_dir"} == {
        "--checkpoint_dir": str(tmp_path / "engine.checkpoint"),
        "--model_cls_file": str(ROOT / "trt_build/trtllm/phixtral.py"), "--model_cls_name": "PhixtralForCausalLM",
        "--max_batch_size": "4", "--max_num_tokens": "8192", "--max_seq_len": "48", "--max_input_len": "47",
        "--max_beam_width": "1", "--kv_cache_type": "paged", "--gpt_attention_plugin": "auto", "--gemm_plugin": "auto",
        "--moe_plugin": "auto", "--nccl_plugin": "auto", "--remove_input_padding": "enable", "--context_fmha": "enable",
        "--use_paged_context_fmha": "enable", "--workers": "1", "--output_timing_cache": "model.cache",
    }  # fmt: skip
