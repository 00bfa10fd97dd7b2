"""Finds the test files that are near a file of the product, by what they import (ci/mutants.py)."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("export", "trt_build", "triton_repo", "clients", "cli")
# Tests that start servers, of other folders' subjects, or of the files' own shape.
FAR_TESTS = ("tests/benchmarks", "tests/ci", "tests/triton_repo/live", "tests/test_", "tests/clients/test_live")
ENDS = ("", "/__init__")  # of a module's file


@cache
def imports_of(path: Path) -> frozenset[Path]:
    """The files of the project that a file imports, also inside its functions, and each conftest.py whose fixtures it
    uses."""
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(PACKAGES):
            names |= {node.value, node.value.rpartition(".")[0]}  # a module to run; what monkeypatch.setattr is given
    places = [name.replace(".", "/") for name in names if all(part.isidentifier() for part in name.split("."))]
    files = [ROOT / f"{folder}{place}{end}.py" for place in places for folder in ("", "tests/") for end in ENDS]
    if "iter_modules(__path__)" in path.read_text(encoding="utf-8"):
        files += path.parent.glob("*.py")
    asked = {
        argument.arg for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for argument in node.args.args
    }
    above = [folder / "conftest.py" for folder in path.parents if folder.is_relative_to(ROOT / "tests")]
    files += [file for file in above if file != path and file.is_file() and asked & _functions(file)]
    return frozenset(file for file in files if file.is_file())


@cache
def _functions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@cache
def distances_to(path: str) -> dict[str, tuple[int, int, str]]:
    """How near each test file is to a product file: same name, then steps of imports, then folders in common."""
    found = {}
    wanted = ROOT / path
    for test in sorted((ROOT / "tests").rglob("test_*.py")):
        name = test.relative_to(ROOT).as_posix()
        if name.startswith(FAR_TESTS):
            continue
        seen, edge, steps = {test}, {test}, 0
        while edge and wanted not in edge:
            edge = {other for file in edge for other in imports_of(file)} - seen
            seen |= edge
            steps += 1
        if edge:
            parts = set(Path(path).parts[:-1])
            same = steps == 1 and test.stem == f"test_{wanted.stem}"
            found[name] = (0 if same else steps, -len(parts & set(Path(name).parts)), name)
    return found
