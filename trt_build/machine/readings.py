"""Reads what this machine has for TensorRT-LLM: its GPUs, the GPUs that CUDA may use, and the version of the library.

TensorRT-LLM may be installed in another Python than this one, as in its containers: the Python that runs trtllm-build.
A value that cannot be read is None.
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
# Beginning of the second line, after #!/bin/sh, that pip writes into a script if the path of Python is too long for
# the first line or has a space in it. Source: pip/_vendor/distlib/scripts.py.
_LONG_PATH = "'''exec' "
_NVIDIA_SMI_TIMEOUT_S = 30
_PYTHON_TIMEOUT_S = 60


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU: `index` and `uuid` as nvidia-smi prints them; `sm` is 90 for compute capability 9.0."""

    index: int
    name: str
    sm: int
    uuid: str = ""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was read of this machine. `gpus`: None if nvidia-smi is missing or failed; `visible`: number of GPUs that
    CUDA_VISIBLE_DEVICES allows, None for all; `tensorrt_llm`: version of the library, None if it is not installed.
    """

    gpus: tuple[Gpu, ...] | None
    visible: int | None = None
    tensorrt_llm: str | None = None


def read_machine(environment: Mapping[str, str] = os.environ) -> Machine:
    """Read the GPUs from nvidia-smi, CUDA_VISIBLE_DEVICES from the environment, and the version of TensorRT-LLM."""
    gpus, library = _read_gpus(), library_version()
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if gpus is None or visible is None:
        return Machine(gpus=gpus, tensorrt_llm=library)
    chosen = visible_gpus(gpus, visible, by_bus=environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID")
    return Machine(gpus=chosen, visible=len(_entries(visible)), tensorrt_llm=library)


def library_version() -> str | None:
    """The version of TensorRT-LLM in this Python, or in the Python that runs trtllm-build. The library is not
    imported."""
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
        logger.debug("cannot read the version of TensorRT-LLM by running %s: %s", python, error)
        return None
    return answer.stdout.strip()


def library_python() -> Path | None:
    """The path of the Python that runs trtllm-build, read from the first lines of that script as pip writes them."""
    program = shutil.which(BUILD_PROGRAM)
    if program is None:
        return None
    with Path(program).open(encoding="utf-8", errors="replace") as file:
        first, second = file.readline(), file.readline()
    if second.startswith(_LONG_PATH):  # the first line is #!/bin/sh
        words = shlex.split(second.removeprefix(_LONG_PATH))[:1]
    else:
        words = first.removeprefix("#!").split()
    interpreter = words[1] if len(words) > 1 and Path(words[0]).name == "env" else words[0] if words else ""
    found = shutil.which(interpreter) if interpreter else None
    return Path(found) if found and Path(found).name.startswith("python") else None


def visible_gpus(gpus: tuple[Gpu, ...], visible: str, *, by_bus: bool) -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES selects; all GPUs if the selection is not certain.

    A number is uncertain where GPUs differ: CUDA numbers the fastest GPU first by default, nvidia-smi numbers by PCI
    bus. `by_bus` says that CUDA numbers by PCI bus too (CUDA_DEVICE_ORDER).
    """
    entries = _entries(visible)
    alike = len({gpu.sm for gpu in gpus}) <= 1
    named = {gpu.uuid: gpu for gpu in gpus} | ({str(gpu.index): gpu for gpu in gpus} if by_bus or alike else {})
    certain = all(entry in named for entry in entries)
    return tuple(named[entry] for entry in entries) if certain else gpus


def _entries(visible: str) -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES before the first that is no device, such as -1, where CUDA stops reading
    (CUDA C++ Programming Guide, environment variables)."""
    entries = []
    for entry in visible.split(","):
        if entry.strip() in ("", "-1"):
            break
        entries.append(entry.strip())
    return entries


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """The GPUs in the output of nvidia-smi --query-gpu=index,compute_cap,uuid,name --format=csv,noheader. Raises
    ValueError."""
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
        logger.debug("nvidia-smi failed or printed something unexpected: %s", error)
        return None


def container(library: str | None) -> str:
    """The name of the NGC container that has this version of TensorRT-LLM (None: the newest). For an unknown version
    the month is left as <yy.mm>."""
    month = _CONTAINERS.get(release(library), "<yy.mm>") if library else _CONTAINERS[_NEWEST]
    return f"nvcr.io/nvidia/tritonserver:{month}-trtllm-python-py3"


def release(version: str) -> str:
    """A version without its local suffix, such as +cu130."""
    return version.partition("+")[0]
