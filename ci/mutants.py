"""Change the product in one place at a time, and see whether its nearest tests notice.

    python ci/mutants.py --seed 11 --count 300 --results mutants.jsonl --seconds 240
    python ci/mutants.py --seed 11 --count 300 --results mutants.jsonl --report

A mutant is one change: `<` for `<=`, `+` for `-`, a constant that is one more, a condition negated, `and` for `or`, a
statement or a keyword argument left out. Each is applied in a copy of the tree and judged by the test files that are
nearest to the changed file in imports, the same-named first, until one test fails. Of these files only the tests run
that entered the changed function when they ran without a mutant, the quick ones before the slow ones. Where no test
entered it, as for what is outside of functions, whole files run. What has no meaning of its own is not changed:
docstrings, annotations, asserts, messages of errors and of logs.

Mutants are taken in an order that the seed decides. A run ends after --seconds; the next one goes on where it ended,
since every result is a line of --results. So is what was seen of each test file, which must pass without a mutant.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mutant_finder import Finder, Mutant
from mutant_tests import ROOT, distances_to
from mutant_worker import SITECUSTOMIZE

Stage = tuple[list[str], list[str] | None]
PATHS = ("export", "trt_build", "triton_repo/runtime")
MOST_TEST_FILES = 12  # for one mutant
LONGEST_FILE_S = 30.0  # of a test file without a mutant; longer ones are left out
NO_TESTS = 5  # exit status of pytest
MOST_BYTES = 8 << 30  # memory of a process that a mutant may take


def mutants_of(paths: list[str], skipped: list[str], seed: int) -> list[Mutant]:
    """Every mutant of the Python files under `paths`, in the seed's order."""
    files = {path for place in paths for path in (ROOT / place, *(ROOT / place).rglob("*.py")) if path.is_file()}
    names = sorted(path.relative_to(ROOT).as_posix() for path in files)
    found = [
        mutant
        for name in names
        if name not in skipped
        for mutant in Finder(name, (ROOT / name).read_text(encoding="utf-8")).found
    ]
    # Not shuffled: a line more in one file would change the place of every mutant.
    return sorted(found, key=lambda mutant: hashlib.sha256(f"{seed} {mutant.key}".encode()).digest())


@dataclass(frozen=True)
class Seen:
    """What was seen of one test file without a mutant. `seconds`: of the whole file, infinite if it takes longer than
    was waited for; `tests`: seconds of each; `entered`: place of a function -> tests that entered it; `digest`: of the
    test file."""

    seconds: float
    tests: dict[str, float]
    entered: dict[str, list[str]]
    digest: str

    def is_of(self, path: Path) -> bool:
        """Whether the test file is the one that was seen. One that took too long is taken to take as long again."""
        return math.isinf(self.seconds) or self.digest == _digest(path)


