"""Tasks of lm_eval whose data sets come from a hub: one on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hub_standin import hub_of

ROOT = Path(__file__).parents[3]
ARC = Path(str(files("lm_eval"))) / "tasks" / "arc" / "arc_easy.yaml"
SPLITS = ("train", "validation", "test")
CARD = "\n".join(
    ["---", "configs:", "- config_name: ARC-Easy", "  data_files:"]
    + [f"  - split: {split}\n    path: {split}.parquet" for split in SPLITS]
    + ["---", "# Six questions"]
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with the data set of arc_easy, of six questions."""
    folder = tmp_path_factory.mktemp("arc")
    choices = {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]}
    for split in SPLITS:
        rows = [
            {"id": f"{split}{n}", "question": f"Which is number {n}?", "choices": choices, "answerKey": "ABCD"[n % 4]}
            for n in range(6)
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
    (folder / "README.md").write_text(CARD)
    with hub_of({"datasets/allenai/ai2_arc": folder}) as hub:
        yield hub


def run(hub, home, *words, offline="0"):
    """`moeship eval` in a process of its own, whose hub is this one."""
    return subprocess.run(
        [sys.executable, "-m", "cli.main", "eval", *map(str, words)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **hub.environment(home), "HF_HUB_OFFLINE": offline},
    )  # fmt: skip


@pytest.fixture
def arc_alone(tmp_path):
    """A folder with lm_eval's arc_easy under another name: found there, the names of all tasks need not be read, which
    takes ten seconds."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "arc.yaml").write_text(f"include: {ARC}\ntask: arc_alone\n")
    return tmp_path / "tasks"


def test_a_data_set_is_loaded_once_and_then_kept(phixtral, hub, arc_alone, tmp_path):
    words = (phixtral.engine, "--include-path", arc_alone, "--tasks", "arc_alone", "--json")
    first = run(hub, tmp_path / "home", *words)
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    assert found["num_documents"]["arc_alone"] == {"original": 6, "effective": 6}
    assert 0 <= found["results"]["arc_alone"]["acc,none"] <= 1
    assert "test.parquet" in hub.downloads
    again = run(hub, tmp_path / "home", *words, offline="1")
    assert json.loads(again.stdout)["results"] == found["results"]
    nothing = run(hub, tmp_path / "another-home", *words, offline="1")
    assert nothing.returncode == 2
    assert "its data set allenai/ai2_arc (ARC-Easy) cannot be loaded" in nothing.stderr.splitlines()[-1]


def test_a_gated_data_set_is_one_clear_error(phixtral, hub, arc_alone, tmp_path):
    hub.gated = {"datasets/allenai/ai2_arc"}
    try:
        done = run(hub, tmp_path / "home", phixtral.engine, "--include-path", arc_alone, "--tasks", "arc_alone")
    finally:
        hub.gated = set()
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "EvaluationError: loading the task arc_alone: its data set allenai/ai2_arc (ARC-Easy) cannot"
    )
    assert "a gated one needs a token" in last


def test_a_name_that_lm_eval_lacks_gets_those_that_are_near(phixtral, hub, tmp_path):
    done = run(hub, tmp_path / "home", phixtral.engine, "--tasks", "helaswag")
    assert (done.returncode, done.stdout) == (2, "")
    assert "looking for the task 'helaswag': lm_eval has none of that name; did you mean hellaswag," in done.stderr
    assert "A task of your own needs --include-path DIR." in done.stderr
