"""What a repository needs of the machine that serves it: the models' folders in, a Deployment out.

The config.pbtxt of a model on TensorRT-LLM's C++ backend says how many ranks run the model (parameter
`moeship_world_size`, tensor times pipeline parallelism). That of a model on the LLM API says how many GPUs its workers
take (`moeship_gpus`). engine.json says for which GPU and by which library the engine was built. This module only reads;
`machine_fit.py` compares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.errors import shown
from export.files.reading import whole_number
from export.files.typed_json import read_typed
from export.provider import OWN_KERNELS
from triton_repo.contracts.model_parameters import (
    ENGINE_FOLDER,
    ENGINE_KEY,
    GPUS_KEY,
    NUM_IDS_KEY,
    TRITON_BACKEND,
    WORLD_SIZE_KEY,
)  # fmt: skip
from triton_repo.errors import RepositoryError
from triton_repo.packaging.model_config import CONFIG_FILE, read_config
from trt_build.manifest import MANIFEST_FILE, TRTLLM_BACKEND, check_range, failed_verification, read_manifest
from trt_build.trtllm.engine import MAX_RANKS, GpuRecord, ParallelRecord

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig


@dataclass(frozen=True, kw_only=True)
class EngineOrigin:
    """For what an engine was built. A value is None if engine.json does not say it."""

    gpu: str | None  # name of the GPU
    sm: int | None  # 90 is compute capability 9.0
    library: str | None  # version of TensorRT-LLM
    world_size: int  # ranks that run the engine


@dataclass(frozen=True, kw_only=True)
class GpuModel:
    """A model that runs on TensorRT-LLM."""

    name: str
    backend: str
    world_size: int | None  # ranks, one for each GPU; None if the config does not say, as in another maker's model
    spawns: bool  # whether the model starts its ranks itself, as the LLM API does
    engine: EngineOrigin | None


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What a repository needs."""

    gpu_models: tuple[GpuModel, ...]  # the models on TensorRT-LLM
    steps: frozenset[str]  # models that are steps of an ensemble in the repository
    failed: Mapping[str, str] = field(default_factory=dict)  # model -> why its engine failed the last verification
    own_kernels: tuple[Path, ...] = ()  # the engines that moeship's CPU kernels compute
    beats: bool = True  # every request passes a model that moeship packaged, whose heartbeats say what it computes

    @property
    def ranked(self) -> tuple[GpuModel, ...]:
        """The models whose ranks the server's launcher starts."""
        return tuple(model for model in self.gpu_models if not model.spawns)


def read_deployment(repository: Path) -> Deployment:
    """Read config.pbtxt of every model, and engine.json of every model that has one.

    Raises RepositoryError. A damaged engine.json of an engine for ONNX Runtime is passed over: its model reports the
    damage when it is loaded, and the other models are served.
    """
    configs = {
        path.parent: read_config(path)
        for path in sorted(repository.glob(f"*/{CONFIG_FILE}"))
        if not path.parent.name.startswith(".")
    }
    return Deployment(
        gpu_models=tuple(model for folder, config in configs.items() for model in _gpu_models(folder, config)),
        steps=frozenset(step.model_name for config in configs.values() for step in config.ensemble_scheduling.step),
        failed=dict(pair for folder in configs for pair in _failed(folder)),
        own_kernels=tuple(path for folder, config in configs.items() for path in _own_kernels(folder, config)),
        beats=all(map(_beats, configs.values())),
    )


def runs_moeship(config: ModelConfig) -> bool:
    """Whether the model's program is one that moeship packaged. Such a program imports the installed moeship."""
    return any(key in config.parameters for key in (ENGINE_KEY, NUM_IDS_KEY, GPUS_KEY))


def _beats(config: ModelConfig) -> bool:
    """Whether the requests of a model pass a program of ours. Those of an ensemble, and of TensorRT-LLM's C++ backend
    within one, pass the steps around it."""
    return config.platform == "ensemble" or config.backend == TRITON_BACKEND or runs_moeship(config)


