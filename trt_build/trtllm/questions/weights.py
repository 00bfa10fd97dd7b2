"""First question: are these the checkpoint's weights? No text is needed.

The answer is about the rank files that trtllm-build reads, since nothing can be read back from a compiled engine. It is
asked when they are written, and its digests say of which files. Their matrices are compared with the checkpoint's by
`trt_build/comparison/weights.py`, each rank's copy by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.checkpoint.folder import file_digest
from export.trtllm.checkpoint import CONFIG_FILE, CheckpointPlan
from export.trtllm.converter import rank_file
from trt_build.comparison.answers import Answer
from trt_build.comparison.weights.comparing import QUESTION, compare_weights
from trt_build.trtllm.engine import TrtllmEngine
from trt_build.trtllm.questions.config_facts import config_failures, window_failures
from trt_build.trtllm.questions.rank_weights import open_rank_weights


@dataclass(frozen=True, kw_only=True)
class RankFolder:
    """A folder of rank files, the plan that says what they should hold, and the longest sequence of their engine."""

    plan: CheckpointPlan
    folder: Path
    max_sequence: int

    def digests(self) -> dict[str, str]:
        """SHA-256 of config.json and of each rank's file, by name; empty if one of them is missing."""
        names = (CONFIG_FILE, *map(rank_file, self.plan.headers))
        if not all((self.folder / name).is_file() for name in names):
            return {}
        return {name: file_digest(self.folder / name) for name in names}


def ask_about_weights(ranks: RankFolder, progress: Callable[[str], None] = lambda _: None) -> Answer:
    """Compare rank files with the model that they were planned for. The figures hold the digests of the files. Raises
    EngineError for files that cannot be read, ConfigError for a config.json that cannot be, and CheckpointError for a
    source that cannot be."""
    stored = open_rank_weights(ranks.plan, ranks.folder)
    facts = [*config_failures(ranks.folder, ranks.plan), *window_failures(ranks.plan.model, ranks.max_sequence)]
    found = [*facts, *stored.unknown_tensors(), *stored.filling_failures()]
    answer = compare_weights(stored, ranks.plan.model, found, progress)
    return dataclasses.replace(answer, figures={**answer.figures, "asked_of": ranks.digests()})


def ask_about_engine(
    engine: TrtllmEngine, ranks: RankFolder, progress: Callable[[str], None], *, again: bool
) -> Answer:
    """The answer for a built engine. The engine's own config.json is always compared with the checkpoint's facts. The
    rank files are compared if they are still those of the build, and `again` is set; else the answer is the one that
    was recorded when the engine was built."""
    facts = config_failures(engine.folder, ranks.plan, "pretrained_config")
    recorded, present = recorded_answer(engine), ranks.digests()
    if again and present and (recorded is None or recorded.figures["asked_of"] == present):
        answer = ask_about_weights(ranks, progress)
    elif recorded is not None:
        told = "when the engine was built"
        if recorded.figures["asked_of"] != present:
            digest = str(recorded.figures["asked_of"].get(rank_file(0)))[:12]
            told += f", of rank files that are {'changed since' if present else 'gone'} (SHA-256 {digest}…)"
        answer = dataclasses.replace(recorded, figures={**recorded.figures, "asked": told})
    elif facts:
        return Answer(question=QUESTION, failures=tuple(facts))
    else:
        reason = "the build was told not to" if present else f"the rank files are not in {ranks.folder}"
        return Answer(question=QUESTION, unasked=reason)
    return dataclasses.replace(answer, failures=(*facts, *answer.failures))


def recorded_answer(engine: TrtllmEngine) -> Answer | None:
    """The first question as engine.json has it since the build; None if it was not asked."""
    for record in engine.manifest.questions:
        asked_of = record.get("asked_of")
        if record.get("question") == QUESTION and isinstance(asked_of, Mapping):
            others: dict[str, Any] = {
                key: value for key, value in record.items() if key not in ("question", "passed", "failures", "unasked")
            }
            return Answer(question=QUESTION, figures=others, failures=tuple(record.get("failures") or ()))
    return None
