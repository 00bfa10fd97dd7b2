"""Checks a model repository before a server is started on it, and lists what would certainly fail.

Weights are not read here. A model checks its engine's digests when it is loaded; if they are wrong, the other models
are served without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from export.checkpoint.file_table import TOKENIZER_FILE
from export.errors import listing
from export.files.recognised import recognised
from triton_repo.contracts.model_parameters import NUM_IDS_KEY, TOKENIZER_KEY, TRITON_BACKEND, WORLD_SIZE_KEY
from triton_repo.contracts.trtllm_parameters import ENGINE_PATH_KEY
from triton_repo.errors import RepositoryError
from triton_repo.packaging.model_config import CONFIG_FILE, packaged_parameters, read_config
from triton_repo.processes.workspace import is_plain
from triton_repo.serving.deployment import runs_moeship
from triton_repo.serving.program_check import program_problems
from trt_build.manifest import MANIFEST_FILE

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig


def check_repository(repository: Path) -> tuple[str, ...]:
    """The names of the repository's models. Raises RepositoryError that lists every problem of every model."""
    taken = recognised(repository)
    if not repository.is_dir():
        if taken is not None:
            raise RepositoryError(f"serving {repository}: {taken}")
        found = "it is a file, expected a folder" if repository.exists() else "no such folder"
        raise RepositoryError(f"serving {repository}: {found}; make one with: moeship package")
    folders = sorted(path for path in repository.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not any((folder / CONFIG_FILE).is_file() for folder in folders):
        if taken is not None and not (repository / CONFIG_FILE).is_file():
            raise RepositoryError(f"serving {repository}: {taken}")
        raise RepositoryError(
            f"serving {repository}: found no model, expected folders with a {CONFIG_FILE}; pass the repository itself, "
            "not the folder above it or a model in it, or make one with: moeship package"
        )
    problems = [problem for folder in folders for problem in _model_problems(folder)]
    names = {folder.name for folder in folders}
    problems += [problem for folder in folders for problem in _step_problems(folder, names)]
    if problems:
        raise RepositoryError(f"serving {repository}: not every model can be served:{listing(problems)}")
    return tuple(folder.name for folder in folders)


def _model_problems(folder: Path) -> list[str]:
    if not (folder / CONFIG_FILE).is_file():
        return [f"{folder.name}: no {CONFIG_FILE}; remove the folder or package the engine again"]
    try:
        config = read_config(folder / CONFIG_FILE)
        parameters = packaged_parameters(config, folder.name)
    except RepositoryError as error:
        return [f"{folder.name}: {error}"]
    problems = []
    if config.name not in ("", folder.name):
        problems.append(f"{folder.name}: its {CONFIG_FILE} has the name {config.name}; give the folder that name")
    if not is_plain(Path(folder.name)):
        problems.append(
            f"{folder.name!r}: Triton's Python backend cannot take this name, only ASCII letters, digits and "
            "_./+,:@%=-; rename the folder"
        )
    versions = [path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()]
    if not versions:
        problems.append(f"{folder.name}: no version folder such as {folder.name}/1; package the engine again")
    if runs_moeship(config):
        problems += [problem for version in versions for problem in program_problems(folder.name, version)]
    # A model of another maker has no parameter that names an engine.
    engines = [version / parameters.engine for version in versions] if parameters is not None else []
    problems += [
        f"{folder.name}: no engine at {engine} ({MANIFEST_FILE} is missing); package it again"
        for engine in engines
        if not (engine / MANIFEST_FILE).is_file()
    ]
    tokenizers = [version / config.parameters[TOKENIZER_KEY].string_value for version in versions if _is_text(config)]
    problems += [
        f"{folder.name}: no tokenizer at {tokenizer} ({TOKENIZER_FILE} is missing); package it again"
        for tokenizer in tokenizers
        if not (tokenizer / TOKENIZER_FILE).is_file()
    ]
    return [*problems, *_path_problems(folder.name, config)]


def _is_text(config: ModelConfig) -> bool:
    """Whether it is a model of ours that turns text into tokens or tokens into text."""
    return TOKENIZER_KEY in config.parameters and NUM_IDS_KEY in config.parameters


def _path_problems(name: str, config: ModelConfig) -> list[str]:
    """What is wrong with the path of an engine of ours on TensorRT-LLM's C++ backend."""
    if config.backend != TRITON_BACKEND or WORLD_SIZE_KEY not in config.parameters:
        return []
    engine = Path(config.parameters[ENGINE_PATH_KEY].string_value)
    if (engine / MANIFEST_FILE).is_file():
        return []
    return [
        f"{name}: no engine at {engine}, which its {CONFIG_FILE} names; package it again where it is served, or "
        "with --served-from"
    ]


def _step_problems(folder: Path, names: set[str]) -> list[str]:
    """The steps of an ensemble that are not in the repository."""
    try:
        steps = read_config(folder / CONFIG_FILE).ensemble_scheduling.step
    except RepositoryError:  # _model_problems reports it
        return []
    absent = dict.fromkeys(step.model_name for step in steps if step.model_name not in names)
    return [f"{folder.name}: its step {name} is not in the repository; package the engine again" for name in absent]
