"""Runs tests in a process of their own, and notes what each takes and enters: python ci/mutant_worker.py ORDER.json

ci/mutants.py starts it in a copy of the tree, and with a folder before it in PYTHONPATH that has SITECUSTOMIZE where
functions are to be noted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Python runs a module of this name at its start, in child processes too. Each function of the product that is entered
# becomes a line with the test that runs, or the fixture that several tests share.
SITECUSTOMIZE = """
import os, sys, threading
entered, root = set(), os.environ["MUTANTS_ROOT"] + os.sep
def trace(frame, event, argument):
    code = frame.f_code
    if code not in entered:
        entered.add(code)
        name = code.co_filename
        if name.startswith(root):
            with open(os.environ["MUTANTS_TRACE"], "a") as file:
                label = os.environ.get("MUTANTS_LABEL", "")
                file.write(f"{label}\\t{name.removeprefix(root)}:{code.co_qualname}\\n")
threading.settrace(trace)
sys.settrace(trace)
"""


class Selection:
    """A plugin of pytest: runs the tests that are named, or all, and notes how long each takes."""

    def __init__(self, names: list[str] | None) -> None:
        self._names = None if names is None else set(names)
        self.seconds: dict[str, float] = {}
        self.fixtures: dict[str, list[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self._names is not None:
            items[:] = [item for item in items if item.nodeid in self._names]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.fixtures[item.nodeid] = list(getattr(item, "fixturenames", []))
        with _labelled(item.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
        if fixturedef.scope == "function":
            return (yield)
        with _labelled(f"fixture {fixturedef.argname}"):
            return (yield)


@contextmanager
def _labelled(label: str) -> Iterator[None]:
    before = os.environ.get("MUTANTS_LABEL", "")
    entered: set[object] = getattr(sys.modules.get("sitecustomize"), "entered", set())
    os.environ["MUTANTS_LABEL"] = label
    entered.clear()
    try:
        yield
    finally:
        os.environ["MUTANTS_LABEL"] = before
        entered.clear()


def work(order: Path) -> None:
    """Run pytest as `order` says, in a process of its own; its exit status is pytest's."""
    told = json.loads(order.read_text(encoding="utf-8"))
    selection = Selection(told["tests"])
    words = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--tb=no", *told["files"]]
    status = pytest.main(words, plugins=[selection])
    facts = {"seconds": selection.seconds, "fixtures": selection.fixtures}
    order.with_suffix(".done").write_text(json.dumps(facts), encoding="utf-8")
    sys.stdout.flush()
    os._exit(status)  # threads of libraries may wait


if __name__ == "__main__":
    work(Path(sys.argv[1]))
