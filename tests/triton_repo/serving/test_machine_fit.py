"""A repository against a machine: backend, library, architecture and number of GPUs, each from readings given here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from triton_repo.errors import RepositoryError, ServerError
from triton_repo.serving.deployment import EngineOrigin, GpuModel, read_deployment
from triton_repo.serving.machine_fit import check_machine
from trt_build.machine.readings import Gpu, Machine
from trt_build.manifest import digested_text

A100 = Gpu(index=0, name="NVIDIA A100-SXM4-80GB", sm=80, uuid="GPU-a")
H100 = Gpu(index=1, name="NVIDIA H100 80GB HBM3", sm=90, uuid="GPU-h")
PARAMETERS = {"moeship_world_size": "2"}


def engine_json(**changes) -> dict:
    return {
        "format_version": 1, "backend": "tensorrt-llm", "gpu": {"name": "NVIDIA H100 80GB HBM3", "sm": 90},
        "libraries": {"tensorrt_llm": "1.2.0", "tensorrt": "10.14.1.48"},
        "parallel": {"tp_size": 2, "pp_size": 1, "moe_tp_size": 1, "moe_ep_size": 2}, **changes,
    }  # fmt: skip


def write_model(folder: Path, backend: str, parameters: dict[str, str], engine: dict | None = None) -> Path:
    (folder / "1" / "engine").mkdir(parents=True)
    lines = [f'name: "{folder.name}"', f'backend: "{backend}"']
    lines += [f'parameters {{ key: "{key}" value {{ string_value: "{text}" }} }}' for key, text in parameters.items()]
    (folder / "config.pbtxt").write_text("\n".join(lines))
    if engine is not None:
        (folder / "1" / "engine" / "engine.json").write_text(json.dumps(engine))
    return folder.parent


@pytest.fixture
def backends(tmp_path) -> Path:
    (tmp_path / "backends" / "tensorrtllm").mkdir(parents=True)
    return tmp_path / "backends"


@pytest.fixture
def deployment(tmp_path):
    """A model of two ranks whose engine was built for an H100."""
    return read_deployment(write_model(tmp_path / "r" / "tensorrt_llm", "tensorrtllm", PARAMETERS, engine_json()))


def two(gpu: Gpu) -> Machine:
    return Machine(gpus=(gpu, gpu), tensorrt_llm="1.2.0")


def refusal(deployment, machine: Machine, backends: Path | None) -> str:
    with pytest.raises(ServerError) as caught:
        check_machine(deployment, machine, backends)
    assert str(caught.value).startswith("serving on this machine:\n  - tensorrt_llm: ")
    return str(caught.value)


def test_models_on_tensorrt_llm_are_known_by_backend_or_parameter_with_what_they_need(tmp_path):
    write_model(tmp_path / "r" / "llm", "tensorrtllm", PARAMETERS, engine_json())
    write_model(tmp_path / "r" / "other_maker", "tensorrtllm", {})
    write_model(tmp_path / "r" / "by_parameter", "python", PARAMETERS, {"backend": "onnxruntime"})
    write_model(tmp_path / "r" / "successor", "python", {"moeship_gpus": "4"})
    write_model(tmp_path / "r" / "onnx", "python", {"moeship_engine": "engine"}, {"backend": "onnxruntime"})
    write_model(tmp_path / "r" / ".hidden", "tensorrtllm", {})
    (tmp_path / "r" / "front").mkdir()
    (tmp_path / "r" / "front" / "config.pbtxt").write_text(
        'platform: "ensemble" ensemble_scheduling { step { model_name: "llm" } step { model_name: "onnx" } }'
    )
    found = read_deployment(tmp_path / "r")
    origin = EngineOrigin(gpu="NVIDIA H100 80GB HBM3", sm=90, library="1.2.0", world_size=2)
    assert found.gpu_models == (
        GpuModel(name="by_parameter", backend="python", world_size=2, spawns=False, engine=None),
        GpuModel(name="llm", backend="tensorrtllm", world_size=2, spawns=False, engine=origin),
        GpuModel(name="other_maker", backend="tensorrtllm", world_size=None, spawns=False, engine=None),
        GpuModel(name="successor", backend="python", world_size=4, spawns=True, engine=None),
    )
    assert [model.name for model in found.ranked] == ["by_parameter", "llm", "other_maker"]
    assert found.steps == {"llm", "onnx"}


@pytest.mark.parametrize("text", ["two", "0", "-1", ""])
def test_a_world_size_that_is_no_number_is_refused(tmp_path, text):
    repository = write_model(tmp_path / "r" / "llm", "tensorrtllm", {"moeship_world_size": text})
    with pytest.raises(RepositoryError, match=f"moeship_world_size is '{text}', expected a number of 1 or more"):
        read_deployment(repository)


@pytest.mark.parametrize("damage", [{"gpu": None}, {"parallel": {"tp_size": 2}}, {"libraries": None}])
def test_a_damaged_manifest_is_refused_by_its_path(tmp_path, damage):
    repository = write_model(tmp_path / "r" / "llm", "tensorrtllm", PARAMETERS, engine_json(**damage))
    with pytest.raises(
        RepositoryError, match=r"reading .*engine.json: it is not the manifest of a TensorRT-LLM engine \("
    ):
        read_deployment(repository)


def test_an_engine_that_is_split_otherwise_than_its_config_says_is_refused(tmp_path):
    repository = write_model(tmp_path / "r" / "llm", "tensorrtllm", {"moeship_world_size": "4"}, engine_json())
    with pytest.raises(RepositoryError, match="moeship_world_size is 4, and its engine was built for 2 ranks"):
        read_deployment(repository)


def test_the_engine_of_the_highest_version_is_the_one_that_is_served(tmp_path):
    repository = write_model(tmp_path / "r" / "llm", "tensorrtllm", PARAMETERS, engine_json())
    for version, library in {"9": "1.0.0", "10": "1.1.0", "old": "0.9.0"}.items():
        (repository / "llm" / version / "engine").mkdir(parents=True)
        manifest = engine_json(libraries={"tensorrt_llm": library})
        (repository / "llm" / version / "engine" / "engine.json").write_text(json.dumps(manifest))
    [model] = read_deployment(repository).gpu_models
    assert model.engine.library == "1.1.0"


def test_a_machine_of_the_engines_kind_is_taken(deployment, backends):
    check_machine(deployment, two(H100), backends)
    check_machine(deployment, Machine(gpus=None), None)


def test_a_server_without_the_backend_is_refused_with_the_container_that_has_it(deployment, tmp_path):
    text = refusal(deployment, two(H100), tmp_path)
    assert f"its backend tensorrtllm is not in {tmp_path}" in text
    assert "serve it in the container nvcr.io/nvidia/tritonserver:26.03-trtllm-python-py3" in text


def test_another_release_of_the_library_is_refused(deployment, backends):
    text = refusal(deployment, Machine(gpus=(H100, H100), tensorrt_llm="1.2.1"), backends)
    assert "built by TensorRT-LLM 1.2.0, 1.2.1 is installed here" in text
    assert "tritonserver:26.03-trtllm-python-py3, or build it again here" in text
    check_machine(deployment, Machine(gpus=(H100, H100), tensorrt_llm="1.2.0+cu131"), backends)


def test_another_architecture_is_refused_with_both_names(deployment, backends):
    text = refusal(deployment, two(A100), backends)
    assert "built for SM 90 (NVIDIA H100 80GB HBM3), needs 2 of them" in text
    assert "this machine has NVIDIA A100-SXM4-80GB (SM 80), NVIDIA A100-SXM4-80GB (SM 80)" in text
    assert "needs 2 of them" in refusal(deployment, Machine(gpus=(A100, H100)), backends)
    check_machine(deployment, Machine(gpus=(A100, H100, H100)), backends)


def test_an_engine_that_notes_no_gpu_is_not_judged_by_it(tmp_path, backends):
    unknown = engine_json(gpu={"name": None, "sm": None}, libraries={})
    repository = write_model(tmp_path / "r" / "tensorrt_llm", "tensorrtllm", PARAMETERS, unknown)
    check_machine(read_deployment(repository), two(A100), backends)


@pytest.mark.parametrize(
    ("machine", "found"),
    [
        (Machine(gpus=(H100,)), "this machine has 1: NVIDIA H100 80GB HBM3 (SM 90)"),
        (Machine(gpus=()), "this machine has 0: none"),
        (Machine(gpus=(H100, H100), visible=1), "this machine has 1 (limited by CUDA_VISIBLE_DEVICES): NVIDIA H100"),
    ],
)
def test_more_ranks_than_gpus_are_refused_with_both_numbers(deployment, backends, machine, found):
    text = refusal(deployment, machine, backends)
    assert "runs on 2 GPU(s), one for each rank, and " + found in text


def test_every_problem_is_told_at_once(deployment, tmp_path):
    text = refusal(deployment, Machine(gpus=(A100,), tensorrt_llm="1.1.0"), tmp_path)
    assert text.count("\n  - tensorrt_llm: ") == 3


def test_a_model_that_says_nothing_of_its_ranks_is_judged_by_those_asked_for(tmp_path, backends):
    other = read_deployment(write_model(tmp_path / "r" / "tensorrt_llm", "tensorrtllm", {}))
    check_machine(other, Machine(gpus=(H100,)), backends)
    with pytest.raises(ServerError, match=r"runs on 4 GPU\(s\), one for each rank, and this machine has 1"):
        check_machine(other, Machine(gpus=(H100,)), backends, ranks=4)


def test_an_edited_engine_json_is_refused(tmp_path):
    values = engine_json(format_version=2)
    repository = write_model(tmp_path / "r" / "llm", "tensorrtllm", PARAMETERS)
    path = repository / "llm" / "1" / "engine" / "engine.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(digested_text(values))
    assert read_deployment(repository).gpu_models[0].engine is not None
    path.write_text(path.read_text().replace('"sm": 90', '"sm": 80'))
    with pytest.raises(RepositoryError, match=r"reading .*engine.json: .* was edited or is damaged: found the digest"):
        read_deployment(repository)
