"""What `serve` says of a packaged model whose program another release of moeship wrote."""

from __future__ import annotations

import pytest

from triton_repo.contracts.model_parameters import MODEL_FILE
from triton_repo.errors import RepositoryError
from triton_repo.packaging.ensemble_package import MODELS_FOLDER
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.serving.program_check import program_problems
from triton_repo.serving.repository_check import check_repository

# What the program of the model without steps imported before triton_repo had folders.
EARLIER = """
import triton_python_backend_utils as pb_utils
from triton_repo.heartbeat import Heartbeat
from triton_repo.runtime.parameters import ModelParameters, read_workers
"""


@pytest.fixture
def problems(tmp_path):
    def of(program: str) -> list[str]:
        (tmp_path / MODEL_FILE).write_text(program)
        return program_problems("phixtral", tmp_path)

    return of


@pytest.mark.parametrize("program", sorted(MODELS_FOLDER.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_program_that_is_copied_finds_what_it_imports(problems, program):
    assert problems(program.read_text()) == []


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        (EARLIER, "triton_repo.heartbeat"),
        ("from triton_repo.contracts.wire import OUTPUTS, NO_SUCH", "triton_repo.contracts.wire.NO_SUCH"),
        ("def late():\n    from export.no_such import name", "export.no_such"),
    ],
)
def test_a_program_of_another_release_is_named_with_what_it_misses(problems, tmp_path, program, absent):
    assert problems(program) == [
        f"phixtral: it was packaged by another release of moeship: its {tmp_path.name}/model.py imports {absent}, "
        "which the installed moeship does not have; package it again"
    ]


@pytest.mark.parametrize("program", ["def (", "x = '\0'", "(" * 500])
def test_what_is_no_program_is_refused(problems, tmp_path, program):
    assert problems(program) == [f"phixtral: its {tmp_path.name}/model.py is not valid Python; package it again"]


def test_an_absent_program_is_refused(tmp_path):
    assert program_problems("phixtral", tmp_path) == [f"phixtral: no {tmp_path.name}/model.py; package it again"]


def test_a_repository_of_another_release_is_not_served_and_another_makers_program_is_not_looked_at(
    tmp_path, tiny_engine
):
    repository = tmp_path / "repository"
    package_engine(PackageOptions(engine=tiny_engine, name="phixtral", output=repository))
    (repository / "other" / "1").mkdir(parents=True)
    (repository / "other" / "config.pbtxt").write_text('name: "other" backend: "python"')
    (repository / "other" / "1" / MODEL_FILE).write_text(EARLIER)
    assert check_repository(repository) == ("other", "phixtral")
    (repository / "phixtral" / "1" / MODEL_FILE).write_text(EARLIER)
    with pytest.raises(RepositoryError, match="imports triton_repo.heartbeat, which the installed moeship does not"):
        check_repository(repository)
