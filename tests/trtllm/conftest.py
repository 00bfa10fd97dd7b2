"""The stand-in of TensorRT-LLM for the tests that ask for it, and the checkpoints that they share."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from checkpoints import write_phixtral_checkpoint
from trtllm.building import build
from trtllm.library import NETWORK, ROOT, install_programs, standin
from trtllm.ranks import understood

from export.trtllm.checkpoint import CheckpointOptions, write_checkpoint

# The packed layouts take these on up to four ranks (H a multiple of 64 for each), or two slices of F; else unequal.
PACKABLE = {
    "hidden_size": 256, "num_heads": 4, "ffn_size": 384, "num_layers": 2, "rotary_dim": 24, "max_positions": 96,
    "vocab_size": 277, "dtype": "float16",
}  # fmt: skip
SMALL = {
    "hidden_size": 128, "num_heads": 4, "ffn_size": 256, "num_layers": 2, "rotary_dim": 16, "dtype": "float16",
}  # fmt: skip


@pytest.fixture(scope="module")
def tensorrt_llm() -> Iterator[ModuleType]:
    """The stand-in, for one module of tests."""
    with standin() as module:
        yield module


@pytest.fixture(scope="module")
def network(tensorrt_llm) -> ModuleType:
    """trt_build/trtllm/phixtral.py, imported unchanged into the stand-in, which registers its architecture."""
    return importlib.import_module(NETWORK)


@pytest.fixture
def trtllm_build(monkeypatch, tmp_path, torch_python) -> Path:
    """The stand-in's trtllm-build, as pip would have installed it, with an mpirun and an nvidia-smi
    beside it: on the PATH of programs that a test starts, which find its tensorrt_llm too."""
    return install_programs(tmp_path / "standin-bin", monkeypatch, torch_python)


@pytest.fixture
def no_library(monkeypatch, tmp_path_factory) -> None:
    """Neither trtllm-build nor nvidia-smi is on the path of programs, whatever the machine has."""
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("no-programs")))


@pytest.fixture(scope="session")
def trained_mixtral() -> Path:
    """The committed example: 4 trained experts, H 128, 4 heads of 32 over 2 key/value heads."""
    return ROOT / "examples/tiny-mixtral/checkpoint"


@pytest.fixture(scope="session")
def packable_phixtral(tmp_path_factory) -> Path:
    """A random phixtral of 4 experts."""
    folder = tmp_path_factory.mktemp("packable") / "phixtral"
    return write_phixtral_checkpoint(folder, seed=11, num_experts=4, experts_per_token=2, **PACKABLE)


@pytest.fixture(scope="session")
def small_phixtral(tmp_path_factory) -> Path:
    """A random phixtral of 4 experts, which two ranks take packed."""
    folder = tmp_path_factory.mktemp("small") / "small-phixtral"
    return write_phixtral_checkpoint(folder, seed=4, num_experts=4, experts_per_token=2, **SMALL)


@pytest.fixture(scope="session")
def built_engine(tmp_path_factory, small_phixtral, torch_python) -> Path:
    """A TensorRT-LLM engine of it by the stand-in, int4, compared with nothing; its checkpoint lies beside it."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        install_programs(folder / "bin", patch, torch_python)
        outcome = build(small_phixtral, folder / "engine", until="engine")
    assert outcome.engine is not None
    return outcome.engine.folder


@pytest.fixture
def copied_engine(tmp_path, built_engine) -> Path:
    """A copy of that engine and of its checkpoint, which a test may change."""
    shutil.copytree(built_engine.with_name("engine.checkpoint"), tmp_path / "engine.checkpoint")
    return Path(shutil.copytree(built_engine, tmp_path / "engine"))


@pytest.fixture(scope="module")
def rank_files(tmp_path_factory) -> Iterator[Callable[..., Path]]:
    """(checkpoint folder, CheckpointOptions' fields) -> the rank files that our writer makes of it, made once a module.

    They are removed with the module: all that the tests ask for together takes a gigabyte.
    """
    parent, made = tmp_path_factory.mktemp("rank-files"), {}

    def rank_files(source: Path, **options: Any) -> Path:
        key = (source, *sorted(options.items()))
        if key not in made:
            made[key] = parent / str(len(made))
            write_checkpoint(understood(source), CheckpointOptions(**options), made[key])
        return made[key]

    yield rank_files
    shutil.rmtree(parent)
