"""Whether this machine can run a repository: compares a Deployment with the readings of the machine, and checks
moeship's CPU kernels.

A reading that is missing is not compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from export.errors import listing
from triton_repo.contracts.model_parameters import TRITON_BACKEND
from triton_repo.errors import ServerError
from triton_repo.serving.deployment import Deployment, GpuModel
from trt_build.machine.readings import Machine, container, release
from trt_build.ort.kernels import library


def check_machine(deployment: Deployment, machine: Machine, backends: Path | None, ranks: int = 1) -> None:
    """Raise ServerError that lists every model that would certainly fail to load: no tensorrtllm backend, an engine of
    another TensorRT-LLM or for another GPU, more ranks than GPUs.

    `backends` is the server's folder of backends, None if unknown. `ranks` is the number for a model that does not say
    how many ranks it has.
    """
    problems = [
        problem
        for model in deployment.gpu_models
        for problem in (*_backend(model, backends), *_library(model, machine), *_gpus(model, machine, ranks))
    ]
    if problems:
        raise ServerError(f"serving on this machine:{listing(problems)}")


def check_kernels(deployment: Deployment) -> None:
    """Raise EngineError if an engine needs moeship's CPU kernels and this machine cannot use them, or if
    MOESHIP_KERNELS_LEVEL names a level that this CPU does not have."""
    for engine in deployment.own_kernels:
        library(f"serving the engine {engine}: loading its CPU kernels")


def _backend(model: GpuModel, backends: Path | None) -> Iterator[str]:
    if model.backend == TRITON_BACKEND and backends is not None and not (backends / TRITON_BACKEND).is_dir():
        wanted = container(model.engine.library if model.engine else None)
        yield (
            f"{model.name}: its backend {TRITON_BACKEND} is not in {backends}; serve it in the container {wanted}, "
            "which has it"
        )


def _library(model: GpuModel, machine: Machine) -> Iterator[str]:
    built_by, installed = model.engine.library if model.engine else None, machine.tensorrt_llm
    if built_by and installed and release(built_by) != release(installed):
        yield (
            f"{model.name}: its engine was built by TensorRT-LLM {built_by}, {installed} is installed here, and an "
            f"engine runs only on the release that built it; serve it in {container(built_by)}, or build it again here"
        )


def _gpus(model: GpuModel, machine: Machine, ranks: int) -> Iterator[str]:
    if machine.gpus is None:
        return
    needed = model.world_size or ranks
    available = len(machine.gpus) if machine.visible is None else machine.visible
    found = ", ".join(f"{gpu.name} (SM {gpu.sm})" for gpu in machine.gpus) or "none"
    sm = model.engine.sm if model.engine else None
    fitting = sum(sm in (None, gpu.sm) for gpu in machine.gpus)
    if needed > available:
        hidden = "" if machine.visible is None else " (limited by CUDA_VISIBLE_DEVICES)"
        yield (
            f"{model.name}: runs on {needed} GPU(s), one for each rank, and this machine has {available}{hidden}: "
            f"{found}"
        )
    elif needed > fitting and model.engine:
        yield (
            f"{model.name}: its engine was built for SM {sm} ({model.engine.gpu or 'name not recorded'}), needs "
            f"{needed} "
            f"of them, and this machine has {found}; an engine runs on the architecture it was built for: build it "
            "again here"
        )
