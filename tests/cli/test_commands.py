"""The command line: what it prints where, and the status it ends with."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cli.main import COMMANDS, main
from trt_build.ort.engine import open_engine


def test_the_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n  {name} " not in text] == []


def test_no_command_prints_the_overview_and_is_wrong_input(capsys):
    assert main([]) == 2
    assert "usage: moeship COMMAND" in capsys.readouterr().out


def test_an_unknown_command_names_the_near_one_and_all_that_there_are(capsys):
    commands = ", ".join(COMMANDS)
    assert main(["biuld"]) == 2
    assert capsys.readouterr().err == f"moeship: unknown command biuld; did you mean build? There are: {commands}.\n"
    assert main(["zzzz"]) == 2
    assert capsys.readouterr().err == f"moeship: unknown command zzzz. There are: {commands}.\n"


@pytest.mark.parametrize("word", ["--version", "version"])
def test_the_version_is_that_of_the_installation(word, capsys):
    assert main([word]) == 0
    assert capsys.readouterr().out == f"moeship {importlib.metadata.version('moeship')}\n"


def test_ctrl_c_while_a_command_is_imported_is_an_interruption(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.main.importlib.import_module", interrupted)
    assert main(["plan"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def flags_of(command, capsys):
    """The flags that a command's help names."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out))


def test_plan_takes_every_flag_of_build(capsys):
    assert flags_of("build", capsys) - flags_of("plan", capsys) == set()


@pytest.mark.parametrize(
    "words",
    [
        ["--precision", "int8", "--method", "nearest", "--kernels", "onnxruntime", "--max-sequence", "64"],
        ["--precision", "int8", "--method", "nearest", "--max-seq-len", "64", "--provider", "cuda"],
        ["--precision", "int4", "--max-seq-len", "64", "--calibrate-tokens", "512"],
        ["--backend", "tensorrt-llm", "--precision", "fp16", "--max-sequence", "64", "--workers", "1"],
    ],
)
def test_a_builds_command_line_is_a_plans(tmp_path, tiny_checkpoint, capsys, words):
    flags = ["--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "engine"), *words, "--json"]
    assert main(["plan", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["max_sequence"] == 64
    assert list(tmp_path.iterdir()) == []
    if "tensorrt-llm" not in words:
        assert main(["-q", "build", *flags]) == 0
        sizes = {name: record["bytes"] for name, record in json.loads(capsys.readouterr().out)["files"].items()}
        assert {name: plan["files"][name] for name in sizes} == sizes


@pytest.mark.parametrize("command", ["plan", "build"])
def test_the_checkpoint_is_given_once_by_its_place_or_by_its_flag(tmp_path, tiny_checkpoint, capsys, command):
    output = ["--output", str(tmp_path / "engine")]
    assert main([command, *output]) == 2
    assert "EngineError: reading the flags: found no checkpoint" in capsys.readouterr().err
    assert main([command, str(tiny_checkpoint), "--checkpoint", "other/model", *output]) == 2
    assert f"found two checkpoints, {tiny_checkpoint} and --checkpoint other/model" in capsys.readouterr().err
    assert main([command, str(tiny_checkpoint), "--precision", "fp32", *output]) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: moeship {name}" in capsys.readouterr().out


def test_verify_writes_its_result_into_the_engine_and_ends_with_status_0(
    tmp_path, tiny_checkpoint, tiny_engines, capsys
):
    engine = Path(shutil.copytree(tiny_engines("fp32"), tmp_path / "engine"))
    text = tmp_path / "text"
    text.write_text("What is verified is what is served. " * 8)
    words = ["-q", "verify", str(engine), "--reference", str(tiny_checkpoint), "--text", str(text), "--json"]
    assert main([*words, "--tokens", "64"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["failures"] == []
    assert report["max_logit_difference"] <= 1e-4
    kept = open_engine(engine).manifest.verification
    assert kept["max_logit_difference"] == report["max_logit_difference"]
    assert kept["reference"] == str(tiny_checkpoint)


def test_verify_against_another_model_of_the_same_shape_is_wrong_input(tmp_path, tiny_checkpoint, tiny_engines, capsys):
    engine = Path(shutil.copytree(tiny_engines("fp32"), tmp_path / "engine"))
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["transformer.h.0.ln.bias"] = tensors["transformer.h.0.ln.bias"] + np.float32(0.05)
    save_file(tensors, other / "model.safetensors")
    assert main(["-q", "verify", str(engine), "--reference", str(other), "--tokens", "64"]) == 2
    assert "model.safetensors is not what the engine was built from (digest" in capsys.readouterr().err
    assert open_engine(engine).manifest.verification is None


def test_verify_against_a_model_of_another_shape_is_wrong_input(tmp_path, tiny_checkpoint, tiny_engines, capsys):
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-6}))
    assert main(["-q", "verify", str(tiny_engines("fp32")), "--reference", str(other)]) == 2
    assert "not the same model (norm_epsilon: engine 1e-05, checkpoint 1e-06)" in capsys.readouterr().err


def test_verify_says_where_the_engine_takes_another_number_of_experts_than_the_checkpoint(
    tmp_path, tiny_checkpoint, tiny_engines, capsys
):
    plain = shutil.copytree(tiny_engines("fp32"), tmp_path / "plain")
    options = ["--precision", "fp32", "--experts-per-token", "1", "--output", str(tmp_path / "other")]
    assert main(["-q", "build", str(tiny_checkpoint), *options]) == 0
    capsys.readouterr()
    finding = "the engine takes 1 experts per token, and the checkpoint's config.json says 2"
    for engine, found in ((plain, 0), (tmp_path / "other", 1)):
        main(["-q", "verify", str(engine), "--tokens", "64", "--json", "--reference", str(tiny_checkpoint)])
        findings = json.loads(capsys.readouterr().out)["findings"]
        assert sum(finding in one for one in findings) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [(b" \n", "it holds no text; leave it out"), (b"a\x8a", "byte 1 is not UTF-8; pass text files in UTF-8")],
)
def test_each_text_file_is_named_with_what_is_wrong(tmp_path, tiny_checkpoint, tiny_engines, capsys, content, message):
    (tmp_path / "good").write_text("a text that could be measured on")
    (tmp_path / "bad").write_bytes(content)
    words = ["--text", str(tmp_path / "good"), "--text", str(tmp_path / "bad")]
    assert main(["-q", "verify", str(tiny_engines("fp32")), "--reference", str(tiny_checkpoint), *words]) == 2
    assert f"{tmp_path / 'bad'}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--tokens", "1"], "asked for 1 tokens, expected at least 4; ask for more"),
        (["--text", "/nowhere/text"], "reading the text to measure on"),
    ],
)
def test_verify_without_text_to_measure_on_is_wrong_input(tiny_checkpoint, tiny_engines, capsys, words, text):
    command = ["-q", "verify", str(tiny_engines("fp32")), "--reference", str(tiny_checkpoint), *words]
    assert main(command) == 2
    assert text in capsys.readouterr().err


