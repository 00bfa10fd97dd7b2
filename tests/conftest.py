"""Engines and checkpoints that several test folders share, made once a run, and what holds for every test."""

from __future__ import annotations

import os

from export.blas import choose_blas_kernels

# Before anything imports numpy or torch, which read it when they load: both compute in one thread, here and in every
# process that a test starts. Of matrices this small several threads mostly wait for each other, and they wait by
# spinning.
os.environ["OMP_NUM_THREADS"] = "1"
choose_blas_kernels()

import ctypes
import fcntl
import gc
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoints import write_phixtral_checkpoint
from live_requests import slow_down
from scheduling import Scheduling, num_workers, waits
from trtllm.warm_python import warm_python

from export.merge.config import read_merge_config
from export.merge.merge import merge
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.serving.server import ServerOptions, running_server
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.kernels import found_fault
from trt_build.ort.planning.prepare import chosen_kernels

# A shell starts background jobs with SIGINT ignored, which programs inherit and ours respect. The commands that tests
# interrupt must not inherit it, however the suite was started.
signal.signal(signal.SIGINT, signal.default_int_handler)

EXAMPLES = Path(__file__).parent.parent / "examples"


# Files that take the longest, which pytest-xdist hands out first: one of them at the end would hold the whole run.
LONGEST = (
    "tests/test_example.py", "tests/cli/", "tests/trt_build/", "tests/trtllm/", "tests/export/test_config_keys.py",
    "tests/clients/gateway/",
)  # fmt: skip


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without searches for cycles, which take a third of the time, and never search what was collected: it is
    770,000 objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which workers begin: one with the first file that waits, the others with the longest that compute.
    The scheduler chooses further files that wait from the end."""
    files = [item.nodeid.split("::")[0] for item in items]
    first = next(filter(waits, files), None)
    order = {file: (file != first, waits(file), not file.startswith(LONGEST)) for file in files}
    items.sort(key=lambda item: order[item.nodeid.split("::")[0]])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """The number of workers that --numprocesses=auto means, where the environment names none."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else num_workers()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """The scheduler of --dist=loadfile."""
    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs the compiled kernels, in one line of the summary, before a fixture builds anything."""
    fault = found_fault() if item.get_closest_marker("needs_kernels") else None
    if fault is not None:
        pytest.skip(f"moeship's CPU kernels are not used: {fault.reason}; {fault.remedy}")


def pytest_unconfigure() -> None:
    """Keep the capsule of sentencepiece's SWIG runtime. transformers' tokenizers load it, and with torch loaded the
    capsule's destructor crashes when the interpreter ends: the exit status would be that of the crash."""
    runtimes = [module for name, module in sys.modules.items() if name.startswith("swig_runtime_data")]
    for capsule in (value for module in runtimes for value in vars(module).values()):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(capsule))


@pytest.fixture(scope="session", autouse=True)
def one_thread_a_session() -> Iterator[None]:
    """A session of ONNX Runtime computes in one thread here, where its options do not ask for more. Of models this
    small the threads of a pool mostly spin while they wait for each other."""
    import onnxruntime

    class OneThread(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", OneThread)
        yield


# Blocks of 32 must divide H and F; E, K, L and the head count stay unequal so that no swapped axis fits.
QUANTIZABLE = {
    "hidden_size": 192, "num_heads": 6, "ffn_size": 448, "num_layers": 3, "rotary_dim": 16, "max_positions": 640,
    "vocab_size": 352,
}  # fmt: skip


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """(name, make) -> a folder of this name that `make` made, once for all of pytest-xdist's workers. Nobody may change
    it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of the whole run
    parent = folder / "made-once"
    parent.mkdir(exist_ok=True)

    def made_once(name: str, make: Callable[[Path], object]) -> Path:
        made, whole = parent / name, parent / f"{name}.whole"
        with (parent / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole.exists():
                make(made)
                whole.touch()
        return made

    return made_once


@pytest.fixture(scope="session")
def torch_python(tmp_path_factory) -> Iterator[Path]:
    """A Python that starts with torch loaded."""
    with warm_python(tmp_path_factory.mktemp("torch") / "bin", ["torch"]) as program:
        yield program


@pytest.fixture(scope="session")
def tiny_checkpoint(made_once) -> Path:
    """A random phixtral of 5 experts, top-2, whose logits have a standard deviation of about 2."""
    return made_once(
        "tiny-phixtral",
        lambda folder: write_phixtral_checkpoint(folder, seed=7, num_experts=5, experts_per_token=2, **QUANTIZABLE),
    )


@pytest.fixture(scope="session")
def trained_phixtral(made_once) -> Path:
    """The merged example: 4 trained experts, H 192, 6 heads of 32."""
    return made_once(
        "trained-phixtral", lambda folder: merge(read_merge_config(EXAMPLES / "tiny-phixtral/merge.yml"), folder)
    )


@pytest.fixture(scope="session")
def tiny_engines(made_once, tiny_checkpoint):
    """precision, provider and kernels (None: the default) -> engine directory of `tiny_checkpoint`, built when first
    asked for."""

    def engine(precision: str, provider: str = "cpu", kernels: str | None = None) -> Path:
        kernels = kernels or chosen_kernels(provider, precision)
        return made_once(
            f"{provider}-{precision}-{kernels}",
            lambda folder: build_engine(
                BuildOptions(
                    checkpoint=str(tiny_checkpoint), output=folder, precision=precision, provider=provider,
                    kernels=kernels,
                )
            ),
        )  # fmt: skip

    return engine


@pytest.fixture(scope="session")
def tiny_engine(tiny_engines) -> Path:
    """An int4 engine directory."""
    return tiny_engines("int4")


@dataclass(frozen=True)
class Served:
    """A live server: the model's name, where it answers, the engine that it serves and the server's log. `slow` is the
    same engine whose steps take 10 ms more, for streams that must still run when something happens to them."""

    grpc_url: str
    http_url: str
    model: str
    slow: str
    engine: Path
    log: Path


@pytest.fixture(scope="session")
def served_phixtral(tmp_path_factory, tiny_engine) -> Iterator[Served]:
    """A real Triton that serves `tiny_engine`, for the whole session."""
    repository = tmp_path_factory.mktemp("served") / "repository"
    for name in ("phixtral", "slow"):
        package_engine(
            PackageOptions(engine=tiny_engine, name=name, output=repository, onnxruntime=ModelParameters(threads=1))
        )
    slow_down(repository / "slow")
    with running_server(ServerOptions(repository=repository)) as server:
        assert server.log is not None
        yield Served(server.grpc_url, server.http_url, "phixtral", "slow", tiny_engine, server.log)
