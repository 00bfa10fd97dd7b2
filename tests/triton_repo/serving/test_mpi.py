"""From what a repository says to the ranks that are started, and what is refused before anything is."""

from __future__ import annotations

from pathlib import Path

import pytest

from triton_repo.errors import ServerError
from triton_repo.serving.deployment import Deployment, GpuModel
from triton_repo.serving.mpi import Launch, plan_launch

REPOSITORY = Path("repository")
CLOSED = ["--allow-grpc=false", "--allow-http=false", "--allow-metrics=false"]


def deployment(*models: tuple[str, int | None], spawns: bool = False) -> Deployment:
    return Deployment(
        gpu_models=tuple(
            GpuModel(name=name, backend="tensorrtllm", world_size=ranks, spawns=spawns, engine=None)
            for name, ranks in models
        ),
        steps=frozenset(),
    )


ONE, TWO = deployment(("tensorrt_llm", 1)), deployment(("tensorrt_llm", 2))
SEVERAL = deployment(("first", 2), ("second", 1))


@pytest.fixture(autouse=True)
def mpirun(tmp_path, monkeypatch) -> Path:
    program = tmp_path / "mpirun"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return program


def plan(of: Deployment, world_size: int | None = None, multi_model: bool = False) -> Launch:
    return plan_launch(REPOSITORY, of, world_size=world_size, multi_model=multi_model)


@pytest.mark.parametrize(
    "of", [deployment(), ONE, deployment(("first", 1), ("second", 1)), deployment(("mixtral", 4), spawns=True)]
)
def test_what_needs_one_process_is_started_without_mpirun(of, mpirun):
    mpirun.unlink()
    launch = plan(of)
    assert (launch.world_size, launch.environment()) == (1, {})
    assert launch.command([["tritonserver", "--flag"]], num_gpus=1) == ["tritonserver", "--flag"]


def test_each_rank_is_a_server_of_its_own_and_only_the_first_listens(mpirun):
    launch = plan(deployment(("tensorrt_llm", 3)))
    command = launch.command([["tritonserver", f"--of={rank}"] for rank in range(3)], num_gpus=3)
    others = ["--exit-on-error=true", *CLOSED, "--model-control-mode=explicit", "--load-model=tensorrt_llm"]
    assert command == [
        str(mpirun), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none",
        "-n", "1", "tritonserver", "--of=0",
        ":", "-n", "1", "tritonserver", "--of=1", *others,
        ":", "-n", "1", "tritonserver", "--of=2", *others,
    ]  # fmt: skip
    assert launch.environment() == {}


def test_an_orchestrator_is_one_process_under_mpirun_that_leaves_the_gpus_memory_to_its_workers(mpirun):
    launch = plan(SEVERAL, multi_model=True)
    assert launch.command([["tritonserver"]], num_gpus=2) == [
        str(mpirun), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "1", "tritonserver",
        "--pinned-memory-pool-byte-size=0", "--enable-peer-access=false",
        "--cuda-memory-pool-byte-size=0:0", "--cuda-memory-pool-byte-size=1:0",
    ]  # fmt: skip
    assert launch.environment() == {"TRTLLM_ORCHESTRATOR": "1", "TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES": "1"}
    assert launch.world_size == 1


def test_a_world_size_is_taken_where_the_repository_says_none_or_the_same():
    assert plan(deployment(("tensorrt_llm", None)), world_size=2).world_size == 2
    assert plan(deployment(("tensorrt_llm", None))).world_size == 1
    assert plan(TWO, world_size=2) == plan(TWO)
    assert plan(SEVERAL, world_size=1, multi_model=True).world_size == 1


@pytest.mark.parametrize(
    ("of", "asked", "problem"),
    [
        (TWO, {"world_size": 4}, "4 ranks were asked for, and tensorrt_llm is made for 2; leave the number out"),
        (TWO, {"world_size": 0}, "the world size is 0, expected 1 or more"),
        (ONE, {"world_size": 2}, "2 ranks were asked for, and tensorrt_llm is made for 1"),
        (deployment(), {"world_size": 2}, "2 ranks were asked for, and no model here runs an engine of TensorRT-LLM"),
        (SEVERAL, {}, "first, second all run on TensorRT-LLM, on up to 2 ranks; serve them with --multi-model"),
        (
            SEVERAL,
            {"world_size": 2, "multi_model": True},
            "a world size of 2 was asked for, and an orchestrator is one",
        ),
        (deployment(), {"multi_model": True}, "an orchestrator was asked for, and no model here runs an engine"),
    ],
)
def test_what_cannot_be_is_refused(of, asked, problem):
    with pytest.raises(ServerError) as caught:
        plan(of, **asked)
    assert str(caught.value).startswith("serving repository:\n  - ")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("of", "multi_model", "what"),
    [(TWO, False, "2 ranks cannot be started"), (SEVERAL, True, "an orchestrator cannot")],
)
def test_a_missing_mpirun_is_named_with_what_brings_it(of, multi_model, what, mpirun):
    mpirun.unlink()
    with pytest.raises(ServerError) as caught:
        plan(of, multi_model=multi_model)
    assert what in str(caught.value)
    assert "no mpirun on PATH; install Open MPI, or serve in NVIDIA's container, which has it" in str(caught.value)


def test_a_model_on_the_llm_api_is_not_started_below_mpirun():
    mixed = Deployment(
        gpu_models=(*TWO.gpu_models, *deployment(("mixtral", 4), spawns=True).gpu_models), steps=frozenset()
    )
    with pytest.raises(ServerError, match="mixtral runs on TensorRT-LLM's LLM API, .* a repository of its own"):
        plan(mixed)
