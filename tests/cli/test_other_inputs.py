"""A command that is given what another command takes says what it is, and names that command."""

from __future__ import annotations

import shutil

import pytest

from cli.main import main
from triton_repo.packaging.package import PackageOptions, package_engine

MERGE = "it is a YAML file; if it is a merge configuration, make a checkpoint of it with `moeship merge {} OUT`"
GGUF = "it is a GGUF file; make an engine of it with `moeship build {} --output ENGINE`"
CHECKPOINT = "it is a checkpoint; make an engine of it with `moeship build {} --output ENGINE`"
ENGINE = "it is an engine, which `moeship verify` and `moeship package` take"
REPOSITORY = "it is a Triton model repository; `moeship serve {}` takes it"
WEIGHTS = "it is a file of weights; name the folder of the checkpoint that it belongs to"
ADAPTER = "it is an adapter; name it behind its base model, as model+adapter, in the YAML of `moeship merge`"
NO_FILE = "there is no such file; check the path"
NO_FOLDER = "no such folder, and not a hub id like owner/name or owner/name@revision; check the path"
COMMANDS = {
    "inspect": ["inspect", "{}"],
    "plan": ["plan", "{}"],
    "build": ["build", "{}", "--output", "{out}"],
    "merge": ["merge", "{}", "{out}"],
    "verify": ["verify", "{}", "--reference", "{checkpoint}"],
    "reference": ["verify", "{engine}", "--reference", "{}"],
    "package": ["package", "{}", "--name", "m", "--output", "{out}"],
    "serve": ["serve", "{}"],
}
OF_CHECKPOINTS, OF_ENGINES = ("inspect", "plan", "build", "reference"), ("verify", "package")
CASES = [
    *((command, "merge.yml", MERGE) for command in ("inspect", "build", "reference", *OF_ENGINES, "serve")),
    *((command, "model.gguf", GGUF) for command in ("merge", *OF_ENGINES, "serve")),
    *((command, "checkpoint", CHECKPOINT) for command in ("merge", *OF_ENGINES, "serve")),
    *((command, "engine", ENGINE) for command in ("plan", "build", "merge", "reference", "serve")),
    *((command, "repository", REPOSITORY) for command in (*OF_CHECKPOINTS, "merge", *OF_ENGINES)),
    *((command, "checkpoint/model.safetensors", WEIGHTS) for command in COMMANDS),
    *((command, "adapter", ADAPTER) for command in ("merge", *OF_ENGINES, "serve")),
    *((command, "absent.gguf", NO_FILE) for command in OF_CHECKPOINTS),
    *((command, "absent", NO_FOLDER) for command in OF_CHECKPOINTS),
    ("serve", "notes.txt", "it is a file, expected a folder; make one with: moeship package"),
]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, tiny_checkpoint, tiny_engines):
    """A folder with one of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    shutil.copytree(tiny_checkpoint, folder / "checkpoint")
    shutil.copytree(tiny_engines("fp32"), folder / "engine")
    package_engine(PackageOptions(engine=folder / "engine", name="m", output=folder / "repository"))
    (folder / "merge.yml").write_text("base_model: a\nexperts: []\n")
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "notes.txt").write_text("notes")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return folder


@pytest.mark.parametrize(("command", "kind", "told"), CASES)
def test_what_another_command_takes_is_named_with_that_command(kinds, tmp_path, capsys, command, kind, told):
    path = kinds / kind
    places = {"out": tmp_path / "out", "checkpoint": kinds / "checkpoint", "engine": kinds / "engine"}
    assert main(["-q", *(word.format(path, **places) for word in COMMANDS[command])]) == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert told.format(path) in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags", [["--precision", "int4"], ["--backend", "onnxruntime"], ["--output", "x"], ["--revision", "main"]]
)
def test_flags_of_an_engine_are_refused_for_a_merge_though_they_have_their_default(kinds, capsys, flags):
    assert main(["-q", "plan", str(kinds / "merge.yml"), *flags]) == 2
    assert f"a merge has no {flags[0]}, which moeship plan takes for a checkpoint; leave it out" in (
        capsys.readouterr().err
    )
