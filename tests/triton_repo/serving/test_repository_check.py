"""What `serve` says of a repository before it starts anything."""

from __future__ import annotations

import pytest

from triton_repo.errors import RepositoryError
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.serving.repository_check import check_repository


@pytest.fixture
def repository(tmp_path, tiny_engine):
    for name in ("first", "second"):
        package_engine(PackageOptions(engine=tiny_engine, name=name, output=tmp_path / "repository"))
    return tmp_path / "repository"


def refusal(repository) -> str:
    with pytest.raises(RepositoryError) as caught:
        check_repository(repository)
    return str(caught.value)


def test_the_models_of_a_sound_repository_are_named(repository):
    assert check_repository(repository) == ("first", "second")


def test_an_absent_folder_and_one_without_models_are_refused(tmp_path, repository):
    assert "nowhere: no such folder; make one with: moeship package" in refusal(tmp_path / "nowhere")
    assert "found no model, expected folders with a config.pbtxt" in refusal(tmp_path)
    assert "found no model" in refusal(repository / "first")


def test_every_problem_of_every_model_is_reported(repository):
    config = repository / "first" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 1", "max_batch_size: ${batch}"))
    (repository / "second" / "1" / "engine" / "engine.json").unlink()
    (repository / "third").mkdir()
    text = refusal(repository)
    assert "first: reading" in text
    assert "Couldn't parse integer: $" in text
    assert "second: no engine at" in text
    assert "(engine.json is missing)" in text
    assert "third: no config.pbtxt" in text


def test_an_unknown_field_of_a_configuration_is_refused(repository):
    config = repository / "first" / "config.pbtxt"
    config.write_text(config.read_text() + "max_batchsize: 3\n")
    assert 'no field named "max_batchsize"' in refusal(repository)


def test_a_renamed_folder_and_a_missing_version_are_refused(repository):
    (repository / "first").rename(repository / "renamed")
    (repository / "second" / "1").rename(repository / "second" / "latest")
    text = refusal(repository)
    assert "renamed: its config.pbtxt has the name first" in text
    assert "second: no version folder such as second/1" in text


def test_models_of_other_makers_are_left_to_triton(repository):
    model = repository / "other"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text('name: "other"\nbackend: "onnxruntime"\nmax_batch_size: 4\n')
    assert check_repository(repository) == ("first", "other", "second")
