"""Evaluate an engine on tasks of lm-evaluation-harness, in process, by the steps that serve.

Tasks are named as lm_eval names them; `lm_eval ls tasks` lists them. Their data sets come from the Hugging Face hub.
A YAML of your own is found by --include-path. Functions that such a YAML names are run: include only what you trust.
Presets: nous is AGIEval, GPT4All, TruthfulQA and BigBench; leaderboard is IFEval, BBH, MATH, GPQA, MUSR and MMLU-PRO.
Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cli.progress import PROGRESS_S, every
from export.errors import printable
from export.provider import FLOAT, KV_CACHES

if TYPE_CHECKING:
    from triton_repo.evaluation.run import Evaluation

logger = logging.getLogger(__name__)

_PROGRESS_INTERVAL_S = 0.2  # on a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine", type=Path, metavar="ENGINE", help="an engine directory for ONNX Runtime")
    what = parser.add_argument_group("what is asked")
    what.add_argument("--tasks", metavar="NAME,NAME", help="tasks, groups or tags of lm_eval, or of --include-path")
    what.add_argument("--preset", choices=["nous", "leaderboard"], help="a suite, with its table")
    what.add_argument("--include-path", type=Path, metavar="DIR", help="a folder with YAMLs of your own tasks")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task, for a trial")
    what.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples in each prompt, in place of the tasks' own number"
    )
    what.add_argument("--chat-template", action="store_true", help="put prompts into the checkpoint's chat template")
    how = parser.add_argument_group("how it is computed")
    how.add_argument("--batch", type=int, default=8, metavar="N", help="sequences in a step (default: %(default)s)")
    how.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of the CPU (default: one for each usable core)",
    )
    how.add_argument(
        "--kv", "--kv-cache-dtype", dest="kv_cache", choices=KV_CACHES, default=FLOAT,
        help="how keys and values are stored: int8 of an engine that was built with --kv int8 (default: %(default)s)",
    )  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    output.add_argument("--output", type=Path, metavar="FILE", help="write the JSON object to a file too")


def run(arguments: argparse.Namespace) -> int:
    from export.files.output import refuse_existing, replace_file
    from triton_repo.evaluation.run import EvaluationOptions, evaluate

    if arguments.output is not None:
        refuse_existing(arguments.output, "the results")  # before an evaluation that may take hours
    for noisy in ("lm_eval", "datasets", "fsspec", "absl"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if sys.stderr is None or not sys.stderr.isatty():
        # Bars of lm_eval and of the package datasets, which overwrite their line.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    line = _Progress(sys.stderr)
    options = EvaluationOptions(
        engine=arguments.engine,
        tasks=tuple(word.strip() for word in arguments.tasks.split(",")) if arguments.tasks else (),
        preset=arguments.preset,
        include_path=arguments.include_path,
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        lanes=arguments.batch,
        chat_template=arguments.chat_template,
        threads=arguments.threads,
        kv_cache=arguments.kv_cache,
    )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some tasks print while they are loaded
            evaluation = evaluate(options, line)
    finally:
        line.close()
    text = json.dumps(evaluation.to_json(), indent=2, ensure_ascii=False)
    print(text if arguments.json else printable(tables(evaluation)), flush=True)
    if arguments.output:
        replace_file(arguments.output, f"{text}\n")
    return 0


def tables(evaluation: Evaluation) -> str:
    """The results as Markdown: the preset's table, and a row for each metric of each task."""
    parts = []
    if evaluation.table:
        parts.append(_table([["Model", *evaluation.table], [str(evaluation.engine["model"]), *_figures(evaluation)]]))
    rows = [["task", "version", "examples", "documents", "metric", "value", "± standard error"]]
    for name, values in {**evaluation.groups, **evaluation.results}.items():
        facts = [
            str(evaluation.versions.get(name, "")),
            str(evaluation.num_fewshot.get(name, "")),
            str(evaluation.num_documents.get(name, {}).get("effective", "")),
        ]
        rows += [[name, *facts, *metric] for metric in _metrics(values)]
    parts.append(_table(rows))
    notes = []
    if evaluation.options.limit is not None:
        notes.append(f"at most {evaluation.options.limit} documents of each task: a trial, no result to compare")
    if evaluation.truncated:
        notes.append(f"{evaluation.truncated} contexts were too long for the engine and lost their beginning")
    return "\n\n".join([*parts, *notes])


def _figures(evaluation: Evaluation) -> list[str]:
    return [f"{value:.2f}" for value in evaluation.table.values()]


def _metrics(values: Mapping[str, Any]) -> list[list[str]]:
    """Name, value and standard error of each metric; lm_eval writes "acc,none" and "acc_stderr,none"."""
    found = []
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, str):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        found.append([name, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else ""])
    return found


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(cells)} |" for cells in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


class _Progress:
    """Shows how many requests are done: on a terminal in one line that is overwritten, elsewhere in a plain line every
    few seconds."""

    def __init__(self, stream: TextIO | None) -> None:
        self._terminal = stream if stream is not None and stream.isatty() else None
        self._log = every(PROGRESS_S, logger.info)
        self._what, self._began_s, self._shown_s = "", 0.0, 0.0
        self._is_open = False

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self.close()
            self._what, self._began_s, self._shown_s = what, now, 0.0
        text = f"{done} of {total} {what}"
        if 0 < done < total:
            left = round((now - self._began_s) * (total - done) / done)
            text += f", {left // 60}:{left % 60:02d} left"
        if self._terminal is None:
            self._log(text)
        elif done == total or now - self._shown_s > _PROGRESS_INTERVAL_S:
            self._shown_s, self._is_open = now, True
            self._terminal.write(f"\r{text}\x1b[K")
            self._terminal.flush()

    def close(self) -> None:
        """End the line that is overwritten."""
        if self._terminal is not None and self._is_open:
            self._terminal.write("\n")
            self._is_open = False
