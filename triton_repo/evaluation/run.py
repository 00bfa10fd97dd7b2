"""Evaluates an engine: loads it and the tasks, has lm-evaluation-harness ask, and gives the results as one record.

evaluation = evaluate(EvaluationOptions(engine=Path("engine"), tasks=("arc_easy",)))
evaluation.results["arc_easy"]["acc,none"]
evaluation.to_json()
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from export.errors import ConfigError, MoeshipError, named
from export.optional import optional_package
from export.provider import FLOAT
from export.tokenizer.loading import load_tokenizer
from triton_repo.evaluation.errors import EvaluationError
from triton_repo.evaluation.presets import PRESETS
from triton_repo.evaluation.tasks import Tasks, load_tasks
from trt_build.manifest import ORT_BACKEND, read_manifest
from trt_build.ort.engine import Engine, open_engine
from trt_build.ort.session import Session

logger = logging.getLogger(__name__)

BOOTSTRAP_ROUNDS = 100  # of metrics whose standard error has no formula; lm_eval's 100,000 take minutes
DEFAULT_LANES = 8


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What to evaluate. `tasks` are names of lm_eval or of YAMLs in `include_path`; `preset` names a suite whose tasks
    come after them. `limit`: most documents of a task. `num_fewshot`: examples in prompts. `lanes`: most sequences in a
    step. `kv_cache`: how keys and values are stored."""

    engine: Path
    tasks: tuple[str, ...] = ()
    preset: str | None = None
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    lanes: int = DEFAULT_LANES
    chat_template: bool = False
    threads: int | None = None
    kv_cache: str = FLOAT


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results of an evaluation. `results` and `groups`: task or group -> metric -> value, by lm_eval's names, such
    as "acc,none". `table`: the columns of the preset, in per cent; empty without a preset."""

    options: EvaluationOptions
    engine: Mapping[str, Any]  # folder, model, precision and the like, and a digest of engine.json
    results: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, Any]  # task -> version
    num_fewshot: Mapping[str, Any]
    num_documents: Mapping[str, Mapping[str, int]]  # task -> original, effective
    table: Mapping[str, float]
    truncated: int  # contexts that lost their beginning
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The record that --json prints and --output writes."""
        return {
            "engine": dict(self.engine),
            "settings": {
                "tasks": list(self.options.tasks),
                "preset": self.options.preset,
                "include_path": None if self.options.include_path is None else str(self.options.include_path),
                "limit": self.options.limit,
                "num_fewshot": self.options.num_fewshot,
                "batch": self.options.lanes,
                "chat_template": self.options.chat_template,
                "kv_cache": self.options.kv_cache,
            },
            "libraries": {name: importlib.metadata.version(name) for name in ("moeship", "lm_eval", "datasets")},
            "table": dict(self.table),
            "results": _plain(self.results),
            "groups": _plain(self.groups),
            "versions": _plain(self.versions),
            "num_fewshot": _plain(self.num_fewshot),
            "num_documents": _plain(self.num_documents),
            "truncated_contexts": self.truncated,
            "seconds": round(self.seconds, 1),
        }


def evaluate(
    options: EvaluationOptions, progress: Callable[[str, int, int], object] = lambda _what, _done, _total: None
) -> Evaluation:
    """Evaluate an engine. `progress` is called with what is counted, how many are done, and of how many.

    Raises EvaluationError, EngineError, MissingPackageError, and ConfigError for options that say nothing to do.
    """
    names = _wanted(options)
    engine = _opened(options.engine)
    with optional_package("lm_eval", "evaluating an engine", "eval"):
        from triton_repo.evaluation.model import EngineModel
    logger.info("loading the tasks and their data sets")
    tasks = load_tasks(names, options.include_path, options.num_fewshot)
    session = Session(engine, options.threads, kv_cache=options.kv_cache)
    tokenizer = load_tokenizer(engine.folder)
    model = EngineModel(session, tokenizer, options.lanes, progress)
    began = time.monotonic()
    found = _ask(model, tasks, options)
    if model.truncated:
        logger.warning(
            "%d contexts were longer than the %d tokens that the engine takes, and lost their beginning",
            model.truncated, session.max_sequence,
        )  # fmt: skip
    results = found["results"]
    return Evaluation(
        options=options,
        engine=_described(engine),
        results={name: values for name, values in results.items() if name in tasks.by_name},
        groups=found.get("groups", {}),
        versions=found["versions"],
        num_fewshot=found["n-shot"],
        num_documents=found["n-samples"],
        table=PRESETS[options.preset].columns(results) if options.preset else {},
        truncated=model.truncated,
        seconds=time.monotonic() - began,
    )


