"""What contributors are told: make's targets with their explanations, the hooks and the issue template."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_make_help_explains_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split()
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    explained = re.findall(r"^  make (\w+) +\S", done.stdout, re.M)
    assert sorted(explained) == sorted(targets)


def test_the_paths_of_make_quick_exist():
    words = re.search(r"^QUICK := ((?:.*\\\n)*.*)$", MAKEFILE, re.M)[1].replace("\\\n", " ").split()
    assert words
    assert [word for word in words if not (ROOT / word).exists()] == []


def test_the_hooks_run_what_ci_runs():
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
        for hook in repo["hooks"]
    ]
    workflow = yaml.safe_load((ROOT / "ci" / "build_engine.yml").read_text(encoding="utf-8"))
    in_ci = {step["run"] for step in workflow["jobs"]["cpu"]["steps"] if step.get("run", "").startswith("make ")}
    by_stage = {hook["stages"][0]: hook["entry"] for hook in hooks}
    assert {by_stage["pre-push"]} == in_ci
    assert re.search(r"^test: .*\bcheck\b", MAKEFILE, re.M), "make test begins with make check, the other hook"
    assert by_stage["pre-commit"] == "make check"


def test_the_issue_template_asks_for_a_report_that_there_is_a_command_for():
    template = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8"))
    asked = {field["attributes"]["label"] for field in template["body"] if "label" in field["attributes"]}
    assert "moeship doctor" in asked
    assert "doctor" in COMMANDS
