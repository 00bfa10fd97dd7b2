"""Engine directory in, models of a Triton model repository out.

    package_engine(PackageOptions(engine=Path("engine"), name="phixtral", output=Path("repository")))

An engine for ONNX Runtime becomes one model:

    repository/phixtral/config.pbtxt      made from the engine's manifest and the wire contract
    repository/phixtral/1/model.py        a copy of triton_repo/models/model.py
    repository/phixtral/1/engine/         hard links to the engine's files, or copies on another file system

An engine for TensorRT-LLM becomes an ensemble with that name and three models as its steps (`ensemble_package.py`). So
does an engine for ONNX Runtime if that layout is asked for.
The repository is made if it does not exist. A model in it is never overwritten. New models appear whole, by rename, or
not at all.
"""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from export.errors import OutputError, listing
from export.files.reading import check_name
from export.provider import INT8
from triton_repo.contracts.ensemble import STEP_MODELS
from triton_repo.contracts.model_parameters import MODEL_FILE, ModelParameters, changed_fields
from triton_repo.contracts.seal import write_seal
from triton_repo.contracts.trtllm_parameters import TensorrtLlmParameters
from triton_repo.errors import RepositoryError
from triton_repo.packaging.engine_facts import EngineFacts, read_engine_facts
from triton_repo.packaging.ensemble_package import MODELS_FOLDER, VERSION, EnsembleOptions, write_ensemble
from triton_repo.packaging.model_config import CONFIG_FILE, ServedModel, config_text, model_config
from triton_repo.packaging.placing import place_files
from triton_repo.packaging.staging import staged_models

logger = logging.getLogger(__name__)

SINGLE = "single"
ENSEMBLE = "ensemble"
LAYOUTS = (SINGLE, ENSEMBLE)
MAX_NAME_CHARACTERS = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class PackageOptions:
    """What a caller chooses. `onnxruntime` and `unary` are only for ONNX Runtime; `served_from` and `tensorrt_llm` are
    only for TensorRT-LLM.
    """

    engine: Path
    name: str
    output: Path
    layout: str | None = None  # one of LAYOUTS; None takes the one for the engine's backend
    onnxruntime: ModelParameters = field(default_factory=ModelParameters)
    copy: bool = False  # copy the engine's files; a hard link would share its disk space with the engine directory
    unary: bool = False  # one response for each request, for Triton's plain infer
    served_from: Path | None = None  # where the repository will be when it is served; None: at `output`
    tensorrt_llm: TensorrtLlmParameters = field(default_factory=TensorrtLlmParameters)


@dataclass(frozen=True, kw_only=True)
class Package:
    """What was written."""

    folder: Path  # of the model that clients ask
    name: str  # of that model
    steps: tuple[str, ...]  # the models that are its steps
    engine_bytes: int
    copied_bytes: int  # of the engine's bytes, those that were copied instead of linked


def package_engine(options: PackageOptions) -> Package:
    """Write the models. Logs a warning if the engine needs moeship's CPU kernels and this machine cannot use them.

    Raises RepositoryError for unusable options, EngineError for a damaged engine or a wrong MOESHIP_KERNELS_LEVEL, and
    OutputError.
    """
    _check(options)
    check_output(options.output)
    facts = read_engine_facts(options.engine, check_digests=False)  # place_files checks them
    layout = options.layout or (ENSEMBLE if facts.runs_on_tensorrt_llm else SINGLE)
    steps = STEP_MODELS if layout == ENSEMBLE else ()
    _check_engine(options, facts, layout)
    if facts.failed_verification is not None:
        logger.warning("packaging %s: its last verification failed: %s", options.engine, facts.failed_verification)
    if facts.has_own_kernels:
        from trt_build.ort.kernels import check_level, warn_if_unusable

        check_level()
        warn_if_unusable("the engine is packaged", "serve")
    with staged_models(options.output, (*steps, options.name)) as staging:
        if layout == ENSEMBLE:
            copied = write_ensemble(staging, facts, _ensemble_options(options))
        else:
            copied = _write_model(staging / options.name, facts, options)
    folder = options.output / options.name
    logger.debug("%s: engine of %d bytes, %d of them copied", folder, facts.num_bytes, copied)
    return Package(folder=folder, name=options.name, steps=steps, engine_bytes=facts.num_bytes, copied_bytes=copied)