def _wanted(options: EvaluationOptions) -> tuple[str, ...]:
    doing = f"evaluating {named(options.engine)}"
    if options.preset is not None and options.preset not in PRESETS:
        raise ConfigError(f"{doing}: found the preset {options.preset}, expected one of {', '.join(PRESETS)}")
    wanted = (*options.tasks, *(PRESETS[options.preset].tasks if options.preset else ()))
    if not wanted or not all(wanted):
        raise ConfigError(f"{doing}: found no task or an empty name, expected names of tasks; give --tasks or --preset")
    for flag, value, least in (
        ("--limit", options.limit, 1),
        ("--num-fewshot", options.num_fewshot, 0),
        ("--batch", options.lanes, 1),
        ("--threads", options.threads, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{doing}: {flag} is {value}, expected {least} or more")
    return wanted


def _opened(folder: Path) -> Engine:
    """The engine. Raises EvaluationError for one of TensorRT-LLM."""
    doing = f"evaluating the engine {named(folder)}"
    backend = read_manifest(folder, doing).get("backend")
    if backend != ORT_BACKEND:
        raise EvaluationError(
            f"{doing}: its backend is {named(backend, 40)}, and moeship eval runs engines of {ORT_BACKEND} in process; "
            "serve the engine behind a gateway of OpenAI's completions API that gives prompts' log-probabilities, and "
            "ask it with: lm_eval --model local-completions"
        )
    return open_engine(folder)


def _ask(model: Any, tasks: Tasks, options: EvaluationOptions) -> dict[str, Any]:  # noqa: ANN401 - lm_eval's LM
    """lm_eval's results. Seeds are those of lm_eval.simple_evaluate, except torch's: nothing here draws by torch."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate as ask

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        found: dict[str, Any] = ask(
            lm=model,
            task_dict=tasks.loaded,
            limit=options.limit,
            bootstrap_iters=BOOTSTRAP_ROUNDS,
            log_samples=False,
            apply_chat_template=options.chat_template,
            fewshot_as_multiturn=options.chat_template,
        )
    except MoeshipError:
        raise
    except Exception as error:
        if _was_ours(error.__traceback__):
            raise
        # A task that would run code of the model's answers, needs pictures, or fails over its own documents.
        raise EvaluationError(
            f"evaluating {', '.join(tasks.by_name)}: {type(error).__name__}: {named(error, 600)}; mend the task, or "
            "leave it out"
        ) from error
    return found


def _was_ours(traceback: TracebackType | None) -> bool:
    """Whether an error came from an answer of the model, not from a task."""
    names = []
    while traceback is not None:
        names.append(traceback.tb_frame.f_globals.get("__name__", ""))
        traceback = traceback.tb_next
    return "triton_repo.evaluation.model" in names


def _described(engine: Engine) -> dict[str, Any]:
    manifest = engine.manifest
    return {
        "folder": str(engine.folder),
        "model": manifest.model,
        "precision": manifest.precision.name,
        "provider": manifest.provider,
        "kernels": manifest.kernels,
        "max_sequence": manifest.max_sequence,
        # Of engine.json without what verify writes into it later.
        "digest": hashlib.sha256(engine.text(None).encode()).hexdigest(),
    }


def _plain(value: Any) -> Any:  # noqa: ANN401 - anything that JSON takes, or that text can stand for
    """The value with numpy's numbers as Python's, and what JSON lacks as text."""
    return json.loads(json.dumps(value, default=lambda odd: odd.item() if isinstance(odd, np.generic) else str(odd)))
