"""`moeship doctor`: the facts of a bug report, the problems that it finds, and what it keeps to itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import pytest

from cli.doctor import _verified
from cli.main import main
from export import blas
from triton_repo.packaging.package import PackageOptions, package_engine
from trt_build.ort import kernels

look_for_fault = kernels.found_fault


@pytest.fixture(autouse=True)
def sound_kernels(monkeypatch):
    """The kernels are no problem, whether or not they are compiled here."""
    if not kernels.is_usable():
        monkeypatch.setattr(kernels, "found_fault", lambda: None)
        monkeypatch.setattr(kernels, "chosen_level", lambda: "plain")


@pytest.fixture
def doctor(capsys):
    """Runs the command with --json; returns its exit status and what it printed."""

    def run(*words):
        status = main(["doctor", *map(str, words), "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def engine(tmp_path, tiny_engine):
    return Path(shutil.copytree(tiny_engine, tmp_path / "engine"))


@pytest.fixture
def versions(monkeypatch):
    """Sets the versions that packages seem to have; None is a package that is not installed."""
    real = importlib.metadata.version

    def pretend(**changed):
        def version(name):
            key = name.replace("-", "_")
            if key not in changed:
                return real(name)
            if changed[key] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return changed[key]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def test_a_sound_machine_has_no_problem(doctor):
    status, report = doctor()
    assert (status, report["problems"]) == (0, [])
    assert report["versions"]["moeship"] == importlib.metadata.version("moeship")
    assert report["CPU"]["kernels run with"] in ("plain", "avx2", "avx512bw", "avx512vnni", "amx")
    assert report["tritonserver"]["from"] == "PATH" or report["tritonserver"]["from"].startswith("nvidia-pytriton")


def test_people_read_the_same(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"\n  numpy              {importlib.metadata.version('numpy')}\n" in text
    assert text.endswith("problems\n  none found\n")


def test_an_engines_facts_are_told(doctor, engine):
    status, report = doctor(engine)
    manifest = json.loads((engine / "engine.json").read_text())
    facts = report["engine"]
    assert status == 0
    assert {name: facts[name] for name in ("format", "family", "backend", "kernels", "context")} == {
        "format": manifest["format_version"],
        "family": manifest["family"],
        "backend": "onnxruntime",
        "kernels": manifest["kernels"],
        "context": manifest["max_sequence"],
    }
    assert facts["precision"] == manifest["precision"]["name"]
    assert facts["files"].startswith(f"{len(manifest['files'])} of ")
    assert facts["files"].endswith("digests checked")


def test_a_failed_verification_is_not_told_as_a_figure():
    failures = ["mean KL 0.3 nats, allowed 0.06", "perplexity +10.490%, allowed +3.000%"]
    assert _verified({"perplexity_increase": 0.1049, "failures": failures}) == (
        "failed: mean KL 0.3 nats, allowed 0.06, and 1 more"
    )
    assert _verified({"perplexity_increase": 0.0024, "failures": []}) == "perplexity +0.240%"


def test_a_damaged_byte_of_the_weights_is_a_problem_and_the_facts_are_told_all_the_same(doctor, engine):
    with (engine / "model.onnx.data").open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    status, report = doctor(engine)
    assert status == 1
    assert report["engine"]["files"] == "damaged, or written by another version of moeship"
    assert report["engine"]["family"] == "phixtral"
    (problem,) = report["problems"]
    assert "found SHA-256" in problem
    assert doctor(engine, "--quick")[0] == 0  # looks at sizes alone, and says so
    assert doctor(engine, "--quick")[1]["engine"]["files"].endswith("sizes checked")


def test_an_edited_manifest_is_a_problem(doctor, engine):
    path = engine / "engine.json"
    path.write_text(path.read_text().replace('"phixtral"', '"mixtral"', 1))
    status, report = doctor(engine)
    assert status == 1
    assert "was edited or is damaged" in report["problems"][0]


def test_a_repository_is_looked_at_whole(doctor, engine, tmp_path):
    repository = tmp_path / "repository"
    package_engine(PackageOptions(engine=engine, name="sound", output=repository))
    status, report = doctor(repository)
    assert (status, report["repository"]["models"]) == (0, "sound")
    assert report["engine of sound"]["files"].endswith("digests checked, as sealed when it was packaged")
    (repository / "sound" / "1" / "engine" / "tokenizer.json").unlink()
    status, report = doctor(repository)
    assert status == 1
    assert any("tokenizer.json: missing" in problem for problem in report["problems"])


def test_a_folder_that_is_neither_is_wrong_input(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 2
    assert "found neither an engine (engine.json) nor a model repository" in capsys.readouterr().err


def test_an_absent_package_is_told_and_is_no_problem(doctor, versions):
    versions(tritonclient=None, protobuf=None)
    status, report = doctor()
    assert (status, report["versions"]["tritonclient"]) == (0, "not installed")


def test_an_absent_tritonserver_is_told_and_is_no_problem(doctor, monkeypatch):
    monkeypatch.setattr("triton_repo.serving.installation.shutil.which", lambda name: None)
    monkeypatch.setattr("triton_repo.serving.installation.importlib.util.find_spec", lambda name: None)
    status, report = doctor()
    assert status == 0
    assert "pip install 'moeship[server]'" in report["tritonserver"]["program"]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"numpy": "2.3.0", "nvidia_pytriton": "0.7.0"}, "pip install 'numpy<2'"),
        ({"onnxruntime": "1.32.0", "onnxruntime_gpu": "1.31.1"}, "are both installed"),
        ({"onnxruntime": "1.20.1"}, "onnxruntime 1.20.1: moeship needs"),
        ({"protobuf": "4.25.0"}, "protobuf 4.25.0: moeship needs"),
    ],
)
def test_versions_that_do_not_go_together_are_a_problem(doctor, versions, changed, text):
    versions(**changed)
    status, report = doctor()
    assert status == 1
    assert [problem for problem in report["problems"] if text in problem] == report["problems"]


@pytest.mark.parametrize("compiler", ["/usr/bin/g++", None])
def test_kernels_that_are_not_compiled_are_a_problem_with_a_cure(doctor, monkeypatch, tmp_path, compiler):
    monkeypatch.setattr(kernels, "found_fault", look_for_fault)
    monkeypatch.setattr(kernels, "_LIBRARY", tmp_path / "absent.so")
    monkeypatch.setattr("cli.doctor.shutil.which", lambda name: compiler)
    status, report = doctor()
    assert status == 1
    (problem,) = report["problems"]
    assert "absent.so does not exist" in problem
    assert ("install a C++17 compiler (g++ or clang++), then" in problem) is (compiler is None)


def test_a_library_that_cannot_be_loaded_is_a_problem(doctor, monkeypatch, tmp_path):
    library = tmp_path / "moeship_kernels.so"
    library.write_bytes(b"no library")
    monkeypatch.setattr(kernels, "found_fault", look_for_fault)
    monkeypatch.setattr(kernels, "_LIBRARY", library)
    status, report = doctor()
    assert status == 1
    assert "is not a library that this machine can load" in report["problems"][0]


@pytest.mark.needs_kernels
def test_an_instruction_set_that_is_not_there_is_a_problem(doctor, monkeypatch):
    monkeypatch.setenv(kernels.LEVEL_VARIABLE, "avx9000")
    status, report = doctor()
    assert status == 1
    assert "unset it" in report["problems"][0]


def test_an_engine_that_does_not_fit_into_memory_is_a_problem(doctor, engine, monkeypatch):
    monkeypatch.setattr("trt_build.ort.memory.available_memory", lambda: 1000)
    status, report = doctor(engine)
    assert status == 1
    assert "of memory available" in report["problems"][0]


def test_names_of_people_and_machines_and_secrets_stay_out(monkeypatch, tmp_path, tiny_engine, capsys):
    home = tmp_path / "ada"
    engine = home / "models" / "engine"
    shutil.copytree(tiny_engine, engine)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "ada")
    monkeypatch.setattr("cli.doctor.socket.gethostname", lambda: "ladybird7")
    monkeypatch.setenv("LD_LIBRARY_PATH", os.pathsep.join(["/net/ladybird7/lib", "/data/ada/lib", f"{home}/lib"]))
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    for words in (["doctor", str(engine)], ["doctor", str(engine), "--json"]):
        assert main(words) == 0
        text = "".join(capsys.readouterr())
        assert [secret for secret in (str(home), "/ada", "ladybird7", "hf_private") if secret in text] == []
        assert "~/models/engine" in text
    monkeypatch.setenv("HOME", "/root/other")
    assert main(["doctor", "--json"]) == 0
    variables = json.loads(capsys.readouterr().out)["environment variables"]
    assert variables["LD_LIBRARY_PATH"].startswith("/net/HOST/lib:/data/USER/lib:")


def test_the_kernels_that_moeship_chose_are_not_called_the_users(monkeypatch, capsys):
    def shown() -> str | None:
        assert main(["doctor", "--json"]) in (0, 1)
        return json.loads(capsys.readouterr().out)["environment variables"].get(blas.VARIABLE)

    monkeypatch.setattr(blas, "_chosen", set())
    monkeypatch.setenv(blas.VARIABLE, "Haswell")
    assert shown() == "Haswell"
    monkeypatch.delenv(blas.VARIABLE)
    chosen: dict[str, str] = {}
    blas.choose_blas_kernels(chosen)
    expected = chosen.get(blas.VARIABLE)  # None on a processor without AVX2
    assert shown() == (f"{expected} (chosen by moeship for this CPU)" if expected else None)