def _check(options: PackageOptions) -> None:
    """Check the options that can be checked without the engine. Raises RepositoryError that lists every problem."""
    problems = name_problems(options.name)
    if options.layout not in (None, *LAYOUTS):
        problems.append(f"the layout is {options.layout!r}; expected one of {', '.join(LAYOUTS)}")
    problems += options.onnxruntime.problems()
    if options.served_from is not None and not options.served_from.is_absolute():
        problems.append(f"the repository is to be served from {options.served_from}; expected an absolute path")
    if problems:
        raise RepositoryError(f"packaging {options.engine}:{listing(problems)}")


def name_problems(name: str) -> list[str]:
    """What is wrong with a model's name."""
    if _NAME.fullmatch(name) and len(name) <= MAX_NAME_CHARACTERS:
        return []
    return [
        f"the name is {name!r}; expected up to {MAX_NAME_CHARACTERS} letters, digits, '_', '.' or '-', "
        "the first a letter or digit"
    ]


def check_output(output: Path) -> None:
    """Raise OutputError for a folder that holds anything but models, or has a name that is not UTF-8."""
    check_name(output.resolve(), "writing a model repository", OutputError)
    if not output.exists():
        return
    entries = sorted(path for path in output.iterdir() if not path.name.startswith(".")) if output.is_dir() else []
    not_models = [path.name for path in entries if not (path / CONFIG_FILE).is_file()]
    if not output.is_dir() or not_models:
        what = f"it holds {', '.join(not_models[:4])} without a {CONFIG_FILE}" if output.is_dir() else "it is a file"
        raise OutputError(f"writing into {output}: not a model repository, {what}; name another output")


def _check_engine(options: PackageOptions, facts: EngineFacts, layout: str) -> None:
    """Raise RepositoryError for options that do not fit the engine or the layout, OutputError for a second ensemble."""
    problems = []
    if facts.runs_on_tensorrt_llm:
        if layout == SINGLE:
            problems.append(
                "TensorRT-LLM's backend takes tokens, and only an ensemble takes text; leave the layout out, or take "
                "ensemble"
            )
        given = changed_fields(options.onnxruntime)
        if given:
            problems.append(
                f"{', '.join(given)}: for ONNX Runtime; TensorRT-LLM has parameters of its own: leave it out"
            )
    elif options.served_from is not None or options.tensorrt_llm != TensorrtLlmParameters():
        problems.append(
            f"this engine is for {facts.backend}, and served_from and the parameters of tensorrt_llm are for "
            "TensorRT-LLM's engines; leave them out"
        )
    if options.onnxruntime.kv_cache == INT8 and not facts.runs_on_tensorrt_llm and not facts.has_int8_cache:
        problems.append(
            "kv_cache is int8, and this engine was built without keys and values in int8; build "
            "it again with --kv int8, or leave --kv out here"
        )
    if layout == ENSEMBLE and options.unary:
        problems.append(
            "unary is set, and Triton's plain infer refuses an ensemble of decoupled steps; package an engine "
            "for ONNX Runtime as one model, or ask by HTTP's generate"
        )
    if layout == ENSEMBLE and options.name in STEP_MODELS:
        problems.append(f"the name is {options.name}, the name of one of the ensemble's steps; choose another")
    if problems:
        raise RepositoryError(f"packaging {options.engine}:{listing(problems)}")
    there = [name for name in STEP_MODELS if (options.output / name).exists()]
    if layout == ENSEMBLE and there:
        raise OutputError(
            f"writing into {options.output}: it has {', '.join(there)} already; the steps of an ensemble find each "
            "other by these names, which NVIDIA's tools expect too, so that a repository holds one ensemble: name "
            "another output"
        )


def _ensemble_options(options: PackageOptions) -> EnsembleOptions:
    return EnsembleOptions(
        name=options.name,
        served_from=options.served_from or options.output.resolve(),
        onnxruntime=options.onnxruntime,
        copy=options.copy,
        tensorrt_llm=options.tensorrt_llm,
    )


def _write_model(folder: Path, facts: EngineFacts, options: PackageOptions) -> int:
    """Fill the folder of a model without steps. Returns the bytes that were copied instead of linked."""
    parameters = options.onnxruntime
    model = ServedModel(
        name=options.name,
        max_batch=facts.max_batch,
        parameters=parameters,
        provider=facts.provider,
        unary=options.unary,
    )
    (folder / CONFIG_FILE).write_text(config_text(model_config(model)), encoding="utf-8")
    version = folder / VERSION
    version.mkdir()
    shutil.copyfile(MODELS_FOLDER / MODEL_FILE, version / MODEL_FILE)
    target = version / parameters.engine
    placed = place_files(facts, facts.files, target, copy=options.copy)
    write_seal(target, placed.states)
    return placed.copied_bytes
