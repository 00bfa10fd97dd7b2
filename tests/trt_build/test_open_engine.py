"""An engine directory that is opened and run: damage and false manifests are refused, and so is what does not fit."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.manifests import edit_manifest
from trt_build.errors import EngineError, SequenceError
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session


@pytest.fixture
def engine_copy(tmp_path, tiny_engine):
    return Path(shutil.copytree(tiny_engine, tmp_path / "copy"))


def test_a_damaged_engine_is_refused_naming_every_file(engine_copy):
    data = engine_copy / "model.onnx.data"
    raw = bytearray(data.read_bytes())
    raw[1000] ^= 1
    data.write_bytes(raw)
    (engine_copy / "genai_config.json").unlink()
    (engine_copy / "model.onnx").write_bytes((engine_copy / "model.onnx").read_bytes()[:-1])
    with pytest.raises(EngineError) as caught:
        open_engine(engine_copy)
    text = str(caught.value)
    assert "model.onnx.data: transformer.embd.wte.weight.codes (bytes 0 to 67584): found SHA-256" in text
    assert "genai_config.json: missing" in text
    assert "model.onnx: found" in text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"files": {}}, "files not listed: ['model.onnx'"),
        ({"max_sequence": "640"}, "max_sequence is '640', expected int"),
        ({"max_sequence": 641}, "max_sequence is 641, expected 1 to 640"),
        ({"max_batch": True}, "max_batch is True, expected int"),
        ({"expert_order": [0, 1, 2, 3, 3]}, "expected each of 5 experts once"),
        ({"expert_order": "abcde"}, "expert_order is 'abcde', expected"),
        ({"verification": 5}, "verification is 5, expected"),
        ({"provider": "rocm"}, "provider is 'rocm', expected one of cpu"),
        ({"architecture": {"family": "phixtral"}}, "architecture: keys missing or unknown: experts_per_token"),
        ({"colour": "red"}, "keys missing or unknown: colour"),
        ({"format_version": True}, "format version True, and this moeship reads 2, 3, 4 and 5"),
    ],
)
def test_a_manifest_that_lies_about_itself_is_refused(engine_copy, changes, text):
    edit_manifest(engine_copy, **changes)
    with pytest.raises(EngineError) as caught:
        open_engine(engine_copy)
    assert text in str(caught.value)


def test_a_manifest_may_not_name_files_outside_its_folder(engine_copy):
    files = json.loads((engine_copy / "engine.json").read_text())["files"]
    edit_manifest(engine_copy, files={**files, "../payload": files["model.onnx"]})
    with pytest.raises(EngineError, match=r"files outside the folder: \['../payload'\]"):
        open_engine(engine_copy)


def write_records(folder, records):
    """Replace weights.jsonl, and its digest in the manifest."""
    path = folder / "weights.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    files = json.loads((folder / "engine.json").read_text())["files"]
    files["weights.jsonl"] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit_manifest(folder, files=files)


def test_digests_that_leave_bytes_of_the_weights_out_are_refused(engine_copy):
    records = [json.loads(line) for line in (engine_copy / "weights.jsonl").read_text().splitlines()]
    size = (engine_copy / "model.onnx.data").stat().st_size
    start, *others = records[1]["regions"]
    write_records(engine_copy, [records[0], {**records[1], "regions": others}, *records[2:]])
    with pytest.raises(
        EngineError, match=f"leaves bytes {start['offset']} to {start['offset'] + start['bytes']} without"
    ):
        open_engine(engine_copy)
    [last] = [record for record in records if record["regions"][-1]["offset"] + record["regions"][-1]["bytes"] == size]
    write_records(engine_copy, [{**r, "regions": r["regions"][: -1 if r is last else None]} for r in records])
    with pytest.raises(EngineError, match=r"weights.jsonl covers \d+ bytes, the file has \d+"):
        open_engine(engine_copy)
    write_records(engine_copy, [{**records[0], "colour": "red"}])
    with pytest.raises(EngineError, match=r"weights.jsonl is malformed \(the top: keys missing or unknown: colour\)"):
        open_engine(engine_copy)


@pytest.mark.parametrize(("name", "digest"), [("model.onnx", None), ("model.onnx.data", "0" * 64)])
def test_only_the_weights_have_their_digests_elsewhere(engine_copy, name, digest):
    files = json.loads((engine_copy / "engine.json").read_text())["files"]
    edit_manifest(engine_copy, files={**files, name: {**files[name], "sha256": digest}})
    with pytest.raises(EngineError, match=f"files.{name}: a digest is {'not expected' if digest else 'missing'}"):
        open_engine(engine_copy)


def test_a_manifest_of_another_version_is_refused(engine_copy):
    edit_manifest(engine_copy, format_version=99)
    with pytest.raises(EngineError, match="format version 99, and this moeship reads 2, 3, 4 and 5; build it again"):
        open_engine(engine_copy)


def test_the_session_refuses_what_does_not_fit_and_keeps_working(tiny_engine):
    session = Session(open_engine(tiny_engine))
    cache = session.new_cache()
    with pytest.raises(SequenceError, match="found no tokens"):
        session.run(cache, [])
    with pytest.raises(SequenceError, match="token id 352 is outside its vocabulary of 352"):
        session.run(cache, [1, 352])
    with pytest.raises(SequenceError, match="token id -1 is outside"):
        session.run(cache, [-1])
    with pytest.raises(SequenceError, match="641 tokens after 0 exceed its context of 640"):
        session.run(cache, [1] * 641)
    assert np.isfinite(session.run(cache, [1] * 640)).all()
    with pytest.raises(SequenceError, match="1 tokens after 640 exceed"):
        session.run(cache, [1])


def test_a_cache_forgets_when_it_is_reset_and_two_do_not_mix(tiny_engine):
    session = Session(open_engine(tiny_engine))
    first, second = session.new_cache(), session.new_cache()
    expected = session.run(first, [5, 6, 7]).copy()
    session.run(second, [9, 9, 9, 9])
    assert np.abs(session.run(second, [5, 6, 7]) - expected).max() > 0.1
    first.shorten(0, 0)
    assert (session.run(first, [5, 6, 7]) == expected).all()
