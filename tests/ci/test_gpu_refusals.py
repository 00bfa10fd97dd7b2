"""What a machine must have before anything is spent on it: each lack is refused in one sentence, with status 2."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from export.trtllm.precision import TRTLLM_PRECISIONS
from trt_build.machine.readings import Gpu, Machine

SCRIPTS = Path(__file__).parents[2] / "ci" / "gpu"
GIB = 1 << 30


@pytest.fixture
def machine_of(monkeypatch):
    """The module gpu_machine."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu_machine

    return gpu_machine


@pytest.fixture
def options_of(monkeypatch):
    """The module trial_options."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import trial_options

    return trial_options


def without(path: str, folder: Path) -> str:
    return os.pathsep.join(entry for entry in path.split(os.pathsep) if entry != str(folder))


@pytest.mark.parametrize(
    ("words", "variables", "text"),
    [
        ([], {"STANDIN_GPUS": "0"}, "no GPU is visible to nvidia-smi: start the container with --gpus all"),
        ([], {"CUDA_VISIBLE_DEVICES": ""}, "no GPU is visible to nvidia-smi"),
        ([], {"CUDA_STATUS": "803"}, "CUDA does not start (cuInit ended with status 803)"),
        ([], {"LD_LIBRARY_PATH": ""}, "CUDA does not start (libcuda.so.1: cannot open shared object file"),
        (["--tp-size", 2], {}, "--tp-size is 2 and 1 GPU(s) can be used: Stand-in SM80"),
        (
            ["--full"], {"STANDIN_FREE": "17000"},
            "Stand-in SM80 (GPU 0) has 17.8 GB of its 85.5 GB free, about 19.6 GB are needed: free it, divide",
        ),
        (["--precisions", "int3,fp16"], {}, "--precisions has 'int3', there are fp32, fp16, bf16, int8, int4"),
        (["--rounds", 0], {}, "--rounds is 0, expected 1 or more"),
        (["--concurrency", "4,0"], {}, "--concurrency is empty or has a number below 1"),
        (["--precisions", ","], {}, "--precisions is empty"),
        (["--checkpoint", "/usr"], {}, "--checkpoint is /usr, where no config.json is"),
    ],
)  # fmt: skip
def test_it_is_refused_in_one_sentence_before_anything_is_made(container, tmp_path, words, variables, text):
    done = container.run(*words, "--output", tmp_path / "out", **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cannot run here: ")
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_another_container_is_refused_with_the_one_to_take(container, tmp_path):
    wanted = "run it in nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
    path = container.environment["PATH"]
    server = Path(path.split(os.pathsep)[0])
    output = ["--output", tmp_path / "out"]
    for variables, text in (
        ({"PATH": without(path, server)}, "this container has no tritonserver: "),
        ({"PYTHONPATH": ""}, "this container has no trtllm-build and its package tensorrt_llm: "),
    ):
        done = container.run(*output, **variables)
        assert (done.returncode, text + wanted in done.stderr) == (2, True), done.stderr
    later = tmp_path / "later" / "tensorrt_llm-1.3.0.dist-info"
    later.mkdir(parents=True)
    (later / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: 1.3.0\n")
    done = container.run(*output, PYTHONPATH=f"{later.parent}:{container.environment['PYTHONPATH']}")
    assert f"this container has TensorRT-LLM 1.3.0, and engines are built with 1.0 to 1.2: {wanted}" in done.stderr
    backend = container.backends / "tensorrtllm"
    backend.rename(container.backends / "elsewhere")
    try:
        done = container.run(*output)
    finally:
        (container.backends / "elsewhere").rename(backend)
    assert f"this container has no tensorrtllm in {container.backends}: {wanted}" in done.stderr


def readings(module, **changes):
    """A whole machine of two GPUs, with changes."""
    gpus = tuple(Gpu(index=index, name="NVIDIA H100 80GB HBM3", sm=90, uuid=f"GPU-{index}") for index in range(2))
    memory = {gpu.uuid: module.GpuMemory(total=80 * GIB, free=79 * GIB, driver="590.44.01") for gpu in gpus}
    whole = module.Readings(
        machine=Machine(gpus=gpus, tensorrt_llm="1.2.1"), memory=memory, cuda="13.1", cuda_problem="",
        packages={"tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48"}, tritonserver=Path("/opt/tritonserver"),
        backends=None, mpirun=Path("/usr/bin/mpirun"), image={"NVIDIA_TRITON_SERVER_VERSION": "26.07"},
    )  # fmt: skip
    return replace(whole, **changes)


def needs(module, output, **changes):
    return replace(module.Needs(output=output, tp_size=2, disk=0, memory=0, gpu=4 * GIB), **changes)


def test_a_whole_machine_is_not_refused_and_what_it_lacks_is(machine_of, tmp_path):
    def problems(found=None, **asked):
        return machine_of.problems(found or readings(machine_of), needs(machine_of, tmp_path / "new" / "out", **asked))

    assert problems() == []
    [problem] = problems(disk=1 << 60)
    assert problem.startswith(f"{tmp_path} has ")
    assert "about 1152921504.6 GB are needed: make room, or name another --output" in problem
    [problem] = problems(memory=1 << 60)
    assert "of main memory are available, about 1152921504.6 GB are needed" in problem
    assert len(problems(gpu=80 * GIB)) == 2
    [problem] = problems(readings(machine_of, mpirun=None))
    assert problem.startswith("this container has no mpirun: run it in nvcr.io/")
    assert problems(readings(machine_of, mpirun=None), tp_size=1) == []
    hidden = replace(readings(machine_of).machine, visible=1)
    assert "--tp-size is 2 and 1 GPU(s) can be used" in problems(readings(machine_of, machine=hidden))[0]


def test_memory_is_read_as_nvidia_smi_gives_it(machine_of):
    csv = "GPU-a, 81559, 81000, 590.44.01\nGPU-b, 24576, 512, 590.44.01\n"
    found = machine_of.parse_memory(csv)
    assert found["GPU-b"] == machine_of.GpuMemory(total=24576 * 1024**2, free=512 * 1024**2, driver="590.44.01")
    assert list(found) == ["GPU-a", "GPU-b"]
    with pytest.raises(ValueError, match="not enough values"):
        machine_of.parse_memory("No devices were found")


def test_the_precisions_are_those_that_checkpoints_are_written_in(options_of):
    assert set(options_of.SHARES) == set(TRTLLM_PRECISIONS)


def test_what_is_needed_is_near_what_the_published_size_takes(options_of, tmp_path):
    import synthetic_checkpoint

    tensors = synthetic_checkpoint.planned_tensors(synthetic_checkpoint.PHIXTRAL, "F16")
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    assert num_bytes == pytest.approx(options_of.FULL_BYTES, rel=0.01)
    full = options_of.Options(output=tmp_path, full=True)
    before = full.needs().disk
    # The checkpoint, and twice fp16 and int4: 15.6 GB and 4.4 GB. float32 of 7.8 billion weights is 31.2 GB.
    assert full.needs().disk == pytest.approx(15.6e9 + 2 * (15.6e9 + 4.4e9) + options_of.BESIDE_DISK, rel=0.05)
    assert full.needs().memory > 31.2e9 + 4e9
    assert options_of.Options(output=tmp_path, full=True, tp_size=4).needs().gpu < 15.6e9 / 4 + 5e9
    (tmp_path / "there").write_bytes(bytes(5_000_000))
    (tmp_path / "linked").hardlink_to(tmp_path / "there")
    assert full.needs().disk == before - 5_000_000


def test_the_models_commands_run_what_is_there(options_of, tmp_path):
    small, full = options_of.Options(output=tmp_path, full=True).models
    assert small.command[1:4] == ("-m", "cli.main", "merge")
    assert (Path(small.command[4]).name, Path(small.command[4]).is_file()) == ("merge.yml", True)
    assert Path(full.command[1]).is_file()
    assert (small.command[-1], full.command[-1]) == (str(small.folder), str(full.folder))
