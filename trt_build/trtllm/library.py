"""Finds and runs trtllm-build, and tells the user how to finish a build where TensorRT-LLM is not installed.

moeship runs TensorRT-LLM as a separate program, since the library needs other versions of torch and transformers than
moeship's Python environment has.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trt_build.errors import EngineError, LibraryMissing
from trt_build.machine.child import child_program
from trt_build.machine.readings import BUILD_PROGRAM, LIBRARY, Machine, container, library_python
from trt_build.trtllm.options import SUPPORTED

LOG_TAIL_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Library:
    """The path of trtllm-build, the Python in which TensorRT-LLM is installed, and the version of TensorRT-LLM."""

    program: Path
    python: Path
    version: str


def find_library(machine: Machine) -> Library | list[str]:
    """The installed TensorRT-LLM if an engine can be built here, otherwise one message for each thing that is
    missing."""
    program, python = shutil.which(BUILD_PROGRAM), library_python()
    missing = []
    if program is None:
        missing.append(f"no {BUILD_PROGRAM} on PATH")
    elif python is None or machine.tensorrt_llm is None:
        missing.append(f"the Python that runs {program} has no package {LIBRARY}")
    if not machine.gpus:
        missing.append("no GPU is visible to nvidia-smi")
    if missing or program is None or python is None or machine.tensorrt_llm is None:
        return missing
    return Library(program=Path(program), python=python, version=machine.tensorrt_llm)


def library_missing(
    missing: Sequence[str], checkpoint: Path, command: Sequence[str], mounts: Sequence[Path]
) -> LibraryMissing:
    """The error that says what is missing and gives the docker command that finishes the build. `command` is this
    build's command line without `python`; `mounts` are the folders that it reads and writes."""
    home, python = Path(__file__).resolve().parents[2], "/tmp/moeship/bin/python"
    volumes = sorted({str(path.resolve()) for path in (home, *mounts)})
    options = " ".join(f"-v {shlex.quote(folder)}:{shlex.quote(folder)}" for folder in volumes)
    inside = (
        "pip install -q virtualenv && virtualenv -q /tmp/moeship && "
        f"{python} -m pip install -q {shlex.quote(str(home))} && {python} {shlex.join(command)}"
    )
    return LibraryMissing(
        f"building the engine needs TensorRT-LLM {SUPPORTED[0]} to {SUPPORTED[-1]} and a GPU: {'; '.join(missing)}. "
        f"The checkpoint is written: {checkpoint}. The same command continues from it on a machine with a GPU:\n"
        f"  docker run --rm --gpus all --ipc host {options} -w {shlex.quote(str(Path.cwd()))} {container(None)} \\\n"
        f"    bash -c {shlex.quote(inside)}"
    )


def run_build(library: Library, flags: Sequence[str], folder: Path) -> None:
    """Run trtllm-build in `folder` and copy its output to stderr. Raises EngineError with the last lines of the output
    if it fails. If this process ends, trtllm-build is ended too."""
    command = [str(library.program), *flags]
    last: deque[str] = deque(maxlen=LOG_TAIL_LINES)
    with child_program(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stderr.write(line)
            last.append(line.rstrip())
        status = process.wait()
    if status:
        tail = "".join(f"\n    {line}" for line in last)
        raise EngineError(
            f"building the engine: {shlex.join(command)} ended with status {status}; the checkpoint is kept, and the "
            f"same command continues from it. The end of its output:{tail}"
        )
