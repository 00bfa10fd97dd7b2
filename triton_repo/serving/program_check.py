"""Whether the program of a packaged model finds what it imports: a version's folder in, what is wrong with it out.

Packaging copies a file of `triton_repo/models` into the repository. The copy imports the moeship that is installed
where it is served, and this may be another release than the one that packaged it. Modules move between releases. They
are not kept under their earlier names, since packaging again takes seconds: an engine's files are linked, not copied.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

from export.errors import ConfigError
from export.files.reading import read_text
from triton_repo.contracts.model_parameters import MODEL_FILE

MAX_PROGRAM_BYTES = 1 << 20
PACKAGES = ("export", "trt_build", "triton_repo")  # moeship's packages that a model imports


def program_problems(name: str, version: Path) -> list[str]:
    """What is wrong with the program in one version's folder of the model `name`, which moeship packaged."""
    path = version / MODEL_FILE
    if not path.exists():
        return [f"{name}: no {version.name}/{MODEL_FILE}; package it again"]
    try:
        absent = list(_absent_imports(read_text(path, "a model's program", most=MAX_PROGRAM_BYTES)))
    except ConfigError as error:
        return [f"{name}: {error}; package it again"]
    except (SyntaxError, ValueError, RecursionError):
        return [f"{name}: its {version.name}/{MODEL_FILE} is not valid Python; package it again"]
    if not absent:
        return []
    return [
        f"{name}: it was packaged by another release of moeship: its {version.name}/{MODEL_FILE} imports {absent[0]}, "
        "which the installed moeship does not have; package it again"
    ]


def _absent_imports(program: str) -> Iterator[str]:
    """The modules and names that a program imports from moeship's packages and that the installed ones do not have.
    Raises SyntaxError, ValueError and RecursionError for a text that is no program."""
    for node in ast.walk(ast.parse(program)):
        if not isinstance(node, ast.ImportFrom) or not node.module or node.module.partition(".")[0] not in PACKAGES:
            continue
        try:
            module = importlib.import_module(node.module)
        except ImportError:
            yield node.module
            continue
        yield from (f"{node.module}.{alias.name}" for alias in node.names if not hasattr(module, alias.name))
