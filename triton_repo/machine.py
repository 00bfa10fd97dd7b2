"""Whether this machine can run what a repository holds: a Deployment and the machine's readings in, refusals out.

What cannot be read (no nvidia-smi, TensorRT-LLM outside this Python) is not judged.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from export.errors import listing
from triton_repo.deployment import TRTLLM_BACKEND, Deployment, GpuModel
from triton_repo.errors import ServerError

logger = logging.getLogger(__name__)

# The newest container of each TensorRT-LLM release. Source: docs/introduction/compatibility.md of
# triton-inference-server/server, whose rows for TensorRT-LLM end with 26.07.
_CONTAINERS = {"1.0.0": "25.10", "1.1.0": "26.02", "1.2.0": "26.03", "1.2.1": "26.07"}
_NEWEST = "1.2.1"
_NVIDIA_SMI_TIMEOUT_S = 30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """`index` and `uuid` as nvidia-smi gives them; `sm`: 90 is compute capability 9.0."""

    index: int
    name: str
    sm: int
    uuid: str = ""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Readings. `gpus`: None where nobody could be asked; `visible`: how many of them CUDA_VISIBLE_DEVICES leaves, None
    for all; `tensorrt_llm`: the version that is installed for this Python, None for none.
    """

    gpus: tuple[Gpu, ...] | None
    visible: int | None = None
    tensorrt_llm: str | None = None


def read_machine(environment: Mapping[str, str] = os.environ) -> Machine:
    """Ask nvidia-smi, the environment and the installed packages."""
    gpus = _read_gpus()
    try:
        library = importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        library = None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if gpus is None or visible is None:
        return Machine(gpus=gpus, tensorrt_llm=library)
    chosen = visible_gpus(gpus, visible, by_bus=environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID")
    return Machine(gpus=chosen, visible=len(_entries(visible)), tensorrt_llm=library)


def visible_gpus(gpus: tuple[Gpu, ...], visible: str, *, by_bus: bool) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES may mean: all, where that is not certain.

    CUDA numbers the fastest first unless it is told to number by bus, as nvidia-smi does.
    """
    entries = _entries(visible)
    alike = len({gpu.sm for gpu in gpus}) <= 1
    named = {gpu.uuid: gpu for gpu in gpus} | ({str(gpu.index): gpu for gpu in gpus} if by_bus or alike else {})
    certain = all(entry in named for entry in entries)
    return tuple(named[entry] for entry in entries) if certain else gpus


def _entries(visible: str) -> list[str]:
    """CUDA stops at the first entry that is no device, as -1 (CUDA C++ Programming Guide, environment variables)."""
    entries = []
    for entry in visible.split(","):
        if entry.strip() in ("", "-1"):
            break
        entries.append(entry.strip())
    return entries


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """From nvidia-smi --query-gpu=index,compute_cap,uuid,name --format=csv,noheader. Raises ValueError."""
    gpus = []
    for line in text.strip().splitlines():
        index, capability, uuid, name = (field.strip() for field in line.split(",", 3))
        major, minor = capability.split(".")
        gpus.append(Gpu(index=int(index), name=name, sm=10 * int(major) + int(minor), uuid=uuid))
    return tuple(gpus)


def _read_gpus() -> tuple[Gpu, ...] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=index,compute_cap,uuid,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_NVIDIA_SMI_TIMEOUT_S)
        return parse_gpus(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        logger.debug("nvidia-smi told nothing of the GPUs: %s", error)
        return None


def container(library: str | None) -> str:
    """The NGC container with that TensorRT-LLM, its month left open where it is not known; None asks for the newest."""
    month = _CONTAINERS.get(_release(library), "<yy.mm>") if library else _CONTAINERS[_NEWEST]
    return f"nvcr.io/nvidia/tritonserver:{month}-trtllm-python-py3"


def check_machine(deployment: Deployment, machine: Machine, backends: Path | None) -> None:
    """Refuse what would fail for certain when it is loaded. `backends`: the server's folder of them, None if unknown.

    Raises ServerError listing every problem: no tensorrtllm backend, an engine of another TensorRT-LLM or for another
    GPU, more ranks than GPUs.
    """
    problems = [
        problem
        for model in deployment.gpu_models
        for problem in (*_backend(model, backends), *_library(model, machine), *_gpus(model, machine))
    ]
    if problems:
        raise ServerError(f"serving on this machine:{listing(problems)}")


def _backend(model: GpuModel, backends: Path | None) -> Iterator[str]:
    if model.backend == TRTLLM_BACKEND and backends is not None and not (backends / TRTLLM_BACKEND).is_dir():
        wanted = container(model.engine.library if model.engine else None)
        yield (
            f"{model.name}: its backend {TRTLLM_BACKEND} is not in {backends}; serve it in the container {wanted}, "
            "which has it"
        )


def _library(model: GpuModel, machine: Machine) -> Iterator[str]:
    built_by, installed = model.engine.library if model.engine else None, machine.tensorrt_llm
    if built_by and installed and _release(built_by) != _release(installed):
        yield (
            f"{model.name}: its engine was built by TensorRT-LLM {built_by}, {installed} is installed here, and an "
            f"engine runs on its own release alone; serve it in {container(built_by)}, or build it again here"
        )


def _gpus(model: GpuModel, machine: Machine) -> Iterator[str]:
    if machine.gpus is None:
        return
    needed = model.world_size or 1
    available = len(machine.gpus) if machine.visible is None else machine.visible
    found = ", ".join(f"{gpu.name} (SM {gpu.sm})" for gpu in machine.gpus) or "none"
    sm = model.engine.sm if model.engine else None
    fitting = sum(sm in (None, gpu.sm) for gpu in machine.gpus)
    if needed > available:
        hidden = "" if machine.visible is None else " as CUDA_VISIBLE_DEVICES has it"
        yield f"{model.name}: runs on {needed} GPU(s), one a rank, and this machine has {available}{hidden}: {found}"
    elif needed > fitting and model.engine:
        yield (
            f"{model.name}: its engine was built for SM {sm} ({model.engine.gpu or 'name not noted'}), needs {needed} "
            f"of them, and this machine has {found}; an engine runs on the architecture it was built for: build it "
            "again here"
        )


def _release(version: str) -> str:
    """A version without what a distributor added, as +cu130."""
    return version.partition("+")[0]