class Results:
    """The lines of --results. Several runs may append to the same file."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self.seen: dict[str, Seen] = {}
        self.mutants: dict[str, dict[str, Any]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the lines that were appended since the last time."""
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        for record in map(json.loads, lines[self._read :]):
            if "file" in record:
                self.seen[record["file"]] = Seen(**record["seen"])
            elif "mutant" in record:
                self.mutants[record["mutant"]] = record
        self._read = len(lines)

    def add(self, **record: Any) -> None:  # noqa: ANN401 - JSON values
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def copy_of_the_tree(folder: Path) -> None:
    """Copy what git tracks, what it would track, and the compiled kernels."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for path in (*map(Path, names), *(path.relative_to(ROOT) for path in (ROOT / "trt_build").rglob("*.so"))):
        if (ROOT / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, folder / path)


def _limits() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))


def run_tests(tree: Path, files: list[str], tests: list[str] | None, limit_s: float, **more: str) -> tuple[str, str]:
    """The outcome of tests in a copy of the tree ("passed", "failed" or "timeout"), and the first failure. None for
    `tests`: all tests of the files. `more`: variables of the environment."""
    shutil.rmtree(tree / "tmp", ignore_errors=True)
    (tree / "tmp").mkdir()
    (tree / "order.json").write_text(json.dumps({"files": files, "tests": tests}), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tree), "TMPDIR": str(tree / "tmp"), **more}
    with subprocess.Popen(
        [sys.executable, tree / "ci" / "mutant_worker.py", "order.json"], cwd=tree, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, preexec_fn=_limits,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return "timeout", ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    failures = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return ("passed" if process.returncode in (0, NO_TESTS) else "failed"), (failures or [output[-200:]])[0]


def watch(tree: Path, test_file: str) -> Seen:
    """Run one test file without a mutant, and note which tests enter which functions."""
    place = tree / "trace"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    path = f"{place}{os.pathsep}{tree}"
    lines = place / "lines"
    lines.write_text("")
    began = time.monotonic()
    outcome, failure = run_tests(
        tree, [test_file], None, LONGEST_FILE_S, PYTHONPATH=path, MUTANTS_TRACE=str(lines), MUTANTS_ROOT=str(tree)
    )
    if outcome != "passed":
        print(f"{test_file} is left out: {outcome} without a mutant {failure}", flush=True)
        return Seen(math.inf, {}, {}, _digest(tree / test_file))
    facts = json.loads((tree / "order.done").read_text(encoding="utf-8"))
    users: dict[str, list[str]] = {}
    for test, names in facts["fixtures"].items():
        for label in (test, *(f"fixture {name}" for name in names)):
            users.setdefault(label, []).append(test)
    entered: dict[str, set[str]] = {}
    for line in lines.read_text(encoding="utf-8").splitlines():
        label, _, function = line.partition("\t")
        entered.setdefault(function, set()).update(users.get(label, ()))
    found = {function: sorted(tests) for function, tests in entered.items()}
    return Seen(round(time.monotonic() - began, 2), facts["seconds"], found, _digest(tree / test_file))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def chosen_tests(function: str, seen: Mapping[str, Seen], longest_s: float) -> tuple[list[str], list[str]]:
    """Files, and their tests that enter the function: the quick ones first, as many as `longest_s` allows."""
    entering = sorted(
        (facts.tests[test], test, file) for file, facts in seen.items() for test in facts.entered.get(function, ())
    )
    chosen, spent = [], 0.0
    for seconds, test, file in entering:
        if spent + seconds <= longest_s:
            spent += seconds
            chosen.append((file, test))
    return sorted({file for file, _ in chosen}), [test for _, test in chosen]


def stages_of(tree: Path, mutant: Mutant, results: Results, longest_s: float, most_unseen: int) -> Iterator[Stage]:
    """Files and tests in the order in which they run. First the tests that are known to enter the function, of the
    same-named file, of the others that are near and of any; then those of near files that were not seen yet or have
    changed. If there are none, the near files as a whole, with None for the tests."""
    distances = distances_to(mutant.path)
    nearest = sorted(distances, key=distances.__getitem__)[:MOST_TEST_FILES]
    same = [name for name in nearest if distances[name][0] == 0]
    known, found = dict(results.seen), False
    far = [name for name in known if name not in nearest]
    for names in (same, [name for name in nearest if name not in same], far):
        files, tests = chosen_tests(mutant.function, {name: known[name] for name in names if name in known}, longest_s)
        if tests:
            found = True
            yield files, tests
    unseen = [name for name in nearest if not (name in known and known[name].is_of(tree / name))]
    for name in unseen[: most_unseen if found else None]:
        results.refresh()  # another run may have seen it meanwhile
        if not (name in results.seen and results.seen[name].is_of(tree / name)):
            results.add(file=name, seen=asdict(watch(tree, name)))
            results.refresh()
        files, tests = chosen_tests(mutant.function, {name: results.seen[name]}, longest_s)
        if tests:
            found = True
            yield files, tests
    if not found:
        files, spent = [], 0.0
        for name in filter(results.seen.get, nearest):
            if spent + results.seen[name].seconds <= longest_s:
                spent += results.seen[name].seconds
                files.append(name)
        if files:  # pytest takes no files for all files
            yield sorted(files, key=lambda name: results.seen[name].seconds), None


@contextmanager
def applied(tree: Path, mutant: Mutant) -> Iterator[None]:
    """The copy of the tree with the mutant in it."""
    path = tree / mutant.path
    original, facts = path.read_bytes(), path.stat()
    path.write_bytes(original[: mutant.begin] + mutant.after.encode() + original[mutant.end :])
    # A compiled file is taken for that of a source with the same size and second of writing.
    os.utime(path, (facts.st_atime, facts.st_mtime + random.randrange(1, 10**8)))
    try:
        yield
    finally:
        path.write_bytes(original)
        os.utime(path, (facts.st_atime, facts.st_mtime))


def judge(tree: Path, mutant: Mutant, results: Results, longest_s: float, most_unseen: int) -> tuple[str, str]:
    """Whether a mutant was "killed" or "survived", and by what or what."""
    judges: list[str] = []
    for files, tests in stages_of(tree, mutant, results, longest_s, most_unseen):
        with applied(tree, mutant):
            outcome, failure = run_tests(tree, files, tests, 30 + 4 * longest_s)
        if outcome != "passed":
            return "killed", failure or outcome
        judges.append(f"{'all' if tests is None else len(tests)} tests of {' '.join(files)}")
    return "survived", "; ".join(judges) or "no tests"


def report(mutants: list[Mutant], results: Results) -> None:
    """Print every survivor, with its line in the tree as it is, and the counts."""
    judged = [(mutant, results.mutants[mutant.key]["outcome"]) for mutant in mutants if mutant.key in results.mutants]
    survivors = [mutant for mutant, outcome in judged if outcome == "survived"]
    for mutant in sorted(survivors, key=lambda mutant: (mutant.path, mutant.line)):
        print(f"survived {mutant.path}:{mutant.line}: {mutant.shown}")
    killed = len(judged) - len(survivors)
    print(f"{killed} of {len(judged)} killed ({100 * killed / max(1, len(judged)):.1f} %)")


def main() -> None:
    """Judge mutants until the time is over, or print the results."""
    parser = argparse.ArgumentParser(description="Change the product in one place, and see whether its tests notice.")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument(
        "--results", type=Path, default=Path("mutants.jsonl"), help="JSONL file that results are appended to"
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="no mutant begins after this")
    parser.add_argument("--longest", type=float, default=15.0, help="seconds of all tests for one mutant")
    parser.add_argument(
        "--unseen", type=int, default=MOST_TEST_FILES, help="test files to watch for a mutant that known tests pass"
    )
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="I N: of N runs side by side, the I-th")
    parser.add_argument("--paths", nargs="+", default=PATHS, help="folders or files of the product")
    parser.add_argument("--skip", nargs="*", default=[], help="files to leave alone")
    parser.add_argument("--again", action="store_true", help="judge those that survived once more")
    parser.add_argument("--report", action="store_true", help="print what is known and end")
    given = parser.parse_args()
    began = time.monotonic()
    mutants = mutants_of(list(given.paths), given.skip, given.seed)[: given.count]
    results = Results(given.results)
    if given.report:
        return report(mutants, results)
    with tempfile.TemporaryDirectory(prefix="moeship-mutants-") as folder:
        tree = Path(folder)
        copy_of_the_tree(tree)
        for mutant in mutants[given.part[0] :: given.part[1]]:
            results.refresh()
            known = results.mutants.get(mutant.key, {}).get("outcome")
            if known is not None and not (given.again and known == "survived"):
                continue
            if time.monotonic() - began > given.seconds:
                break
            since = time.monotonic()
            outcome, by = judge(tree, mutant, results, given.longest, given.unseen)
            results.add(mutant=mutant.key, outcome=outcome, by=by, seconds=round(time.monotonic() - since, 1))
            print(f"{outcome} {mutant.path}:{mutant.line}: {mutant.shown} ({by})", flush=True)
    return None


if __name__ == "__main__":
    main()
