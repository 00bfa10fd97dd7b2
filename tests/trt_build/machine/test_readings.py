"""What is read of a machine: nvidia-smi's answer, what CUDA may use of it, TensorRT-LLM's version and its container."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from trt_build.machine import readings as machine_module
from trt_build.machine.readings import (
    Gpu,
    Machine,
    container,
    library_python,
    library_version,
    parse_gpus,
    read_machine,
    visible_gpus,
)

A100 = Gpu(index=0, name="NVIDIA A100-SXM4-80GB", sm=80, uuid="GPU-a")
H100 = Gpu(index=1, name="NVIDIA H100 80GB HBM3", sm=90, uuid="GPU-h")
# nvidia-smi --query-gpu=index,compute_cap,uuid,name --format=csv,noheader
CSV = "0, 8.0, GPU-a, NVIDIA A100-SXM4-80GB\n1, 9.0, GPU-h, NVIDIA H100 80GB HBM3\n"


def test_the_readings_come_from_nvidia_smi_the_environment_and_the_installed_package(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\n[ "$*" = "--query-gpu=index,compute_cap,uuid,name --format=csv,noheader" ] || exit 2\n'
        f"cat {tmp_path}/csv\n"
    )
    smi.chmod(0o755)
    (tmp_path / "csv").write_text(CSV)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(machine_module.importlib.metadata, "version", lambda name: {"tensorrt_llm": "1.2.0"}[name])
    assert read_machine({}) == Machine(gpus=(A100, H100), tensorrt_llm="1.2.0")
    assert read_machine({"CUDA_VISIBLE_DEVICES": "GPU-h"}) == Machine(gpus=(H100,), visible=1, tensorrt_llm="1.2.0")
    by_number = {"CUDA_VISIBLE_DEVICES": "1"}
    assert read_machine(by_number | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}).gpus == (H100,)
    assert read_machine(by_number | {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}).gpus == (A100, H100)
    assert read_machine(by_number).gpus == (A100, H100)
    smi.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert read_machine({}).gpus is None
    smi.unlink()
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine_module.importlib.metadata, "version", absent)
    assert read_machine({"CUDA_VISIBLE_DEVICES": "0"}) == Machine(gpus=None)


def test_nvidia_smis_answer_is_parsed():
    assert parse_gpus(CSV) == (A100, H100)
    assert parse_gpus("0, 12.0, GPU-b, NVIDIA RTX PRO 6000, Max-Q\n")[0].sm == 120
    assert parse_gpus("0, 12.0, GPU-b, NVIDIA RTX PRO 6000, Max-Q\n")[0].name == "NVIDIA RTX PRO 6000, Max-Q"
    assert parse_gpus("\n") == ()


@pytest.mark.parametrize(
    ("visible", "by_bus", "gpus"),
    [
        ("1", True, (H100,)),
        ("1,0", True, (H100, A100)),
        ("1", False, (A100, H100)),  # CUDA's 1 is the slower of two kinds, nvidia-smi's the second on the bus
        ("GPU-h", False, (H100,)),
        ("GPU-h,-1,GPU-a", False, (H100,)),
        ("", True, ()),
        ("-1", False, ()),
        ("MIG-x", True, (A100, H100)),
    ],
)
def test_visible_devices_narrow_the_gpus_where_they_are_certain(visible, by_bus, gpus):
    assert visible_gpus((A100, H100), visible, by_bus=by_bus) == gpus


def test_the_container_is_that_of_the_release():
    assert container("1.2.1") == "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
    assert container(None) == container("1.2.1")
    assert container("1.2.0rc6") == "nvcr.io/nvidia/tritonserver:<yy.mm>-trtllm-python-py3"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """(text) -> a trtllm-build of it, on a PATH that has nothing else but a python3."""
    (tmp_path / "python3").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))

    def program(text):
        (tmp_path / "trtllm-build").write_text(text)
        (tmp_path / "trtllm-build").chmod(0o755)

    return program


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("#!{python}\nimport sys\n", "{python}"),
        ("#!{python} -sE\nimport sys\n", "{python}"),
        ("#!/usr/bin/env python3\nimport sys\n", "{folder}/python3"),
        ("#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\nimport sys\n", "{python}"),
        ("#!/bin/sh\nexec somewhere/else\n", None),
        ("#!/no/such/python\n", None),
        ("#!\n", None),
        ("", None),
    ],
)
def test_the_librarys_python_is_the_one_that_its_program_names(tmp_path, program, text, found):
    names = {"python": sys.executable, "folder": tmp_path}
    program(text.format(**names))
    assert library_python() == (None if found is None else Path(found.format(**names)))


def test_without_its_program_there_is_no_library(program):
    assert library_python() is None
    assert library_version() is None


def test_the_version_is_asked_of_the_librarys_python(tmp_path, program, monkeypatch):
    package = tmp_path / "site" / "tensorrt_llm-1.1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: 1.1.0\n")
    program(f"#!{sys.executable}\n")
    assert library_version() is None
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    assert library_version() == "1.1.0"
