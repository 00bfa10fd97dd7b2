"""The suites name tasks that lm_eval has, and their tables are the means that the cards' tables are."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
from lm_eval.tasks._index import Kind, TaskIndex

from cli.eval import tables
from triton_repo.evaluation.presets import PRESETS, above_chance
from triton_repo.evaluation.run import Evaluation, EvaluationOptions

# Folders of lm_eval's tasks. Reading all of its 14,000 names would take ten seconds.
FOLDERS = (
    "agieval", "hellaswag", "openbookqa", "winogrande", "arc", "super_glue/boolq", "piqa", "truthfulqa",
    "bigbench/multiple_choice", "leaderboard",
)  # fmt: skip


@cache
def registry():
    folder = Path(str(files("lm_eval"))) / "tasks"
    return TaskIndex.build([folder / name for name in FOLDERS])


@pytest.mark.parametrize("name", PRESETS)
def test_every_task_of_a_preset_is_one_of_lm_eval(name):
    wanted = {*PRESETS[name].tasks, *PRESETS[name].leaves}
    assert wanted <= set(registry())
    assert {registry()[task].kind for task in PRESETS[name].leaves} == {Kind.TASK}


def leaves(name):
    entry = registry()[name]
    if entry.kind is not Kind.GROUP:
        return {name}
    return {leaf for member in entry.cfg["task"] for leaf in leaves(member)}


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_uses_every_task_that_a_preset_runs(name):
    assert {leaf for task in PRESETS[name].tasks for leaf in leaves(task)} == set(PRESETS[name].leaves)


def test_chance_is_one_in_the_choices_that_lm_eval_offers():
    for task in PRESETS["leaderboard"].leaves:
        if not task.startswith("leaderboard_bbh_"):
            continue
        choices = len(registry()[task].cfg["doc_to_choice"])
        at_chance = {leaf: {"acc_norm,none": 0.0} for leaf in PRESETS["leaderboard"].parts["BBH"][0]}
        above = {**at_chance, task: {"acc_norm,none": 1 / choices + 0.1}}
        expected = 0.1 / (1 - 1 / choices) / len(at_chance)
        assert PRESETS["leaderboard"].parts["BBH"][1](above) == pytest.approx(expected)


def test_nous_is_the_mean_of_four_means():
    """Of 18 tasks of BigBench, six are two of lm_eval's, which count three times each."""
    scores = {task: {"acc,none": 0.5, "acc_stderr,none": 0.9, "alias": task} for task in PRESETS["nous"].leaves}
    scores["agieval_sat_math"] = {"acc,none": 0.5, "acc_norm,none": 0.9}
    scores["hellaswag"] = {"acc,none": 0.1, "acc_norm,none": 0.85}
    scores["truthfulqa_mc2"] = {"acc,none": 0.4}
    scores["bigbench_logical_deduction_multiple_choice"] = {"acc,none": 0.8}
    assert PRESETS["nous"].columns(scores) == {
        "AGIEval": pytest.approx(100 * (7 * 0.5 + 0.9) / 8),
        "GPT4All": pytest.approx(100 * (6 * 0.5 + 0.85) / 7),
        "TruthfulQA": pytest.approx(40),
        "Bigbench": pytest.approx(100 * (15 * 0.5 + 3 * 0.8) / 18),
        "Average": pytest.approx((55 + 55 + 40 + 55) / 4),
    }


def test_the_leaderboard_is_normalised():
    """The figures of GPQA and MUSR are the worked examples of the leaderboard's page on normalisation."""
    parts = PRESETS["leaderboard"].parts
    scores = {task: {"acc_norm,none": 0.6} for task in parts["GPQA"][0]}
    assert 100 * parts["GPQA"][1](scores) == pytest.approx(46.67, abs=0.005)
    musr = {"murder_mysteries": 0.7, "object_placements": 0.4, "team_allocation": 0.6}
    scores = {f"leaderboard_musr_{name}": {"acc_norm,none": value} for name, value in musr.items()}
    assert 100 * parts["MUSR"][1](scores) == pytest.approx((40 + 25 + 40) / 3)
    assert parts["MMLU-PRO"][1]({"leaderboard_mmlu_pro": {"acc,none": 0.05}}) == 0
    ifeval = {"prompt_level_strict_acc,none": 0.3, "inst_level_strict_acc,none": 0.5, "inst_level_loose_acc,none": 0.9}
    assert parts["IFEval"][1]({"leaderboard_ifeval": ifeval}) == pytest.approx(0.4)
    assert above_chance(1.0, 4) == 1
    assert above_chance(0.1, 4) == 0


def test_the_tables_are_markdown():
    evaluation = Evaluation(
        options=EvaluationOptions(engine=Path("engine"), preset="nous"),
        engine={"model": "phixtral"},
        results={"winogrande": {"alias": "winogrande", "acc,none": 0.25, "acc_stderr,none": 0.125, "acc,strict": 0.5}},
        groups={},
        versions={"winogrande": 1.0},
        num_fewshot={"winogrande": 0},
        num_documents={"winogrande": {"original": 8, "effective": 4}},
        table={"AGIEval": 33.123, "GPT4All": 70.0, "TruthfulQA": 40.0, "Bigbench": 50.0, "Average": 48.28},
        truncated=0,
        seconds=1.0,
    )
    assert tables(evaluation) == (
        "| Model    | AGIEval | GPT4All | TruthfulQA | Bigbench | Average |\n"
        "|----------|---------|---------|------------|----------|---------|\n"
        "| phixtral | 33.12   | 70.00   | 40.00      | 50.00    | 48.28   |\n"
        "\n"
        "| task       | version | examples | documents | metric       | value  | ± standard error |\n"
        "|------------|---------|----------|-----------|--------------|--------|------------------|\n"
        "| winogrande | 1.0     | 0        | 4         | acc          | 0.2500 | 0.1250           |\n"
        "| winogrande | 1.0     | 0        | 4         | acc (strict) | 0.5000 |                  |"
    )
