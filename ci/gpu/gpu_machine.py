"""Reads what a machine has for TensorRT-LLM engines and Triton, and lists every reason why it cannot run them.

The container's own Python also runs this, before anything is downloaded or built, so only the standard library is
imported until TensorRT-LLM is found.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_build.machine.readings import BUILD_PROGRAM, LIBRARY, MPIRUN, Machine, container, library_python, read_machine

BACKEND = "tensorrtllm"  # Triton's C++ backend for engines
PACKAGES = (LIBRARY, "tensorrt", "torch", "transformers", "nvidia-modelopt")  # packages of TensorRT-LLM's Python
# Variables in which images state their versions. Source: build.py of triton-inference-server/server, its base images.
IMAGE_VARIABLES = ("NVIDIA_TRITON_SERVER_VERSION", "TRITON_SERVER_VERSION", "CUDA_VERSION", "TRT_VERSION")
# Variables in which tensorrt_llm.sh passes the name and the digest of the image.
CONTAINER_VARIABLE, DIGEST_VARIABLE = "MOESHIP_CONTAINER", "MOESHIP_CONTAINER_DIGEST"
_MEBIBYTE = 1 << 20
_TIMEOUT_S = 60


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """Total and free bytes of one GPU's memory, and the version of the driver."""

    total: int
    free: int
    driver: str


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What was read of the machine. `memory` is by the GPU's uuid. `cuda` is the newest CUDA version that the driver
    supports, None if CUDA does not start, with the reason in `cuda_problem`. `packages` are those of TensorRT-LLM's
    Python; `backends` is Triton's folder of backends; `image` has the versions that the container states.
    """

    machine: Machine
    memory: Mapping[str, GpuMemory]
    cuda: str | None
    cuda_problem: str
    packages: Mapping[str, str]
    tritonserver: Path | None
    backends: Path | None
    mpirun: Path | None
    image: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        gpus = []
        for gpu in self.machine.gpus or ():
            memory = self.memory.get(gpu.uuid)
            gpus.append({"name": gpu.name, "sm": gpu.sm, "memory_bytes": memory.total if memory else None})
        return {
            "gpus": gpus,
            "driver": next((memory.driver for memory in self.memory.values()), None),
            "driver_cuda": self.cuda,
            "packages": dict(self.packages),
            "image": dict(self.image),
        }


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The most bytes that the work needs: of disk space below `output`, of main memory, and of each GPU's memory."""

    output: Path
    tp_size: int
    disk: int
    memory: int
    gpu: int


def read_readings(environment: Mapping[str, str] = os.environ) -> Readings:
    """Read the machine from nvidia-smi, the driver, TensorRT-LLM's Python, PATH and the environment."""
    cuda, problem = _start_cuda()
    found = shutil.which("tritonserver")
    backends = Path(found).resolve().parent.parent / "backends" if found else None
    mpirun = shutil.which(MPIRUN)
    names = (CONTAINER_VARIABLE, DIGEST_VARIABLE, *IMAGE_VARIABLES)
    return Readings(
        machine=read_machine(environment),
        memory=_read_memory(),
        cuda=cuda,
        cuda_problem=problem,
        packages=_read_packages(),
        tritonserver=Path(found) if found else None,
        backends=backends if backends and backends.is_dir() else None,
        mpirun=Path(mpirun) if mpirun else None,
        image={name: environment[name] for name in names if environment.get(name)},
    )


def parse_memory(text: str) -> dict[str, GpuMemory]:
    """Memory by GPU, from the output of nvidia-smi --query-gpu=uuid,memory.total,memory.free,driver_version
    --format=csv,noheader,nounits, which is in MiB. Raises ValueError."""
    found = {}
    for line in text.strip().splitlines():
        uuid, total, free, driver = (field.strip() for field in line.split(","))
        found[uuid] = GpuMemory(total=int(total) * _MEBIBYTE, free=int(free) * _MEBIBYTE, driver=driver)
    return found


def _read_memory() -> dict[str, GpuMemory]:
    query = "--query-gpu=uuid,memory.total,memory.free,driver_version"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
        return parse_memory(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}


