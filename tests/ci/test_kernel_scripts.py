"""ci/sanitize_kernels.sh and ci/valgrind_kernels.sh run the kernels' tests in a copy, without the rest of the tests."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import kernel_nodes
import pytest

TESTS = Path(__file__).parents[1]
CASES = re.findall(r'"(test_\w+\.py)::(\w+)', (TESTS.parent / "ci/valgrind_kernels.py").read_text())
FOLDER = TESTS / "trt_build/kernels"
SHARED = {path.stem for path in TESTS.glob("*.py")} - {"kernel_nodes"}


def functions(tree: ast.AST) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


FIXTURES = set(functions(ast.parse((TESTS / "conftest.py").read_text())))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_the_kernels_tests_need_kernel_nodes_alone(path):
    tree = ast.parse(path.read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    taken = {argument.arg for function in functions(tree).values() for argument in function.args.args}
    assert imported & SHARED == set()
    assert taken & FIXTURES == set()


@pytest.mark.parametrize(("file", "name"), CASES)
def test_valgrinds_cases_are_tests(file, name):
    assert name in functions(ast.parse((FOLDER / file).read_text()))


def test_there_are_cases_and_fixtures_to_look_for():
    assert len(CASES) >= 15
    assert {"tiny_engines", "served_phixtral"} <= FIXTURES
    assert "manifests" in SHARED


@pytest.mark.skipif(not any(map(shutil.which, kernel_nodes.COMPILERS)), reason="no C++ compiler")
def test_the_emulating_library_is_compiled_by_the_compiler_that_CXX_names(tmp_path, monkeypatch):  # noqa: N802
    """As ci/sanitize_kernels.sh names one. This one takes note of its words, and fails."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/words\nexit 1\n')
    compiler.chmod(0o755)
    for path in [TESTS.parent / name for name in ("trt_build/ort/kernels", "setup.py", "pyproject.toml", "README.md")]:
        copy = tmp_path / "clone" / path.relative_to(TESTS.parent)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
    monkeypatch.setattr(kernel_nodes, "ROOT", tmp_path / "clone")
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises((AssertionError, subprocess.CalledProcessError)):
        kernel_nodes.emulating_library.__wrapped__()
    assert "-DMOESHIP_EMULATED_CPU" in (tmp_path / "words").read_text()
