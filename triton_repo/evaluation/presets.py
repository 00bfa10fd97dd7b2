"""Suites of tasks by name, and their tables: `nous` as on phixtral's card, `leaderboard` as on Mixtral's.

    PRESETS["nous"].tasks                    # names of lm_eval
    PRESETS["nous"].columns(results)         # {"AGIEval": 33.12, ..., "Average": 44.5}, in per cent

`nous` is the suite of Nous Research that LLM AutoEval runs with BENCHMARK=nous: the tasks of its runpod.sh, and the
averages of its llm_autoeval/table.py. It ran a fork of lm_eval from 2023. Where today's lm_eval has one task for what
were three (logical deduction and shuffled objects, with three, five and seven objects), that task counts three times.

`leaderboard` is the second Open LLM Leaderboard. Its columns are normalised so that chance is 0 and all is 100
(huggingface.co/docs/leaderboards/open_llm_leaderboard/normalization).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType
from typing import Any

Scores = Mapping[str, Mapping[str, Any]]  # task -> metric -> value, both by lm_eval's names

_AGIEVAL = ("aqua_rat", "logiqa_en", "lsat_ar", "lsat_lr", "lsat_rc", "sat_en", "sat_en_without_passage", "sat_math")
_GPT4ALL = ("hellaswag", "openbookqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "piqa")
_BIGBENCH = {  # task of BIG-bench -> how often it counts
    "causal_judgment": 1, "date_understanding": 1, "disambiguation_qa": 1, "geometric_shapes": 1,
    "logical_deduction": 3, "movie_recommendation": 1, "navigate": 1, "reasoning_about_colored_objects": 1,
    "ruin_names": 1, "salient_translation_error_detection": 1, "snarks": 1, "sports_understanding": 1,
    "temporal_sequences": 1, "tracking_shuffled_objects": 3,
}  # fmt: skip
# Choices of each subtask: chance is 1 in so many.
_BBH = {
    "boolean_expressions": 2, "causal_judgement": 2, "date_understanding": 6, "disambiguation_qa": 3,
    "formal_fallacies": 2, "geometric_shapes": 11, "hyperbaton": 2, "logical_deduction_five_objects": 5,
    "logical_deduction_seven_objects": 7, "logical_deduction_three_objects": 3, "movie_recommendation": 6,
    "navigate": 2, "object_counting": 19, "penguins_in_a_table": 5, "reasoning_about_colored_objects": 18,
    "ruin_names": 6, "salient_translation_error_detection": 6, "snarks": 2, "sports_understanding": 2,
    "temporal_sequences": 4, "tracking_shuffled_objects_five_objects": 5, "tracking_shuffled_objects_seven_objects": 7,
    "tracking_shuffled_objects_three_objects": 3, "web_of_lies": 2,
}  # fmt: skip
_MUSR = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}
_GPQA, _GPQA_CHOICES = ("diamond", "extended", "main"), 4
_MMLU_PRO_CHOICES = 10
_MATH = (
    "algebra", "counting_and_prob", "geometry", "intermediate_algebra", "num_theory", "prealgebra", "precalculus",
)  # fmt: skip

_bigbench = "bigbench_{}_multiple_choice".format


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A suite. `tasks` are what is asked for, groups of lm_eval or tasks. `parts`: heading of the table -> the tasks
    whose scores make it, and how."""

    tasks: tuple[str, ...]
    parts: Mapping[str, tuple[Sequence[str], Callable[[Scores], float]]]

    def columns(self, results: Scores) -> dict[str, float]:
        """The table's row, in per cent: a mean for each part, and their average."""
        found = {heading: 100 * mean(results) for heading, (_, mean) in self.parts.items()}
        return {**found, "Average": fmean(found.values())}

    @property
    def leaves(self) -> tuple[str, ...]:
        """All tasks that the table needs."""
        return tuple(task for tasks, _ in self.parts.values() for task in tasks)


def above_chance(score: float, num_choices: int) -> float:
    """A score between chance (0) and all right (1); 0 below chance."""
    chance = 1 / num_choices
    return max(0.0, (score - chance) / (1 - chance))


def _value(results: Scores, task: str, *metrics: str) -> float:
    """The first of the metrics that a task has, whatever filter gave it."""
    found = {name.partition(",")[0]: value for name, value in reversed(list(results[task].items()))}
    return float(next(found[metric] for metric in metrics if metric in found))


def _mean(tasks: Sequence[str], *metrics: str) -> Callable[[Scores], float]:
    return lambda results: fmean(_value(results, task, *metrics) for task in tasks)


def _above_chance(num_choices: Mapping[str, int], metric: str) -> tuple[Sequence[str], Callable[[Scores], float]]:
    return tuple(num_choices), lambda results: fmean(
        above_chance(_value(results, task, metric), count) for task, count in num_choices.items()
    )


def _ifeval(results: Scores) -> float:
    task = "leaderboard_ifeval"
    return fmean(_value(results, task, metric) for metric in ("prompt_level_strict_acc", "inst_level_strict_acc"))


def _nous() -> Preset:
    agieval = tuple(f"agieval_{name}" for name in _AGIEVAL)
    bigbench = tuple(_bigbench(name) for name, times in _BIGBENCH.items() for _ in range(times))
    truthful = "truthfulqa_mc2"
    return Preset(
        tasks=(*agieval, *_GPT4ALL, truthful, *dict.fromkeys(bigbench)),
        parts=MappingProxyType(
            {
                "AGIEval": (agieval, _mean(agieval, "acc_norm", "acc")),
                "GPT4All": (_GPT4ALL, _mean(_GPT4ALL, "acc_norm", "acc")),
                "TruthfulQA": ((truthful,), _mean((truthful,), "acc")),
                "Bigbench": (bigbench, _mean(bigbench, "acc")),
            }
        ),
    )


def _leaderboard() -> Preset:
    math = tuple(f"leaderboard_math_{name}_hard" for name in _MATH)
    return Preset(
        tasks=("leaderboard",),
        parts=MappingProxyType(
            {
                "IFEval": (("leaderboard_ifeval",), _ifeval),
                "BBH": _above_chance({f"leaderboard_bbh_{name}": n for name, n in _BBH.items()}, "acc_norm"),
                "MATH Lvl 5": (math, _mean(math, "exact_match")),
                "GPQA": _above_chance({f"leaderboard_gpqa_{name}": _GPQA_CHOICES for name in _GPQA}, "acc_norm"),
                "MUSR": _above_chance({f"leaderboard_musr_{name}": n for name, n in _MUSR.items()}, "acc_norm"),
                "MMLU-PRO": _above_chance({"leaderboard_mmlu_pro": _MMLU_PRO_CHOICES}, "acc"),
            }
        ),
    )


PRESETS: Mapping[str, Preset] = MappingProxyType({"nous": _nous(), "leaderboard": _leaderboard()})
