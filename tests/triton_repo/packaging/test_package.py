"""Packaging: the configuration read back, what lies where, and what is refused with nothing half-written."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from cli.main import main
from cli.package import byte_count
from export.errors import OutputError
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.contracts.wire import ADDED_OUTPUTS, COMPATIBILITY_INPUTS, INPUTS, OUTPUTS
from triton_repo.errors import RepositoryError
from triton_repo.packaging.model_config import ServedModel, config_text, model_config, packaged_parameters, read_config
from triton_repo.packaging.package import PackageOptions, package_engine
from trt_build.errors import EngineError
from trt_build.ort.engine import open_engine


def package(engine: Path, output: Path, **fields):
    return package_engine(PackageOptions(**{"engine": engine, "name": "phixtral", "output": output, **fields}))


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_configuration_reads_back_to_the_same_message():
    model = ServedModel(name="m.1-x", max_batch=3, parameters=ModelParameters(threads=4, memory_budget=5))
    config = model_config(model)
    assert text_format.Parse(config_text(config), model_config_pb2.ModelConfig()) == config
    assert packaged_parameters(config, "m.1-x") == model.parameters


def test_a_unary_model_is_not_decoupled_and_otherwise_the_same(tmp_path, tiny_engine):
    words = ["package", str(tiny_engine), "--name", "phixtral"]
    assert main([*words, "--output", str(tmp_path / "unary"), "--unary"]) == 0
    package(tiny_engine, tmp_path / "streams")
    unary, streams = (read_config(tmp_path / name / "phixtral" / "config.pbtxt") for name in ("unary", "streams"))
    assert not unary.model_transaction_policy.decoupled
    unary.model_transaction_policy.decoupled = True
    assert unary == streams


def test_an_ensemble_cannot_be_unary(tmp_path, tiny_engine):
    with pytest.raises(RepositoryError, match=r"unary is set, and Triton's plain infer refuses an ensemble"):
        package(tiny_engine, tmp_path / "repository", unary=True, layout="ensemble")
    assert not (tmp_path / "repository").exists()


def test_the_configuration_says_all_that_triton_would_else_guess(tmp_path, tiny_engine):
    package(tiny_engine, tmp_path / "repository", onnxruntime=ModelParameters(slots=2, threads=3))
    config = read_config(tmp_path / "repository" / "phixtral" / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("phixtral", "python", 1)
    assert config.model_transaction_policy.decoupled
    [group] = config.instance_group
    # One process, so that a request to stop another reaches it.
    assert (group.kind, group.count) == (model_config_pb2.ModelInstanceGroup.KIND_CPU, 1)
    assert {key: value.string_value for key, value in config.parameters.items()} == {
        "moeship_engine": "engine",
        "moeship_threads": "3",
        "moeship_slots": "2",
        "moeship_memory_budget": "auto",
        "moeship_max_waiting": "64",
        "moeship_prefix_cache": "1",
        "moeship_drafts": "1",
        "moeship_kv_cache": "float",
        "moeship_max_wait_s": "60",
        "moeship_pause_target_ms": "250",
    }
    labels = model_config_pb2.DataType
    inputs = [(item.name, labels.Name(item.data_type), tuple(item.dims), item.optional) for item in config.input]
    assert inputs == [(t.name, f"TYPE_{t.dtype}", t.dims, t.optional) for t in (*INPUTS, *COMPATIBILITY_INPUTS)]
    outputs = [(item.name, labels.Name(item.data_type), tuple(item.dims)) for item in config.output]
    assert outputs == [(t.name, f"TYPE_{t.dtype}", t.dims) for t in (*OUTPUTS, *ADDED_OUTPUTS)]


def test_an_engine_for_cuda_gets_an_instance_on_each_gpu(tmp_path, tiny_engines):
    package(tiny_engines("int4", "cuda"), tmp_path / "repository")
    config = read_config(tmp_path / "repository" / "phixtral" / "config.pbtxt")
    [group] = config.instance_group
    assert (group.kind, group.count, list(group.gpus)) == (model_config_pb2.ModelInstanceGroup.KIND_GPU, 1, [])


def test_no_tensor_is_named_twice():
    for tensors in ((*INPUTS, *COMPATIBILITY_INPUTS), (*OUTPUTS, *ADDED_OUTPUTS)):
        names = [tensor.name for tensor in tensors]
        assert len(set(names)) == len(names)


def test_the_required_inputs_are_the_prompt_and_its_length():
    assert [t.name for t in (*INPUTS, *COMPATIBILITY_INPUTS) if not t.optional] == ["text_input", "max_tokens"]


def test_the_engine_is_linked_whole_and_opens_in_its_new_place(tmp_path, tiny_engine):
    result = package(tiny_engine, tmp_path / "repository")
    version = tmp_path / "repository" / "phixtral" / "1"
    assert entries(tmp_path / "repository" / "phixtral") == ["1", "config.pbtxt"]
    assert entries(version) == ["engine", "engine.seal.json", "model.py"]
    assert open_engine(version / "engine").manifest == open_engine(tiny_engine).manifest
    assert (version / "engine" / "model.onnx.data").samefile(tiny_engine / "model.onnx.data")
    assert (result.engine_bytes, result.copied_bytes) == (open_engine(tiny_engine).num_bytes, 0)


def test_a_copied_engine_shares_nothing_with_its_source(tmp_path, tiny_engine):
    result = package_engine(PackageOptions(engine=tiny_engine, name="m", output=tmp_path / "repository", copy=True))
    copied = result.folder / "1" / "engine" / "model.onnx.data"
    assert not copied.samefile(tiny_engine / "model.onnx.data")
    assert copied.read_bytes() == (tiny_engine / "model.onnx.data").read_bytes()
    assert result.copied_bytes == result.engine_bytes + (tiny_engine / "engine.json").stat().st_size


def test_the_engine_is_copied_where_links_are_refused(tmp_path, tiny_engine, monkeypatch):
    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    result = package(tiny_engine, tmp_path / "repository")
    engine = tmp_path / "repository" / "phixtral" / "1" / "engine"
    open_engine(engine)
    assert not (engine / "model.onnx.data").samefile(tiny_engine / "model.onnx.data")
    assert result.copied_bytes == result.engine_bytes + (engine / "engine.json").stat().st_size


def test_a_model_is_added_to_an_existing_repository(tmp_path, tiny_engine):
    package(tiny_engine, tmp_path / "repository")
    package(tiny_engine, tmp_path / "repository", name="other")
    assert entries(tmp_path / "repository") == ["other", "phixtral"]


def test_a_model_is_never_overwritten(tmp_path, tiny_engine):
    package(tiny_engine, tmp_path / "repository")
    before = (tmp_path / "repository" / "phixtral" / "config.pbtxt").read_text()
    with pytest.raises(OutputError, match="phixtral exists already; name another output or remove it first"):
        package(tiny_engine, tmp_path / "repository", unary=True)
    assert (tmp_path / "repository" / "phixtral" / "config.pbtxt").read_text() == before
    assert entries(tmp_path / "repository") == ["phixtral"]


def test_a_folder_of_other_things_is_refused(tmp_path, tiny_engine):
    (tmp_path / "home" / "photos").mkdir(parents=True)
    with pytest.raises(OutputError, match="not a model repository, it holds photos without a config.pbtxt"):
        package(tiny_engine, tmp_path / "home")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not a model repository, it is a file"):
        package(tiny_engine, tmp_path / "file")


def test_a_damaged_engine_is_refused_and_nothing_is_written(tmp_path, tiny_engine):
    engine = tmp_path / "engine"
    shutil.copytree(tiny_engine, engine)
    content = bytearray((engine / "model.onnx.data").read_bytes())
    content[1000] ^= 4
    (engine / "model.onnx.data").write_bytes(content)
    with pytest.raises(EngineError, match=r"model.onnx.data: .* \(bytes 0 to \d+\): found SHA-256 \w+…, expected"):
        package(engine, tmp_path / "repository")
    assert entries(tmp_path) == ["engine"]


def test_a_failure_half_way_leaves_nothing(tmp_path, tiny_engine, monkeypatch):
    package(tiny_engine, tmp_path / "repository")

    def fail(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("triton_repo.packaging.package.shutil.copyfile", fail)
    for output in (tmp_path / "repository", tmp_path / "new"):
        with pytest.raises(OutputError, match="No space left on device"):
            package(tiny_engine, output, name="other")
    assert entries(tmp_path) == ["repository"]
    assert entries(tmp_path / "repository") == ["phixtral"]


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b", "-x", "ä", "x" * 129])
def test_a_name_that_triton_or_a_path_would_misread_is_refused(tmp_path, tiny_engine, name):
    with pytest.raises(RepositoryError) as caught:
        package(tiny_engine, tmp_path / "repository", name=name)
    assert f"the name is {name!r}" in str(caught.value)
    assert entries(tmp_path) == []


def test_every_unusable_option_is_reported(tmp_path, tiny_engine):
    wrong = ModelParameters(slots=0, threads=99999999999, memory_budget=-1, max_waiting=0, pause_target_ms=10**9)
    with pytest.raises(RepositoryError) as caught:
        package(tiny_engine, tmp_path / "repository", name="a/b", onnxruntime=wrong)
    for problem in (
        "the name is 'a/b'",
        "slots is 0; expected 1 to 256",
        "memory_budget is -1; expected 1 to",
        "max_waiting is 0; expected 1 to",
        "pause_target_ms is 1000000000; expected 1 to 60000",
        "threads is 99999999999; expected 1 to 4096",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"moeship_engine": "engine"},
        {"moeship_engine": "e", "moeship_threads": "-1"},
        {"moeship_engine": "e", "moeship_threads": "9" * 5000},
    ],
)
def test_parameters_that_are_absent_or_no_values_are_refused(texts):
    with pytest.raises(RepositoryError, match="reading the parameters of the model m: .*package the engine again"):
        ModelParameters.from_texts(texts, "m")


def test_numbers_are_read_as_they_are_written_or_refused():
    parameters = ModelParameters(
        slots=3, memory_budget=10**9, max_waiting=7, max_wait_s=5, pause_target_ms=40, prefix_cache=False, drafts=False
    )
    assert ModelParameters.from_texts(dataclasses.replace(parameters, drafts=True).to_texts(), "m").drafts
    assert ModelParameters.from_texts(parameters.to_texts(), "m") == parameters
    for name in ("moeship_slots", "moeship_max_waiting", "moeship_max_wait_s", "moeship_pause_target_ms"):
        for text in ("0", "two", "", "9" * 5000, "auto"):
            with pytest.raises(RepositoryError, match=f"of the model m: {name} is .*, expected a number of 1 to"):
                ModelParameters.from_texts({**parameters.to_texts(), name: text}, "m")
    for name in ("moeship_prefix_cache", "moeship_drafts"):
        for text in ("2", "yes", ""):
            with pytest.raises(RepositoryError, match=f"of the model m: {name} is .*, expected 0 or 1"):
                ModelParameters.from_texts({**parameters.to_texts(), name: text}, "m")
    missing = {key: text for key, text in parameters.to_texts().items() if key != "moeship_slots"}
    with pytest.raises(RepositoryError, match="of the model m: moeship_slots is absent: package the engine again"):
        ModelParameters.from_texts(missing, "m")


@pytest.mark.parametrize(
    ("text", "expected"), [("800", 800), ("4GB", 4 * 10**9), ("1.5 MB", 1_500_000), ("2k", 2000), ("4GiB", None)]
)
def test_a_memory_budget_is_read_in_powers_of_a_thousand(text, expected):
    if expected is None:
        with pytest.raises(argparse.ArgumentTypeError, match="expected a number of bytes such as 4GB or 800MB"):
            byte_count(text)
    else:
        assert byte_count(text) == expected


def test_the_command_prints_its_result_for_machines(tmp_path, tiny_engine, capsys):
    arguments = ["package", str(tiny_engine), "--name", "m", "--output", str(tmp_path / "repository"), "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["folder"] == str(tmp_path / "repository" / "m")
    assert main(arguments) == 2
    assert "m exists already" in capsys.readouterr().err