def _gpu_models(folder: Path, config: ModelConfig) -> Iterator[GpuModel]:
    """Yields the model if it runs on TensorRT-LLM."""
    texts = {key: value.string_value for key, value in config.parameters.items()}
    spawns = GPUS_KEY in texts
    if config.backend == TRITON_BACKEND or spawns or WORLD_SIZE_KEY in texts:
        key = GPUS_KEY if spawns else WORLD_SIZE_KEY
        world_size = _number(folder, key, texts[key]) if key in texts else None
        engine = _engine_origin(folder)
        if engine and world_size not in (None, engine.world_size):
            raise RepositoryError(
                f"reading {folder / CONFIG_FILE}: its parameter {key} is {world_size}, and its engine was built for "
                f"{engine.world_size} ranks; package the engine again"
            )
        yield GpuModel(name=folder.name, backend=config.backend, world_size=world_size, spawns=spawns, engine=engine)


def _own_kernels(folder: Path, config: ModelConfig) -> Iterator[Path]:
    """Yields the folder of the model's engine if moeship's CPU kernels compute it."""
    path = _newest_manifest(folder)
    if ENGINE_KEY not in config.parameters or path is None:
        return
    with contextlib.suppress(RepositoryError):
        if read_manifest(path.parent, f"reading {path}", RepositoryError).get("kernels") == OWN_KERNELS:
            yield path.parent


def _failed(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields the model and what is wrong with its engine if the engine's last verification failed."""
    path = _newest_manifest(folder)
    if path is None:
        return
    with contextlib.suppress(RepositoryError):
        failure = failed_verification(
            read_manifest(path.parent, f"reading {path}", RepositoryError).get("verification")
        )
        if failure is not None:
            yield folder.name, failure


def _number(folder: Path, key: str, text: str) -> int:
    number = whole_number(text, 1, MAX_RANKS)
    if number is None:
        raise RepositoryError(
            f"reading {folder / CONFIG_FILE}: its parameter {key} is {shown(text)}, expected a number of 1 or more; "
            "package the model again"
        )
    return number


def _newest_manifest(folder: Path) -> Path | None:
    """engine.json of the model's newest version; None if the model has no engine in its folder."""
    found = {
        int(version.name): path
        for version in folder.iterdir()
        if version.name.isdecimal() and (path := version / ENGINE_FOLDER / MANIFEST_FILE).is_file()
    }
    return found[max(found)] if found else None


def _engine_origin(folder: Path) -> EngineOrigin | None:
    """What engine.json of the model's newest version says; None without an engine, or for an engine of ONNX Runtime."""
    path = _newest_manifest(folder)
    if path is None:
        return None
    manifest = read_manifest(path.parent, f"reading {path}", RepositoryError)
    if manifest.get("backend") != TRTLLM_BACKEND:
        return None
    try:
        return _origin(manifest)
    except ValueError as error:
        raise RepositoryError(
            f"reading {path}: it is not the manifest of a TensorRT-LLM engine ({error}); package the engine again"
        ) from error


def _origin(manifest: Mapping[str, Any]) -> EngineOrigin:
    """The facts in a manifest. Raises ValueError."""
    gpu = read_typed(GpuRecord, manifest.get("gpu"), "gpu")
    parallel = read_typed(ParallelRecord, manifest.get("parallel"), "parallel")
    check_range("ranks", parallel.world_size, 1, MAX_RANKS)
    libraries = manifest.get("libraries")
    if not isinstance(libraries, dict):
        raise ValueError(f"libraries is {shown(libraries, 60)}, expected an object")
    library = libraries.get("tensorrt_llm")
    if not isinstance(library, str | None):
        raise ValueError(f"libraries.tensorrt_llm is {shown(library, 60)}, expected a version")
    return EngineOrigin(gpu=gpu.name, sm=gpu.sm, library=library, world_size=parallel.world_size)
