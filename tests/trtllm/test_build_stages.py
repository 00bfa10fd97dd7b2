"""The stages of a build, over the stand-in's trtllm-build and runtime: what each leaves, what the next run takes up.

Builds run in this process, or as a user would start them; the library's programs are processes of their own.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from trtllm.building import build, manifest_of, options_of, words
from trtllm.library import ROOT, install_programs

from cli.main import main
from export.errors import ExportError, OutputError
from trt_build.errors import EngineError
from trt_build.machine.readings import read_machine
from trt_build.trtllm.engine import open_trtllm_engine


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory, torch_python):
    """The stand-in's programs, for the whole module; a test may take them off its PATH."""
    with pytest.MonkeyPatch.context() as patch:
        yield install_programs(tmp_path_factory.mktemp("programs") / "bin", patch, torch_python)


def changes(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# Plan and checkpoint --------------------------------------------------------------------------------------------------


def test_a_plan_is_all_that_is_made_of_it(tmp_path, small_phixtral, no_library):
    outcome = build(small_phixtral, tmp_path / "engine", until="plan")
    assert (outcome.checkpoint, outcome.engine, outcome.verification) == (None, None, None)
    assert outcome.plan.quant_algo == "W4A16"
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_is_written_once_and_taken_up_after(tmp_path, small_phixtral, no_library, caplog):
    caplog.set_level(logging.INFO)
    outcome = build(small_phixtral, tmp_path / "engine", until="checkpoint")
    folder = tmp_path / "engine.checkpoint"
    assert (outcome.checkpoint, outcome.engine) == (folder, None)
    assert [path.name for path in tmp_path.iterdir()] == ["engine.checkpoint"]
    assert outcome.plan.rank_bytes == ((folder / "rank0.safetensors").stat().st_size,)
    assert "no GPU here: packing for every GPU but SM 90 (H100, H200); pass --gpu-sm 90" in caplog.text
    before = changes(folder)
    assert build(small_phixtral, tmp_path / "engine", until="checkpoint").checkpoint == folder
    assert f"{folder} exists already: the checkpoint stage is done" in caplog.text
    assert changes(folder) == before


def test_what_is_packed_for_no_gpu_is_written_without_a_word_of_gpus(tmp_path, small_phixtral, no_library, caplog):
    for options in ({"precision": "fp16"}, {"precision": "int4", "plain_weights": True}, {"precision": "int4_awq"}):
        build(small_phixtral, tmp_path / "-".join(map(str, options.values())), until="checkpoint", **options)
    assert "no GPU here" not in caplog.text


def test_the_checkpoint_lies_where_it_is_wanted(tmp_path, small_phixtral, no_library):
    folder = tmp_path / "elsewhere" / "ranks"
    folder.parent.mkdir()
    outcome = build(small_phixtral, tmp_path / "engine", until="checkpoint", trtllm_checkpoint=folder, gpu_sm=90)
    assert outcome.checkpoint == folder
    assert (folder / "rank0.safetensors").is_file()
    assert not (tmp_path / "engine.checkpoint").exists()


def test_a_folder_of_another_use_is_not_taken_for_the_checkpoint(tmp_path, small_phixtral, no_library):
    for folder, flag in ((tmp_path / "x/../engine", "--output"), (small_phixtral, "--checkpoint")):
        told = rf"would lie in {folder}, which is {flag}; name another folder with --trtllm-checkpoint$"
        with pytest.raises(EngineError, match=told):
            build(small_phixtral, tmp_path / "engine", trtllm_checkpoint=folder)
    assert not list(tmp_path.iterdir())


def test_beside_an_output_that_is_named_by_dots_lies_its_checkpoint(tmp_path, small_phixtral, no_library, monkeypatch):
    (tmp_path / "engine/inner").mkdir(parents=True)
    for folder, name in ((tmp_path / "engine", "."), (tmp_path / "engine/inner", "..")):
        monkeypatch.chdir(folder)
        options = options_of(small_phixtral, Path(name))
        assert options.checkpoint_folder == tmp_path / "engine.checkpoint"


# Engine and comparison ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_trained_phixtral_becomes_an_engine_that_is_its_reference(tmp_path, trained_phixtral, precision, capfd):
    output = tmp_path / "engine"
    command = words(trained_phixtral, output, "--precision", precision, "--verify-tokens", "24")
    assert main(["build", *command]) == 0
    told = capfd.readouterr().out
    assert f"phixtral {precision} ({'float16' if precision == 'fp16' else 'W4A16'}): 1 rank(s)" in told
    assert f"{output}.checkpoint: written" in told
    assert f"{output}: " in told
    assert "for Stand-in SM80, batches of 32, context 512 tokens" in told
    assert "against the reference: mean KL" in told
    engine = open_trtllm_engine(output)
    found = engine.manifest.verification
    assert found["failures"] == []
    assert (found["num_tokens"], found["num_decoded_tokens"]) == (24, 11)
    assert 0 < found["mean_kl"] < (1e-5 if precision == "fp16" else 0.1)
    assert found["reference"] == str(trained_phixtral)


def test_two_ranks_are_compared_through_mpirun(tmp_path, small_phixtral, monkeypatch):
    monkeypatch.setenv("STANDIN_GPUS", "2")
    outcome = build(small_phixtral, tmp_path / "engine", precision="fp16", tp_size=2, moe_ep_size=2)
    assert outcome.verification.failures == ()
    assert {"rank0.engine", "rank1.engine"} <= set(outcome.engine.manifest.files)
    parallel = outcome.engine.manifest.parallel
    assert (parallel.world_size, parallel.moe_tp_size, parallel.moe_ep_size) == (2, 1, 2)


def test_a_mixtral_is_built_by_the_librarys_own_class(tmp_path, trained_mixtral):
    outcome = build(trained_mixtral, tmp_path / "engine", precision="int8")
    assert outcome.verification.failures == ()
    manifest = outcome.engine.manifest
    assert (manifest.family, manifest.precision.quant_algo) == ("mixtral", "W8A16")
    assert not any("model_cls" in word for word in manifest.flags)
    assert not manifest.head_masks_unused_ids
    assert (manifest.eos_token_ids, manifest.tokenizer.bos_token_id, manifest.tokenizer.begins_with) == ((2,), 1, (1,))


def test_an_engine_that_differs_ends_with_status_1_and_keeps_what_was_found(tmp_path, small_phixtral, capfd):
    output = tmp_path / "engine"
    build(small_phixtral, output, precision="fp16", until="checkpoint")
    path = tmp_path / "engine.checkpoint/rank0.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if ".mlp.fc." in name or ".mlp.proj." in name:  # the first two experts change places
            first, last = (start + offset for offset in entry["data_offsets"])
            size = (last - first) // entry["shape"][0]
            data[first : first + 2 * size] = data[first + size : first + 2 * size] + data[first : first + size]
    path.write_bytes(data)
    command = ["build", *words(small_phixtral, output, "--precision", "fp16", "--verify-tokens", "24")]
    assert main(command) == 1
    told = capfd.readouterr().err
    assert f"the rank files in {output}.checkpoint are not the weights of {small_phixtral}: layer 0, expert" in told
    assert not output.exists()
    assert main([*command, "--unchecked"]) == 1
    told = capfd.readouterr().err
    assert f"VerificationFailed: verifying {output} (fp16): " in told
    failures = manifest_of(output)["verification"]["failures"]
    assert failures
    assert all(failure in told for failure in failures)
    assert "mean KL" in failures[0]


def test_ranks_without_an_mpirun_are_told_how_to_be_compared(tmp_path, small_phixtral, programs, monkeypatch):
    monkeypatch.setenv("STANDIN_GPUS", "2")
    alone = tmp_path / "bin"
    alone.mkdir()
    for name in ("trtllm-build", "nvidia-smi"):
        shutil.copy(programs.parent / name, alone)
    monkeypatch.setenv("PATH", str(alone))
    with pytest.raises(
        EngineError, match="an engine of 2 ranks is run by mpirun, which is not on PATH: install Open MPI, or stop"
    ):
        build(small_phixtral, tmp_path / "engine", precision="fp16", tp_size=2)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


# Runs that follow -----------------------------------------------------------------------------------------------------


def test_a_second_run_builds_nothing_again(small_phixtral, copied_engine, caplog):
    caplog.set_level(logging.INFO)
    before = changes(copied_engine), changes(copied_engine.with_name("engine.checkpoint"))
    outcome = build(small_phixtral, copied_engine, until="engine")
    assert f"{copied_engine} exists already: the engine stage is done" in caplog.text
    assert outcome.engine.manifest == open_trtllm_engine(copied_engine).manifest
    assert (changes(copied_engine), changes(copied_engine.with_name("engine.checkpoint"))) == before


def test_an_engine_needs_its_checkpoint_no_more(small_phixtral, copied_engine, capsys):
    shutil.rmtree(copied_engine.with_name("engine.checkpoint"))
    assert main(["build", *words(small_phixtral, copied_engine, "--until", "engine", "--json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoint"] is None
    assert found["engine"] == manifest_of(copied_engine)
    written = build(small_phixtral, copied_engine, until="checkpoint").checkpoint
    assert written.is_dir()  # again, where it is asked for


OTHERWISE = {
    "precision": ({"precision": "int8"}, "precision is int4, expected int8"),
    "dtype": ({"dtype": "bfloat16"}, "dtype is absent, expected bfloat16"),
    "batch": ({"max_batch_size": 4}, "--max_batch_size is 32, expected 4"),
    "context": ({"max_seq_len": 48}, "--max_seq_len is 64, expected 48"),
    "cache": ({"kv_cache_fraction": 0.5}, "kv_cache_fraction is 0.9, expected 0.5"),
    "experts": ({"experts_per_token": 3}, "config is "),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_an_engine_that_was_built_otherwise_is_refused(small_phixtral, built_engine, what):
    options, told = OTHERWISE[what]
    with pytest.raises(OutputError) as caught:
        build(small_phixtral, built_engine, until="engine", **options)
    assert f"{built_engine} exists already and was built with other settings; name another output or remove it" in str(
        caught.value
    )
    assert f"\n  - {told}" in str(caught.value)
    assert "layout is" not in str(caught.value)


def test_an_engine_that_was_built_otherwise_is_refused_on_another_gpu(small_phixtral, built_engine, monkeypatch):
    monkeypatch.setenv("STANDIN_SM", "89")
    with pytest.raises(OutputError, match=r"was built with other settings; .*\n  - sm is 80, expected 89$"):
        build(small_phixtral, built_engine, until="engine")
    monkeypatch.setenv("STANDIN_SM", "90")
    with pytest.raises(
        OutputError, match=r"packed for is every GPU but SM 90, expected SM 90\n  - sm is 80, expected 90$"
    ):
        build(small_phixtral, built_engine, until="engine")


def test_an_engine_of_another_release_is_refused(small_phixtral, built_engine, monkeypatch):
    machine = replace(read_machine(), tensorrt_llm="1.1.0")
    monkeypatch.setattr("trt_build.trtllm.build.read_machine", lambda: machine)
    with pytest.raises(OutputError, match=r"\n  - it was built by TensorRT-LLM 1.2.0, and 1.1.0 is installed here$"):
        build(small_phixtral, built_engine, until="engine")


@pytest.mark.parametrize("what", ["weights", "config", "an older source"])
def test_an_engine_and_a_checkpoint_of_a_source_that_changed_since_are_refused(
    tmp_path, small_phixtral, copied_engine, what
):
    source = Path(shutil.copytree(small_phixtral, tmp_path / "source"))
    assert build(source, copied_engine, until="engine").engine.folder == tmp_path / "engine"  # taken up
    if what == "config":
        (source / "config.json").write_text((source / "config.json").read_text() + "\n")
    else:
        with (source / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
    if what == "an older source":  # all of it was there before the engine was
        later = time.time() + 1000
        for path in [*(tmp_path / "engine").iterdir(), *(tmp_path / "engine.checkpoint").iterdir()]:
            os.utime(path, (later, later))
    name = "config.json" if what == "config" else "model.safetensors"
    with pytest.raises(
        OutputError, match=rf"was built with other settings; .*\n  - its source's {name} is [0-9a-f]+, expected"
    ):
        build(source, tmp_path / "engine", until="engine")
    shutil.rmtree(tmp_path / "engine")
    with pytest.raises(
        ExportError, match=rf"it was made from something else; name another .*\n  - its source file {name} is"
    ):
        build(source, tmp_path / "engine", until="engine")
    assert not (tmp_path / "engine").exists()


def test_a_checkpoint_that_was_written_otherwise_is_refused(tmp_path, small_phixtral, no_library):
    build(small_phixtral, tmp_path / "engine", until="checkpoint")
    told = (
        r"reusing the TensorRT-LLM checkpoint .*engine.checkpoint: it was made from something else; name another with "
    )
    with pytest.raises(ExportError, match=rf"{told}.*\n  - its setting precision is int4, expected int8\n"):
        build(small_phixtral, tmp_path / "engine", precision="int8")


def test_an_output_that_is_no_engine_is_kept(tmp_path, small_phixtral):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/note").write_text("mine")
    with pytest.raises(
        OutputError, match="engine exists already and is not an engine of this build .*no engine.json in it"
    ):
        build(small_phixtral, tmp_path / "engine")
    assert (tmp_path / "engine/note").read_text() == "mine"
    with pytest.raises(OutputError, match="the folder .*nowhere does not exist; create it first"):
        build(small_phixtral, tmp_path / "nowhere/engine")
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


# As a user starts it --------------------------------------------------------------------------------------------------


def test_the_script_and_the_command_end_with_the_same_status(tmp_path, small_phixtral, no_library, capsys):
    script = [sys.executable, str(ROOT / "trt_build/build_engine.py")]
    cases = [
        (words(small_phixtral, tmp_path / "engine", "--until", "checkpoint"), 0, ""),
        (
            words(small_phixtral, tmp_path / "engine"),
            3,
            "LibraryMissing: building the engine needs TensorRT-LLM 1.0 to 1.2",
        ),
        (
            words(small_phixtral, tmp_path / "engine", "--precision", "int9"),
            2,
            "QuantizationError: choosing the precision",
        ),
    ]
    for arguments, status, told in cases:
        done = subprocess.run([*script, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, told in done.stderr) == (status, True), done.stderr
        assert main(["build", *arguments]) == status
        assert told in capsys.readouterr().err


def test_json_is_the_plan_and_the_manifest(small_phixtral, copied_engine, capsys):
    assert main(["build", *words(small_phixtral, copied_engine, "--until", "engine", "--json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engine"] == manifest_of(copied_engine)
    assert found["checkpoint"] == f"{copied_engine}.checkpoint"
    assert found["plan"]["rank_bytes"] == [
        (copied_engine.with_name("engine.checkpoint") / "rank0.safetensors").stat().st_size
    ]
    assert main(["build", *words(small_phixtral, copied_engine, "--until", "plan", "--json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["checkpoint"], found["engine"]) == (None, None)
