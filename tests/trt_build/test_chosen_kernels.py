"""Which kernels an engine is built for, and what commands say where moeship's cannot be used."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from ci.kill_builds import compare
from cli.main import main
from export.errors import ExportError
from triton_repo.packaging.package import PackageOptions, package_engine
from trt_build.errors import EngineError
from trt_build.ort import device, kernels
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine
from trt_build.ort.planning.prepare import chosen_kernels
from trt_build.ort.session import ScoringSession, Session


def build(checkpoint, output, progress=None, **options):
    options = {"kernels": "moeship", **options}
    return build_engine(BuildOptions(checkpoint=str(checkpoint), output=output, **options), progress)


def test_without_the_compiled_library_an_engine_is_written_and_refused_when_it_is_loaded(
    tmp_path, tiny_checkpoint, tiny_engines, monkeypatch, caplog
):
    monkeypatch.setattr(kernels, "_LIBRARY", tmp_path / "absent.so")
    with caplog.at_level(logging.WARNING):
        engine = build(tiny_checkpoint, tmp_path / "engine")
    assert "absent.so does not exist; the engine is written" in caplog.text
    compare(engine.folder, tiny_engines("int4", kernels="moeship"))
    for session in (Session, ScoringSession):
        with pytest.raises(
            EngineError,
            match=r"for the engine /.*absent\.so does not exist; .*install moeship again; .* --kernels onnxruntime",
        ):
            session(engine)


@pytest.mark.parametrize(
    ("provider", "precision", "compiled", "expected"),
    [
        ("cpu", "int4", True, "moeship"),
        ("cpu", "int8", True, "moeship"),
        ("cpu", "fp32", True, "onnxruntime"),
        ("cuda", "int4", True, "onnxruntime"),
        ("cpu", "int4", False, "onnxruntime"),
        ("tpu", "int4", True, "onnxruntime"),  # refused after
        ("cpu", "int5", True, "onnxruntime"),
    ],
)
def test_the_kernels_that_nobody_names(monkeypatch, provider, precision, compiled, expected):
    monkeypatch.setattr(kernels, "found_fault", lambda: None if compiled else kernels.Fault("absent", ""))
    assert chosen_kernels(provider, precision) == expected


@pytest.mark.parametrize("command", ["plan", "build"])
@pytest.mark.parametrize(
    ("words", "is_told"),
    [
        ([], True),
        (["--method", "search"], True),
        (["--precision", "int8"], True),
        (["--kernels", "onnxruntime"], False),
        (["--precision", "fp32"], False),
        (["--provider", "cuda"], False),
    ],
    ids=str,
)
def test_without_the_library_the_default_is_onnx_runtimes_kernels_and_one_sentence_says_what_that_costs(
    tmp_path, tiny_checkpoint, tiny_engines, monkeypatch, caplog, command, words, is_told
):
    monkeypatch.setattr(kernels, "_LIBRARY", tmp_path / "absent.so")
    output = tmp_path / "engine"
    method = [] if {"search", "fp32"} & {*words} else ["--method", "nearest"]  # solving codes takes 20 s
    assert main([command, "--checkpoint", str(tiny_checkpoint), "--output", str(output), *words, *method]) == 0
    found = [line for line in caplog.messages if "the engine is for ONNX Runtime's CPU kernels" in line]
    assert len(found) == is_told
    for line in found:
        assert "two thirds of the speed of moeship's or less" in line
        assert "absent.so does not exist" in line
        assert line.endswith(kernels.remedy())
    if command == "build" and words == ["--method", "search"]:
        compare(output, tiny_engines("int4", kernels="onnxruntime"))


def test_a_library_that_is_none_is_refused(tmp_path, tiny_engines, monkeypatch):
    (tmp_path / "broken.so").write_bytes(b"\x7fELF" + bytes(60))
    monkeypatch.setattr(kernels, "_LIBRARY", tmp_path / "broken.so")
    with pytest.raises(
        EngineError, match=r"CPU kernels for the engine .*: .*broken\.so is not a library that .* moeship again"
    ):
        Session(open_engine(tiny_engines("int4", kernels="moeship")))


def test_a_library_that_onnx_runtime_refuses_is_told(tiny_engines, monkeypatch):
    monkeypatch.setattr(device, "library", lambda doing: Path("libm.so.6"))
    with pytest.raises(EngineError, match=r"ONNX Runtime \S+ refuses the library libm\.so\.6 .* install moeship again"):
        Session(open_engine(tiny_engines("int4", kernels="moeship")))


@pytest.fixture
def commands(tmp_path, tiny_checkpoint, tiny_engines):
    """The words of each command that needs our kernels, for an engine and a repository of it."""
    engine, repository = tiny_engines("int4", kernels="moeship"), tmp_path / "repository"
    package_engine(PackageOptions(engine=engine, name="own", output=repository))
    return {
        "plan": ["plan", "--checkpoint", tiny_checkpoint],
        "build": ["build", "--checkpoint", tiny_checkpoint, "--output", tmp_path / "engine"],
        "verify": ["verify", engine, "--reference", tiny_checkpoint],
        "package": ["package", engine, "--name", "another", "--output", repository],
        "serve": ["serve", repository],
    }


@pytest.mark.needs_kernels
def test_all_commands_refuse_an_unknown_level_in_the_same_words(commands, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv(kernels.LEVEL_VARIABLE, "avx9000")
    said = {name: (main([str(word) for word in words]), *capfd.readouterr()) for name, words in commands.items()}
    status, out, err = said["plan"]
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("EngineError: choosing the kernels' instruction set: MOESHIP_KERNELS_LEVEL is avx9000, this")
    assert said == dict.fromkeys(commands, (status, out, err))
    assert not (tmp_path / "engine").exists()
    assert main(["doctor", "--json"]) == 1
    assert err.removeprefix("EngineError: ").strip() in json.loads(capfd.readouterr().out)["problems"]


@pytest.mark.needs_kernels
def test_a_missing_library_ends_verify_and_serve_at_once_and_packaging_warns(
    commands, monkeypatch, capfd, caplog, tmp_path
):
    monkeypatch.setattr(kernels, "_LIBRARY", tmp_path / "absent.so")
    for name in ("verify", "serve"):
        assert main([str(word) for word in commands[name]]) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1
        assert re.match(r"EngineError: (loading|serving) .*/\S+: .*absent\.so does not exist; install", err)
    assert main([str(word) for word in commands["package"]]) == 0
    [line] = [line for line in caplog.messages if "absent.so does not exist" in line]
    assert "the engine is packaged, and loads on machines where they can be used; to serve it here, install" in line


@pytest.mark.needs_kernels
def test_the_level_does_not_matter_to_onnx_runtimes_kernels(tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.setenv(kernels.LEVEL_VARIABLE, "avx9000")
    assert main(["plan", "--checkpoint", str(tiny_checkpoint), "--kernels", "onnxruntime"]) == 0


def test_an_unknown_provider_is_told_before_the_kernels():
    from export.provider import provider_of

    with pytest.raises(ExportError, match="choosing the provider: 'npu' is unknown"):
        provider_of("npu", "moeship")
