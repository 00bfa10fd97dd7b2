"""What a container with a GPU looks like to the scripts of ci/gpu, for tests on machines that have neither."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from trtllm.library import ROOT, install_programs
from trtllm.warm_python import warm_python

SCRIPTS = ROOT / "ci" / "gpu"
# Answers to the two questions that are asked; the first is the stand-in's own.
NVIDIA_SMI = """#!/bin/sh
case "$1" in
  --query-gpu=index,*) exec "{standin}" "$@" ;;
  --query-gpu=uuid,memory.total,memory.free,driver_version)
    [ "$2" = --format=csv,noheader,nounits ] || exit 2
    index=0
    while [ "$index" -lt "${{STANDIN_GPUS:-1}}" ]; do
      echo "GPU-standin-$index, 81559, ${{STANDIN_FREE:-81000}}, 590.44.01"
      index=$((index + 1))
    done ;;
  "") echo "a table" ;;
  *) exit 2 ;;
esac
"""
# The driver as far as it is asked; CUDA_STATUS is what cuInit gives.
LIBCUDA = """
#include <stdlib.h>
int cuInit(unsigned flags) { const char *status = getenv("CUDA_STATUS"); return status ? atoi(status) : 0; }
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
"""


@dataclass(frozen=True)
class Container:
    """Environment of a process in it, and the folder of Triton's backends."""

    environment: dict[str, str]
    backends: Path

    def run(self, *words, **variables):
        """ci/gpu/tensorrt_llm.sh inside it."""
        command = [SCRIPTS / "tensorrt_llm.sh", "--inside", *map(str, words)]
        environment = {**self.environment, **variables}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> Path:
    """A folder in which programs of the container look for libraries."""
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture(scope="session")
def reference_python(tmp_path_factory, libraries) -> Iterator[Path]:
    """A Python of the container that starts with what the reference computes with."""
    modules = ["torch", *(f"transformers.models.{name}.modeling_{name}" for name in ("phi", "mixtral"))]
    with warm_python(tmp_path_factory.mktemp("reference") / "bin", modules, libraries) as program:
        yield program


@pytest.fixture(scope="session")
def driver(libraries) -> Path:
    """The folder of a libcuda.so.1 that starts and has no GPU. Skips where no C compiler makes one."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler: cc is not on PATH")
    folder = libraries
    (folder / "cuda.c").write_text(LIBCUDA)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "cuda.c"], check=True)
    return folder


@pytest.fixture(scope="session")
def container(tmp_path_factory, driver, reference_python) -> Container:
    """TensorRT-LLM's stand-in where pip would have it, one GPU of SM 80 as far as nvidia-smi tells, and a tritonserver
    that finds no GPU."""
    folder = tmp_path_factory.mktemp("container")
    with pytest.MonkeyPatch.context() as patch:
        programs = install_programs(folder / "bin", patch, reference_python).parent
        environment = dict(os.environ)
    (programs / "nvidia-smi").rename(programs / "standin-nvidia-smi")
    server = folder / "tritonserver"
    for name in ("bin", "backends/tensorrtllm", "backends/python"):
        (server / name).mkdir(parents=True)
    for path, text in (
        (programs / "nvidia-smi", NVIDIA_SMI.format(standin=programs / "standin-nvidia-smi")),
        (server / "bin" / "tritonserver", "#!/bin/sh\necho this driver has no GPU behind it\nexit 7\n"),
    ):
        path.write_text(text)
        path.chmod(0o755)
    environment["PATH"] = f"{server / 'bin'}{os.pathsep}{environment['PATH']}"
    return Container(
        {**environment, "LD_LIBRARY_PATH": str(driver), "PYTHON": str(reference_python)}, server / "backends"
    )
