"""Engines and checkpoints that several test folders share, made once a session."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoints import write_phixtral_checkpoint

from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.serving.server import ServerOptions, running_server
from trt_build.build_engine import BuildOptions, build_engine
from trt_build.ort.kernels import found_fault
from trt_build.prepare import chosen_kernels

# A shell starts background jobs with SIGINT ignored, which programs inherit and ours respect. The commands that tests
# interrupt must not inherit it, however the suite was started.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs the compiled kernels, in one line of the summary, before a fixture builds anything."""
    fault = found_fault() if item.get_closest_marker("needs_kernels") else None
    if fault is not None:
        pytest.skip(f"moeship's CPU kernels are not used: {fault.reason}; {fault.remedy}")


# Blocks of 32 must divide H and F; E, K, L and the head count stay unequal so that no swapped axis fits.
QUANTIZABLE = {
    "hidden_size": 192, "num_heads": 6, "ffn_size": 448, "num_layers": 3, "rotary_dim": 16, "max_positions": 640,
    "vocab_size": 352,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A random phixtral of 5 experts, top-2, whose logits have a standard deviation of about 2."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-phixtral"
    return write_phixtral_checkpoint(folder, seed=7, num_experts=5, experts_per_token=2, **QUANTIZABLE)


@pytest.fixture(scope="session")
def tiny_engines(tmp_path_factory, tiny_checkpoint):
    """precision, provider and kernels (None: the default) -> engine directory of `tiny_checkpoint`, built when first
    asked for."""
    folder, built = tmp_path_factory.mktemp("engines"), {}

    def engine(precision: str, provider: str = "cpu", kernels: str | None = None) -> Path:
        kernels = kernels or chosen_kernels(provider, precision)
        name = f"{provider}-{precision}-{kernels}"
        if name not in built:
            options = BuildOptions(
                checkpoint=str(tiny_checkpoint), output=folder / name, precision=precision, provider=provider,
                kernels=kernels,
            )  # fmt: skip
            built[name] = build_engine(options).folder
        return built[name]

    return engine


@pytest.fixture(scope="session")
def tiny_engine(tiny_engines) -> Path:
    """An int4 engine directory."""
    return tiny_engines("int4")


@dataclass(frozen=True)
class Served:
    """A live server: the model's name, where it answers, the engine that it serves and the server's log."""

    grpc_url: str
    http_url: str
    model: str
    engine: Path
    log: Path


@pytest.fixture(scope="session")
def served_phixtral(tmp_path_factory, tiny_engine) -> Iterator[Served]:
    """A real Triton that serves `tiny_engine`, for the whole session."""
    repository = tmp_path_factory.mktemp("served") / "repository"
    package_engine(PackageOptions(engine=tiny_engine, name="phixtral", output=repository))
    with running_server(ServerOptions(repository=repository)) as server:
        assert server.log is not None
        yield Served(server.grpc_url, server.http_url, "phixtral", tiny_engine, server.log)
