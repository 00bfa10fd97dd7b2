"""A sealed engine starts without hashing; one that was touched, moved or edited is hashed again."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from tests.manifests import read_values, write_values
from triton_repo.contracts.model_parameters import EngineInstance
from triton_repo.contracts.seal import is_sealed
from triton_repo.packaging import package, placing
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.runtime.single.service import Service
from trt_build.errors import EngineError
from trt_build.ort.engine import open_engine


@pytest.fixture
def engine(tmp_path, tiny_engine):
    options = PackageOptions(engine=tiny_engine, name="phixtral", output=tmp_path / "repository", copy=True)
    return package_engine(options).folder / "1" / "engine"


def flip(path, position):
    """Change one byte; the bytes in all stay as many."""
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_a_packaged_engine_is_loaded_without_reading_its_weights_for_digests(engine, monkeypatch):
    def fail(*_):
        raise AssertionError("hashed")

    monkeypatch.setattr("trt_build.engine_files.file_digest", fail)
    monkeypatch.setattr("trt_build.ort.engine.damaged_regions", fail)
    assert is_sealed(engine)
    Service.open(EngineInstance(folder=engine))


def test_an_engine_edited_after_packaging_is_refused(engine):
    flip(engine / "model.onnx.data", 1000)
    with pytest.raises(EngineError, match="found SHA-256"):
        Service.open(EngineInstance(folder=engine))


def test_an_engine_truncated_after_packaging_is_refused(engine):
    os.truncate(engine / "model.onnx.data", 1_000_000)
    with pytest.raises(EngineError, match="found 1000000 bytes"):
        Service.open(EngineInstance(folder=engine))


def test_an_engine_that_was_moved_is_hashed_again_and_served(engine, tmp_path):
    moved = shutil.copytree(engine.parent, tmp_path / "elsewhere") / "engine"
    assert not is_sealed(moved)
    Service.open(EngineInstance(folder=moved))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"model.onnx.data": [1, 2, 3]}', "[" * 10**5])
def test_a_seal_that_says_something_else_is_no_seal(engine, content):
    seal_of(engine).write_text(content)
    assert not is_sealed(engine)


def seal_of(engine):
    return engine.parent / "engine.seal.json"


@pytest.mark.parametrize(
    "change",
    [
        lambda noted: noted["engine.json"].append(0),
        lambda noted: noted["engine.json"].pop(),
        lambda noted: noted.update({"engine.json": [float(number) for number in noted["engine.json"]]}),
        lambda noted: noted.update({"engine.json": {"0": 1, "1": 2, "2": 3}}),
        lambda noted: noted.pop("tokenizer.json"),
        lambda noted: noted.update(other=noted["tokenizer.json"]),
        lambda noted: noted["tokenizer.json"].__setitem__(1, noted["tokenizer.json"][1] + 1),
    ],
)
def test_a_seal_that_is_not_of_each_file_in_full_is_no_seal(engine, change):
    noted = json.loads(seal_of(engine).read_text())
    change(noted)
    seal_of(engine).write_text(json.dumps(noted))
    assert not is_sealed(engine)


def test_a_seal_with_a_key_twice_is_no_seal(engine):
    text = seal_of(engine).read_text()
    seal_of(engine).write_text(text.replace("{", '{"engine.json": [1, 2, 3],', 1))
    assert not is_sealed(engine)


def test_an_empty_folder_is_not_sealed_by_an_empty_seal(tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine.seal.json").write_text("{}")
    assert not is_sealed(tmp_path / "engine")


def test_a_file_more_a_file_less_and_a_link_break_the_seal(engine, tmp_path):
    (engine / "stray").write_text("")
    assert not is_sealed(engine)
    (engine / "stray").unlink()
    assert is_sealed(engine)
    (engine / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert not is_sealed(engine)
    (engine / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    assert not is_sealed(engine)


@pytest.mark.parametrize("copy", [True, False])
def test_the_seal_notes_the_files_as_they_lie_in_the_repository(tmp_path, tiny_engine, copy):
    options = PackageOptions(engine=tiny_engine, name="m", output=tmp_path / "repository", copy=copy)
    engine = package_engine(options).folder / "1" / "engine"
    noted = json.loads(seal_of(engine).read_text())
    assert noted == {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino] for path in engine.iterdir()
    }
    assert is_sealed(engine)


@pytest.mark.parametrize("copy", [True, False])
def test_no_write_fits_between_the_check_and_the_seal(tmp_path, tiny_engine, monkeypatch, copy):
    """Whatever is written to a file after it was checked, before or after the seal, is seen at the next start."""
    source = shutil.copytree(tiny_engine, tmp_path / "source")
    write_seal = package.write_seal

    def late(engine, states):
        flip(engine / "model.onnx.data", 1000)
        write_seal(engine, states)

    monkeypatch.setattr("triton_repo.packaging.package.write_seal", late)
    options = PackageOptions(engine=source, name="m", output=tmp_path / "repository", copy=copy)
    engine = package_engine(options).folder / "1" / "engine"
    assert not is_sealed(engine)
    with pytest.raises(EngineError, match="found SHA-256"):
        Service.open(EngineInstance(folder=engine))


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("name", ["model.onnx.data", "tokenizer.json", "weights.jsonl"])
def test_a_damaged_engine_is_refused_while_it_is_placed_and_nothing_is_left(tmp_path, tiny_engine, copy, name):
    source = shutil.copytree(tiny_engine, tmp_path / "source")
    flip(source / name, 100)
    options = PackageOptions(engine=source, name="m", output=tmp_path / "repository", copy=copy)
    with pytest.raises(EngineError, match=rf"not those of the build; build it again:\n  - {name}.*: .*found SHA-256"):
        package_engine(options)
    assert not (tmp_path / "repository").exists()


def test_a_link_that_changes_while_it_is_checked_is_refused(tmp_path, tiny_engine, monkeypatch):
    """Behind the place that was hashed already, with its time put back."""
    source = shutil.copytree(tiny_engine, tmp_path / "source")
    data, check = source / "model.onnx.data", placing._check

    def checking(descriptor, made, regions):
        found = check(descriptor, made, regions)
        if len(regions) > 1:
            facts = data.stat()
            flip(data, 0)
            os.utime(data, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        return found

    monkeypatch.setattr(placing, "_check", checking)
    options = PackageOptions(engine=source, name="m", output=tmp_path / "repository")
    with pytest.raises(EngineError, match=r"model.onnx.data: it changed while it was checked"):
        package_engine(options)
    assert not (tmp_path / "repository").exists()


def test_an_engine_may_be_linked_into_two_repositories_at_once(tmp_path, tiny_engine, monkeypatch):
    check = placing._check

    def checking(descriptor, made, regions):
        (tmp_path / f"{len(list(tmp_path.iterdir()))}").hardlink_to(tiny_engine / "model.onnx.data")
        return check(descriptor, made, regions)

    monkeypatch.setattr(placing, "_check", checking)
    package = package_engine(PackageOptions(engine=tiny_engine, name="m", output=tmp_path / "repository"))
    assert is_sealed(package.folder / "1" / "engine")


def test_a_copy_is_what_was_hashed_where_the_source_changes_afterwards(tmp_path, tiny_engine, monkeypatch):
    source = shutil.copytree(tiny_engine, tmp_path / "source")
    check = placing._check

    def checking(descriptor, made, regions):
        found = check(descriptor, made, regions)
        if len(regions) > 1:
            flip(source / "model.onnx.data", 5000)
        return found

    monkeypatch.setattr(placing, "_check", checking)
    options = PackageOptions(engine=source, name="m", output=tmp_path / "repository", copy=True)
    engine = package_engine(options).folder / "1" / "engine"
    assert is_sealed(engine)
    open_engine(engine)


def test_an_engine_json_that_is_exchanged_while_it_is_packaged_is_refused(tmp_path, tiny_engine, monkeypatch):
    source = shutil.copytree(tiny_engine, tmp_path / "source")
    place = placing._place

    def placed(path, target, regions, *, copy):
        if path.name == "engine.json":
            values = read_values(source)
            values["files"]["tokenizer.json"]["sha256"] = "0" * 64
            write_values(source, values)
        return place(path, target, regions, copy=copy)

    monkeypatch.setattr(placing, "_place", placed)
    with pytest.raises(EngineError, match=r"its engine.json changed while it was packaged; package it again"):
        package_engine(PackageOptions(engine=source, name="m", output=tmp_path / "repository"))
    assert not (tmp_path / "repository").exists()
