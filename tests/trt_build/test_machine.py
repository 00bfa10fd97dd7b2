"""What is read of a machine: nvidia-smi's answer, what CUDA may use of it, TensorRT-LLM's version and its container."""

from __future__ import annotations

import importlib.metadata

import pytest

from trt_build import machine as machine_module
from trt_build.machine import Gpu, Machine, container, parse_gpus, read_machine, visible_gpus

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
