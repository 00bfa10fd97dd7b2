"""What the models of a repository ask of the machine that serves them: their folders in, a Deployment out.

A model of TensorRT-LLM says in its config.pbtxt's parameters how many ranks run it (`moeship_world_size`, tensor times
pipeline parallelism), one of the LLM API how many GPUs its workers take (`moeship_gpus`). Its engine's engine.json says
for which GPU and by which library the engine was built. Nothing is judged here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.errors import shown
from export.reading import whole_number
from export.typed_json import read_typed
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
from trt_build.manifest import MANIFEST_FILE, check_range, read_manifest
from trt_build.trtllm.engine import MAX_RANKS, TRTLLM_BACKEND, GpuRecord, ParallelRecord

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig


@dataclass(frozen=True, kw_only=True)
class EngineOrigin:
    """For what an engine was built: the GPU's name and SM (90 is compute capability 9.0), the version of TensorRT-LLM,
    each None where engine.json does not say, and the ranks that run it.
    """

    gpu: str | None
    sm: int | None
    library: str | None
    world_size: int


@dataclass(frozen=True, kw_only=True)
class GpuModel:
    """A model that runs on TensorRT-LLM. `world_size`: ranks, one a GPU; None where its config does not say, as another
    maker's. `spawns`: it starts its ranks itself, as the LLM API does.
    """

    name: str
    backend: str
    world_size: int | None
    spawns: bool
    engine: EngineOrigin | None


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """The models on TensorRT-LLM, and the models that are only steps of an ensemble in the same repository. `beats`:
    every request is a matter of a model that moeship packaged, which says in its heartbeat what it computes.
    """

    gpu_models: tuple[GpuModel, ...]
    steps: frozenset[str]
    beats: bool = True

    @property
    def ranked(self) -> tuple[GpuModel, ...]:
        """The models whose ranks the server's launcher starts."""
        return tuple(model for model in self.gpu_models if not model.spawns)


def read_deployment(repository: Path) -> Deployment:
    """Read every model's config.pbtxt and, of those on TensorRT-LLM, engine.json. Raises RepositoryError."""
    configs = {
        path.parent: read_config(path)
        for path in sorted(repository.glob(f"*/{CONFIG_FILE}"))
        if not path.parent.name.startswith(".")
    }
    return Deployment(
        gpu_models=tuple(model for folder, config in configs.items() for model in _gpu_models(folder, config)),
        steps=frozenset(step.model_name for config in configs.values() for step in config.ensemble_scheduling.step),
        beats=all(map(_beats, configs.values())),
    )


def runs_moeship(config: ModelConfig) -> bool:
    """Whether the model's program is one that moeship packaged, which imports the installed moeship."""
    return any(key in config.parameters for key in (ENGINE_KEY, NUM_IDS_KEY, GPUS_KEY))


def _beats(config: ModelConfig) -> bool:
    """Whether it is a model of ours in Python, or an ensemble or TensorRT-LLM's backend, whose steps around it are."""
    return config.platform == "ensemble" or config.backend == TRITON_BACKEND or runs_moeship(config)


def _gpu_models(folder: Path, config: ModelConfig) -> Iterator[GpuModel]:
    """The model, if it runs on TensorRT-LLM."""
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


def _number(folder: Path, key: str, text: str) -> int:
    number = whole_number(text, 1, MAX_RANKS)
    if number is None:
        raise RepositoryError(
            f"reading {folder / CONFIG_FILE}: its parameter {key} is {shown(text)}, expected a number of 1 or more; "
            "package the model again"
        )
    return number


def _engine_origin(folder: Path) -> EngineOrigin | None:
    """What the engine of a model's only or newest version says; None without one, and for another backend's."""
    found = {
        int(version.name): path
        for version in folder.iterdir()
        if version.name.isdecimal() and (path := version / ENGINE_FOLDER / MANIFEST_FILE).is_file()
    }
    if not found:
        return None
    path = found[max(found)]
    manifest = read_manifest(path.parent, f"reading {path}", RepositoryError)
    if manifest.get("backend") != TRTLLM_BACKEND:
        return None
    try:
        return _origin(manifest)
    except ValueError as error:
        raise RepositoryError(
            f"reading {path}: no manifest of a TensorRT-LLM engine ({error}); package the engine again"
        ) from error


def _origin(manifest: Mapping[str, Any]) -> EngineOrigin:
    """Raises ValueError."""
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