def _start_cuda() -> tuple[str | None, str]:
    """The CUDA version of the driver, or None and the reason why CUDA does not start. Source: cuInit and
    cuDriverGetVersion of the CUDA driver API."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return None, str(error)
    status = driver.cuInit(0)
    if status:
        return None, f"cuInit ended with status {status}"
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}", ""


def _read_packages() -> dict[str, str]:
    """Versions of those of PACKAGES that TensorRT-LLM's Python has, read without importing them."""
    python = library_python()
    if python is None:
        return {}
    code = (
        "import importlib.metadata as m, json\n"
        "found = {}\n"
        f"for name in {PACKAGES!r}:\n"
        "    try:\n"
        "        found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError:\n"
        "        pass\n"
        "print(json.dumps(found))"
    )
    try:
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
        return dict(json.loads(answer.stdout))
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}


def problems(readings: Readings, needs: Needs) -> list[str]:
    """Every reason not to start the work. A value that could not be read gives no reason."""
    found = [*_gpu_problems(readings, needs), *_container_problems(readings, needs)]
    if LIBRARY in readings.packages:  # numpy is installed with it, and the other checks need numpy
        found += [*_version_problems(readings), *_space_problems(needs)]
    return found


def _gpu_problems(readings: Readings, needs: Needs) -> Iterator[str]:
    gpus = readings.machine.gpus
    if not gpus:
        yield (
            "no GPU is visible to nvidia-smi: start the container with --gpus all, on a machine with NVIDIA's driver "
            "and nvidia-container-toolkit"
        )
        return
    if readings.cuda is None:
        yield (
            f"CUDA does not start ({readings.cuda_problem}): the driver is too old for this container, or its "
            "installation is not complete"
        )
    count = len(gpus) if readings.machine.visible is None else readings.machine.visible
    if count < needs.tp_size:
        yield f"--tp-size is {needs.tp_size} and {count} GPU(s) can be used: {', '.join(gpu.name for gpu in gpus)}"
    for gpu in gpus[: needs.tp_size]:
        memory = readings.memory.get(gpu.uuid)
        if memory is not None and memory.free < needs.gpu:
            yield (
                f"{gpu.name} (GPU {gpu.index}) has {_gigabytes(memory.free)} of its {_gigabytes(memory.total)} free, "
                f"about {_gigabytes(needs.gpu)} are needed: free it, divide the model among GPUs with --tp-size, or "
                "ask for "
                "fewer --precisions"
            )


def _container_problems(readings: Readings, needs: Needs) -> Iterator[str]:
    missing = [] if LIBRARY in readings.packages else [f"{BUILD_PROGRAM} and its package {LIBRARY}"]
    if readings.tritonserver is None:
        missing.append("tritonserver")
    elif readings.backends is not None and not (readings.backends / BACKEND).is_dir():
        missing.append(f"{BACKEND} in {readings.backends}")
    if needs.tp_size > 1 and readings.mpirun is None:
        missing.append(MPIRUN)
    if missing:
        yield f"this container has no {', no '.join(missing)}: run it in {container(None)}"


def _version_problems(readings: Readings) -> Iterator[str]:
    from trt_build.trtllm.options import SUPPORTED

    version = readings.packages[LIBRARY]
    if not version.startswith(tuple(f"{line}." for line in SUPPORTED)):
        yield (
            f"this container has TensorRT-LLM {version}, and engines are built with {SUPPORTED[0]} to {SUPPORTED[-1]}: "
            f"run it in {container(None)}"
        )


def _space_problems(needs: Needs) -> Iterator[str]:
    from trt_build.machine.memory import available_memory

    memory = available_memory()
    if memory < needs.memory:
        yield (
            f"{_gigabytes(memory)} of main memory are available, about {_gigabytes(needs.memory)} are needed, most of "
            "them for the reference in float32"
        )
    folder = next(path for path in (needs.output, *needs.output.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needs.disk:
        yield (
            f"{folder} has {_gigabytes(free)} free, about {_gigabytes(needs.disk)} are needed: make room, or name "
            "another --output"
        )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
