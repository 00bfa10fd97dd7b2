"""Engine directory in, model of a Triton model repository out.

    package_engine(PackageOptions(engine=Path("engine"), name="phixtral", output=Path("repository")))

    repository/phixtral/config.pbtxt      from the engine's manifest and the wire contract
    repository/phixtral/1/model.py        a copy of triton_repo/models/model.py
    repository/phixtral/1/engine/         hard links to the engine's files, or copies on another file system

A repository that does not exist is made; to one that exists the model is added, and a model of that name is never
overwritten. What is new appears whole, by rename, or not at all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from export.errors import OutputError, listing
from export.output import staged_directory
from triton_repo.errors import RepositoryError
from triton_repo.model_config import CONFIG_FILE, ServedModel, config_text, model_config
from triton_repo.runtime.parameters import MAX_THREADS, ModelParameters
from triton_repo.seal import write_seal
from trt_build.engine import MANIFEST_FILE, Engine, open_engine

logger = logging.getLogger(__name__)

VERSION = "1"
MODEL_FILE = "model.py"
MAX_NAME_CHARACTERS = 128
MAX_INSTANCES = 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class PackageOptions:
    """`instances` requests run at the same time (on each GPU, where the engine is for GPUs), each with the engine's
    memory again; `threads` of each of them, None to share the machine's cores out. `copy` makes the repository
    independent of the engine directory, where a hard link would share its disk space.
    """

    engine: Path
    name: str
    output: Path
    instances: int = 1
    threads: int | None = None
    copy: bool = False


@dataclass(frozen=True, kw_only=True)
class Package:
    """What was written: the model's folder, and how many bytes of the engine had to be copied."""

    folder: Path
    name: str
    engine_bytes: int
    copied_bytes: int


def package_engine(options: PackageOptions) -> Package:
    """Write the model. Raises RepositoryError for unusable options, EngineError for a damaged engine, OutputError."""
    _check(options)
    _check_repository(options.output)
    engine = open_engine(options.engine)
    folder = options.output / options.name
    if options.output.is_dir():
        with staged_directory(folder, f"the model {options.name}") as staging:
            copied = _write_model(staging, engine, options)
    else:
        with staged_directory(options.output, "the model repository") as staging:
            (staging / options.name).mkdir()
            copied = _write_model(staging / options.name, engine, options)
    logger.debug("%s: engine of %d bytes, %d of them copied", folder, engine.num_bytes, copied)
    return Package(folder=folder, name=options.name, engine_bytes=engine.num_bytes, copied_bytes=copied)


def _check(options: PackageOptions) -> None:
    problems = []
    if not _NAME.fullmatch(options.name) or len(options.name) > MAX_NAME_CHARACTERS:
        problems.append(
            f"the name is {options.name!r}; expected up to {MAX_NAME_CHARACTERS} letters, digits, '_', '.' or '-', "
            "the first a letter or digit"
        )
    if not 1 <= options.instances <= MAX_INSTANCES:
        problems.append(f"instances is {options.instances}; expected 1 to {MAX_INSTANCES}")
    if options.threads is not None and not 1 <= options.threads <= MAX_THREADS:
        problems.append(
            f"threads is {options.threads}; expected 1 to {MAX_THREADS}, or none given to share the cores out"
        )
    if problems:
        raise RepositoryError(f"packaging {options.engine}:{listing(problems)}")


def _check_repository(output: Path) -> None:
    """Refuse a folder that holds other things than models. Raises OutputError."""
    if not output.exists():
        return
    entries = sorted(path for path in output.iterdir() if not path.name.startswith(".")) if output.is_dir() else []
    strangers = [path.name for path in entries if not (path / CONFIG_FILE).is_file()]
    if not output.is_dir() or strangers:
        what = f"it holds {', '.join(strangers[:4])} without a {CONFIG_FILE}" if output.is_dir() else "it is a file"
        raise OutputError(f"writing into {output}: not a model repository, {what}; name another output")


def _write_model(folder: Path, engine: Engine, options: PackageOptions) -> int:
    """Fill a model's folder; returns the bytes that were copied rather than linked."""
    parameters = ModelParameters(threads=options.threads)
    model = ServedModel(
        name=options.name,
        max_batch=engine.manifest.max_batch,
        instances=options.instances,
        parameters=parameters,
        provider=engine.manifest.provider,
    )
    (folder / CONFIG_FILE).write_text(config_text(model_config(model)), encoding="utf-8")
    version = folder / VERSION
    version.mkdir()
    shutil.copyfile(Path(__file__).parent / "models" / MODEL_FILE, version / MODEL_FILE)
    (version / parameters.engine).mkdir()
    names = [*engine.manifest.files, MANIFEST_FILE]
    target = version / parameters.engine
    copied = sum(_place(engine.folder / name, target / name, copy=options.copy) for name in names)
    write_seal(target)
    return copied


def _place(source: Path, target: Path, *, copy: bool) -> int:
    """A hard link, or a copy where one is asked for or links are refused; returns the bytes copied."""
    if not copy:
        with contextlib.suppress(OSError):
            os.link(source.resolve(), target)
            return 0
    shutil.copyfile(source, target)
    return target.stat().st_size