def test_verify_says_what_the_quantiser_cost_where_it_is_asked(tmp_path, tiny_checkpoint, tiny_engines, capsys):
    engine = shutil.copytree(tiny_engines("int4"), tmp_path / "engine")
    words = ["-q", "verify", str(engine), "--reference", str(tiny_checkpoint), "--tokens", "64"]
    main([*words, "--json"])
    assert "cost" not in json.loads(capsys.readouterr().out)
    main([*words, "--cost", "--json"])
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert (cost["grain"], cost["tokens"], cost["whole"]["role"]) == ("experts", 64, "all")
    assert len(cost["parts"]) == 2 + 3 * (2 + 5)
    recorded = open_engine(engine).manifest.verification["cost"]
    assert recorded == {**cost, "parts": [part for part in cost["parts"] if "expert" not in part]}
    main([*words, "--cost", "layers", "--cost-tokens", "20"])
    printed = capsys.readouterr().out
    assert "  20 tokens (asked for) by layers: 9 variants, " in printed
    assert re.search(r"^  layer 2: attention \S+, expert \S+$", printed, re.M)
    assert main([*words, "--cost-tokens", "65"]) == 2
    assert "found 65, expected 16 to 64, the tokens of the text" in capsys.readouterr().err


def test_the_demo_walks_the_whole_road_without_torch_and_transformers(tmp_path):
    (tmp_path / "absent").mkdir()
    for package in ("torch", "transformers"):
        (tmp_path / "absent" / f"{package}.py").write_text(f"raise ModuleNotFoundError('no {package} here')")
    command = [sys.executable, "-m", "cli.main", "demo", "--json", "--output", tmp_path / "kept"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "absent")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["verification"]["failures"] == []
    assert 4.5 < summary["bits_per_weight"] < 5.8
    assert summary["stream"]["finish_reason"] in ("length", "stop")
    assert 1 < summary["stream"]["num_output_tokens"] <= 160
    assert len(summary["stream"]["text"]) > summary["stream"]["num_output_tokens"]
    assert summary["stream"]["tokens_per_s"] > 0
    for title in ("merge", "look", "build", "verify", "package", "serve"):
        assert f". {title}" in done.stderr
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"checkpoint", "engine", "repository"}
