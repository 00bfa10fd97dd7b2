"""What this machine has for TensorRT-LLM: its GPUs, those that CUDA may use, and the library's version.

TensorRT-LLM may be another Python's, as in its containers: the one that trtllm-build is run by. What cannot be read is
None.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

# The newest container of each TensorRT-LLM release. Source: docs/introduction/compatibility.md of
# triton-inference-server/server, whose rows for TensorRT-LLM end with 26.07.
_CONTAINERS = {"1.0.0": "25.10", "1.0.3.2510": "25.11", "1.1.0": "26.02", "1.2.0": "26.03", "1.2.1": "26.07"}
_NEWEST = "1.2.1"
LIBRARY, BUILD_PROGRAM, MPIRUN = "tensorrt_llm", "trtllm-build", "mpirun"
_LONG_PATH = "'''exec' "  # pip's own, after #!/bin/sh: pip/_vendor/distlib/scripts.py
_NVIDIA_SMI_TIMEOUT_S = 30
_PYTHON_TIMEOUT_S = 60


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
    for all; `tensorrt_llm`: the library's version, None for none.
    """

    gpus: tuple[Gpu, ...] | None
    visible: int | None = None
    tensorrt_llm: str | None = None


def read_machine(environment: Mapping[str, str] = os.environ) -> Machine:
    """Ask nvidia-smi, the environment and the installed packages."""
    gpus, library = _read_gpus(), library_version()
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if gpus is None or visible is None:
        return Machine(gpus=gpus, tensorrt_llm=library)
    chosen = visible_gpus(gpus, visible, by_bus=environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID")
    return Machine(gpus=chosen, visible=len(_entries(visible)), tensorrt_llm=library)


def library_version() -> str | None:
    """The version of TensorRT-LLM that this Python has, or the one that trtllm-build is run by; it is not imported."""
    try:
        return importlib.metadata.version(LIBRARY)
    except importlib.metadata.PackageNotFoundError:
        python = library_python()
    if python is None:
        return None
    code = f"import importlib.metadata as m; print(m.version({LIBRARY!r}))"
    try:
        answer = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=True, timeout=_PYTHON_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.debug("%s told no version of TensorRT-LLM: %s", python, error)
        return None
    return answer.stdout.strip()


def library_python() -> Path | None:
    """The Python that has TensorRT-LLM: the one that trtllm-build names, as pip writes it."""
    program = shutil.which(BUILD_PROGRAM)
    if program is None:
        return None
    with Path(program).open(encoding="utf-8", errors="replace") as file:
        first, second = file.readline(), file.readline()
    if second.startswith(_LONG_PATH):  # one that a first line does not hold, or with a space in it
        words = shlex.split(second.removeprefix(_LONG_PATH))[:1]
    else:
        words = first.removeprefix("#!").split()
    interpreter = words[1] if len(words) > 1 and Path(words[0]).name == "env" else words[0] if words else ""
    found = shutil.which(interpreter) if interpreter else None
    return Path(found) if found and Path(found).name.startswith("python") else None


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
    month = _CONTAINERS.get(release(library), "<yy.mm>") if library else _CONTAINERS[_NEWEST]
    return f"nvcr.io/nvidia/tritonserver:{month}-trtllm-python-py3"


def release(version: str) -> str:
    """A version without what a distributor added, as +cu130."""
    return version.partition("+")[0]
