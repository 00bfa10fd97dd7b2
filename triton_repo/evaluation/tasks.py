"""Finds tasks of lm-evaluation-harness by name and loads them with their data sets. Imports lm_eval where it is used.

    tasks = load_tasks(["arc_easy"], include_path=None)
    tasks.loaded["tasks"]        # {"arc_easy": lm_eval's task}

lm_eval leaves out a YAML that it cannot read, so one of the user's own is read here first. What goes wrong while a data
set is loaded becomes one error that names the task and the data set.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from export.errors import MoeshipError, named, names, shown
from export.files.reading import is_folder
from export.optional import optional_package
from triton_repo.evaluation.errors import EvaluationError

_MOST_NEAR = 5
_LONGEST_NAME = 100  # for which similar ones are looked for


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Loaded tasks: `loaded` is lm_eval's dict of tasks, groups and the map of groups."""

    loaded: Any

    @property
    def by_name(self) -> dict[str, Any]:
        """Name -> lm_eval's task, without groups."""
        return dict(self.loaded["tasks"])


def load_tasks(wanted: Sequence[str], include_path: Path | None, num_fewshot: int | None = None) -> Tasks:
    """Load tasks, groups and tags by their names, with their data sets. The names in `include_path` come before those
    of lm_eval. `num_fewshot` is the number of examples in prompts, in place of a task's own; a task that sets 0 keeps
    it, as in lm_eval.

    Raises EvaluationError for an unknown name, a YAML that cannot be read, a data set that cannot be loaded, and a task
    without documents; MissingPackageError.
    """
    with optional_package("lm_eval", "evaluating an engine", "eval"):
        from lm_eval.tasks import TaskManager

    local = _own_yamls(include_path)
    manager = None
    if local:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or not set(wanted) <= set(manager.all_tasks):
        # Reading lm_eval's own YAMLs takes ten seconds.
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in wanted if name not in manager.all_tasks]
    if unknown:
        raise _unknown(unknown[0], manager.all_tasks, include_path)
    with _loading_errors(wanted):
        loaded = manager.load(list(dict.fromkeys(wanted)))
        _configure(loaded["tasks"], num_fewshot)
        empty = [name for name, task in loaded["tasks"].items() if not len(task.eval_docs)]
    if empty or not loaded["tasks"]:
        raise _without_documents(f"loading the task {named(empty[0] if empty else wanted[0])}")
    return Tasks(loaded=loaded)


def _configure(tasks: dict[str, Any], num_fewshot: int | None) -> None:
    """Set the number of examples, and the seed by which they are drawn, as lm_eval.simple_evaluate does."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for task in tasks.values():
        own = task.get_config("num_fewshot")
        if own != 0 and num_fewshot is not None:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _own_yamls(include_path: Path | None) -> list[Path]:
    """The YAML files of the user's folder, each of which can be read. Raises EvaluationError."""
    if include_path is None:
        return []
    from lm_eval.tasks._yaml_loader import load_yaml

    doing = f"reading the tasks of {named(include_path)}"
    if not is_folder(include_path):
        raise EvaluationError(f"{doing}: no such folder, expected a folder with YAML files; check --include-path")
    found = sorted(include_path.glob("**/*.yaml"))
    for path in found:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # of the YAML parser, of an include, or ValueError
            raise EvaluationError(
                f"{doing}: {named(path.relative_to(include_path))} cannot be read ({named(error, 400)}); mend the file"
            ) from error
    if not found:
        raise EvaluationError(f"{doing}: found no file whose name ends in .yaml, expected one a task")
    return found


def _unknown(name: str, known: Sequence[str], include_path: Path | None) -> EvaluationError:
    near = difflib.get_close_matches(name, known, n=_MOST_NEAR) if len(name) <= _LONGEST_NAME else []
    hint = f"did you mean {names(near)}?" if near else "`lm_eval ls tasks` lists those of lm_eval."
    where = "lm_eval has" if include_path is None else f"lm_eval and {named(include_path)} have"
    own = " A task of your own needs --include-path DIR." if include_path is None else ""
    return EvaluationError(f"looking for the task {shown(name)}: {where} none of that name; {hint}{own}")


@contextmanager
def _loading_errors(wanted: Sequence[str]) -> Iterator[None]:
    """Turn whatever loading tasks raises into one error that says which task and which data set."""
    try:
        yield
    except MoeshipError:
        raise
    except Exception as error:  # of lm_eval, datasets, huggingface_hub, a YAML's values or a task's own functions
        task, data = _place(error.__traceback__)
        doing = f"loading the task {named(task.config.task if task else names(wanted))}"
        missing = next((cause for cause in _causes(error) if isinstance(cause, ModuleNotFoundError)), None)
        if missing is not None:
            raise EvaluationError(
                f"{doing}: it needs the package {named(missing.name)}; install what lm_eval's tasks need with: "
                "pip install 'moeship[eval]'"
            ) from error
        if isinstance(error, IndexError) and _is_empty(task):
            raise _without_documents(doing) from error
        reason = f"{type(error).__name__}: {named(error, 500)}"
        if data is None:
            raise EvaluationError(f"{doing}: {reason}; mend the task's YAML, or leave the task out") from error
        raise EvaluationError(
            f"{doing}: its data set {named(data)} cannot be loaded ({reason}). A data set of the hub needs the network "
            "once, or a copy in the cache of the package datasets; a gated one needs a token (`hf auth login`). A task "
            "over files of your own needs neither: --include-path DIR --tasks NAME (docs/evaluation.md)"
        ) from error


def _without_documents(doing: str) -> EvaluationError:
    return EvaluationError(
        f"{doing}: found no documents, expected at least one; look at its data files and its test_split"
    )


def _is_empty(task: Any) -> bool:  # noqa: ANN401 - lm_eval's task
    """Whether a task has no documents, which its own constructor does not expect."""
    try:
        return not len(task.eval_docs)
    except Exception:  # whatever a half made task raises
        return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _place(traceback: TracebackType | None) -> tuple[Any, str | None]:
    """lm_eval's task that an error came from, and the data set if it was being loaded; None for what is not known."""
    task: Any = None
    data: str | None = None
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(getattr(getattr(owner, "_config", None), "task", None), str):
            task = owner
            if traceback.tb_frame.f_code.co_name == "download":
                data = _data_set(owner)
        traceback = traceback.tb_next
    return task, data


def _data_set(task: Any) -> str:  # noqa: ANN401 - lm_eval's task
    """The name of a task's data set: of the hub, or the files for a loader such as `json`."""
    files = (task.config.dataset_kwargs or {}).get("data_files")
    part = f" ({task.DATASET_NAME})" if task.DATASET_NAME else ""
    return f"{task.DATASET_PATH}{part}" if files is None else f"{task.DATASET_PATH} of {shown(files)}"
