"""A sealed engine starts without hashing; one that was touched, moved or edited is hashed again."""

from __future__ import annotations

import os
import shutil

import pytest

from triton_repo.package import PackageOptions, package_engine
from triton_repo.runtime.service import Service
from triton_repo.seal import is_sealed
from trt_build.errors import EngineError


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

    monkeypatch.setattr("trt_build.engine.file_digest", fail)
    monkeypatch.setattr("trt_build.engine.damaged_regions", fail)
    assert is_sealed(engine)
    Service.open(engine, threads=1)


def test_an_engine_edited_after_packaging_is_refused(engine):
    flip(engine / "model.onnx.data", 1000)
    with pytest.raises(EngineError, match="found SHA-256"):
        Service.open(engine, threads=1)


def test_an_engine_truncated_after_packaging_is_refused(engine):
    os.truncate(engine / "model.onnx.data", 1_000_000)
    with pytest.raises(EngineError, match="found 1000000 bytes"):
        Service.open(engine, threads=1)


def test_an_engine_that_was_moved_is_hashed_again_and_served(engine, tmp_path):
    moved = shutil.copytree(engine.parent, tmp_path / "elsewhere") / "engine"
    assert not is_sealed(moved)
    Service.open(moved, threads=1)


@pytest.mark.parametrize("content", ["", "{", '{"model.onnx.data": [1, 2, 3]}'])
def test_a_seal_that_says_something_else_is_no_seal(engine, content):
    (engine.parent / "engine.seal.json").write_text(content)
    assert not is_sealed(engine)
