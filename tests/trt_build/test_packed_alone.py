"""Engines of format 2, which hold the packed form of a weight alone, as ONNX Runtime 1.31 took it.

They are made here from engines of the present format: the codes lie over their own blob, the scales point to NaN, the
key is that of what packing those bytes gives, and the kernels' layout is SHA-256 of the file that 1.31 saved.
"""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import onnx
import pytest

from export.onnx_graph import packing
from export.onnx_graph.packing import QuantizedWeight
from tests.mixtral_checkpoints import write_mixtral_checkpoint
from trt_build.build_engine import BuildOptions, build_engine
from trt_build.engine import open_engine
from trt_build.errors import EngineError
from trt_build.ort.packed_alone import unpacked_weights
from trt_build.ort.session import ScoringSession, Session

PROMPT = [11, 5, 300, 42, 7, 8, 9, 150]
OPERANDS = {"MatMulNBits": [(1, 2)], "QMoE": [(2, 3), (5, 6)]}


def logits(folder):
    session = Session(open_engine(folder))
    cache = session.new_cache()
    return [session.run(cache, ids).copy() for ids in (PROMPT, [3], [99])]


def as_format_2(engine, folder):
    """A copy of an engine with the packed form alone."""
    shutil.copytree(engine, folder)
    manifest = json.loads((folder / "engine.json").read_text())
    with (folder / "model.onnx.data").open("r+b") as data:
        data.truncate(manifest["resident_bytes"])
        data.seek(0, 2)
        nan_start = data.tell()
        nan_bytes = max_scales_bytes(folder)
        data.write(np.full(nan_bytes // 4, np.nan, np.float32).tobytes())
    for path in folder.glob("model*.onnx"):
        lay_over_blobs(path, nan_start, folder)
    records = [json.loads(line) for line in (folder / "weights.jsonl").read_text().splitlines()]
    for record in records:
        record["regions"] = [region for region in record["regions"] if region["offset"] < nan_start]
    nan = {"name": "unread_scales", "offset": nan_start, "bytes": nan_bytes}
    nan["sha256"] = hashlib.sha256((folder / "model.onnx.data").read_bytes()[nan_start:]).hexdigest()
    records.append({"part": "unread_scales", "sources": {}, "regions": [nan], "key": None})
    (folder / "weights.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    del manifest["resident_bytes"], manifest["tokenizer"], manifest["kernels"]
    manifest.pop("digest", None)
    manifest |= {"format_version": 2, "kernel_layout": layout_of_1_31((folder / "kernels.onnx").read_bytes(), folder)}
    write_manifest(folder, manifest)
    return folder


def write_manifest(folder, manifest):
    manifest["files"] = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": None if path.suffix == ".data" else hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.iterdir())
        if path.name != "engine.json"
    }
    (folder / "engine.json").write_text(json.dumps(manifest, indent=2) + "\n")


def packed_tensors(model):
    """Node, codes and scales of every packed weight."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for codes, scales in OPERANDS.get(node.op_type, []):
            if any(entry.key == "prepacked_0" for entry in tensors[node.input[codes]].external_data):
                yield node, tensors[node.input[codes]], tensors[node.input[scales]]


def max_scales_bytes(folder):
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    return max(4 * int(np.prod(scales.dims)) for _, _, scales in packed_tensors(model))


def lay_over_blobs(path, nan_start, folder):
    model = onnx.load(str(path), load_external_data=False)
    data = (folder / "model.onnx.data").read_bytes()
    for node, codes, scales in packed_tensors(model):
        values = {attribute.name: attribute.i for attribute in node.attribute}
        weight = QuantizedWeight(
            operator=node.op_type, codes=tuple(codes.dims), scales=tuple(scales.dims),
            bits=values["bits"] if node.op_type == "MatMulNBits" else values["expert_weight_bits"],
            block_size=values["block_size"], accuracy_level=values["accuracy_level"],
        )  # fmt: skip
        blobs = next(entry.value for entry in codes.external_data if entry.key == "prepacked_0").partition("|")[2]
        start = int(blobs.split(";")[0])
        content = np.frombuffer(data[start : start + weight.codes_bytes], np.uint8).reshape(weight.codes)
        (folder.parent / "given").write_bytes(content.tobytes() + np.full(weight.scales, np.nan, np.float32).tobytes())
        with packing.packed(weight, folder.parent / "given", 0, weight.codes_bytes, folder.parent) as over_blob:
            operator, digits = over_blob.key.split("+")
        place(codes, start, weight.codes_bytes, f"{operator}+{int(digits)}|{blobs}")
        place(scales, nan_start, weight.scales_bytes)
    path.write_bytes(model.SerializeToString())


def place(tensor, offset, length, packed=None):
    del tensor.external_data[:]
    entries = {"location": "model.onnx.data", "offset": offset, "length": length, "prepacked_0": packed}
    for key, value in entries.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))


def layout_of_1_31(probe, scratch):
    """SHA-256 of what 1.31 saved: each initializer and its blobs one after the other, the next at a multiple of 8."""
    folder = scratch.parent / "probe"
    folder.mkdir()
    packing.save_with_packed_forms(probe, folder / "packed.bin", folder)
    data, written = (folder / "packed.bin").read_bytes(), b""
    for tensor in onnx.load(str(folder / "packed.onnx"), load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        written += bytes(-len(written) % 8)
        blobs = [blob.split(";")[:2] for blob in entries.get("prepacked_0", "").split("|")[1:]]
        for offset, size in [(entries["offset"], entries["length"]), *blobs]:
            written += data[int(offset) :][: int(size)]
    shutil.rmtree(folder)
    return hashlib.sha256(written).hexdigest()


@pytest.fixture(scope="module")
def packed_alone(tmp_path_factory, tiny_engines):
    made = {}

    def engine(precision):
        if precision not in made:
            made[precision] = as_format_2(tiny_engines(precision), tmp_path_factory.mktemp(precision) / "engine")
        return made[precision]

    return engine


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_an_engine_with_the_packed_form_alone_gives_the_same_logits_bit_for_bit(packed_alone, tiny_engines, precision):
    engine = open_engine(packed_alone(precision))
    assert engine.is_packed_alone
    for found, expected in zip(logits(engine.folder), logits(tiny_engines(precision)), strict=True):
        np.testing.assert_array_equal(found, expected)
    scored, routed = ScoringSession(engine).run(PROMPT)
    expected, expected_routing = ScoringSession(open_engine(tiny_engines(precision))).run(PROMPT)
    np.testing.assert_array_equal(scored, expected)
    np.testing.assert_array_equal(routed, expected_routing)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_codes_and_scales_are_those_of_the_portable_engine(packed_alone, tiny_engines, precision):
    found = unpacked_weights(packed_alone(precision) / "model.onnx")
    model = onnx.load(str(tiny_engines(precision, portable=True) / "model.onnx"))
    expected = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert len(found) == 2 * len(list(packed_tensors(onnx.load(str(packed_alone(precision) / "model.onnx"),
                                                               load_external_data=False))))  # fmt: skip
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name])


def test_odd_rows_and_swiglu_experts_are_unpacked_too(tmp_path):
    sizes = {"hidden_size": 96, "ffn_size": 64, "head_dim": 32}
    source = write_mixtral_checkpoint(tmp_path / "source", seed=1, **sizes)
    built = build_engine(BuildOptions(checkpoint=str(source), output=tmp_path / "built", precision="int4"))
    folder = as_format_2(built.folder, tmp_path / "old")
    for found, expected in zip(logits(folder), logits(built.folder), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_installed_runtimes_own_file_is_known_too(packed_alone, tmp_path):
    """Such an engine was made with the format of 1.31 and a later ONNX Runtime."""
    folder = shutil.copytree(packed_alone("int8"), tmp_path / "engine")
    packing.save_with_packed_forms((folder / "kernels.onnx").read_bytes(), tmp_path / "packed.bin", tmp_path)
    manifest = json.loads((folder / "engine.json").read_text())
    manifest["kernel_layout"] = hashlib.sha256((tmp_path / "packed.bin").read_bytes()).hexdigest()
    write_manifest(folder, manifest)
    Session(open_engine(folder))


def test_an_engine_of_other_kernels_is_refused_before_it_is_unpacked(packed_alone, tmp_path, monkeypatch):
    folder = shutil.copytree(packed_alone("int8"), tmp_path / "engine")
    write_manifest(folder, {**json.loads((folder / "engine.json").read_text()), "kernel_layout": "0" * 64})
    monkeypatch.setattr("trt_build.ort.device.unpacked_weights", None)
    with pytest.raises(EngineError, match=r"packed for the kernels of another CPU .* or anywhere with --portable"):
        Session(open_engine(folder))


def test_a_packed_form_that_these_kernels_do_not_make_is_refused(packed_alone, tmp_path):
    """A sum in the packed form that goes with none of its codes."""
    folder = shutil.copytree(packed_alone("int4"), tmp_path / "engine")
    model = onnx.load(str(folder / "model.0.onnx"), load_external_data=False)
    _, codes, _ = next(packed_tensors(model))
    entries = {entry.key: int(entry.value) for entry in codes.external_data if entry.key in ("offset", "length")}
    with (folder / "model.onnx.data").open("r+b") as data:
        data.seek(entries["offset"] + -(-entries["length"] // 64) * 64 + 1)
        data.write(b"\x55")
    with pytest.raises(EngineError, match=r"pack a MatMulNBits weight of 4 bits otherwise .* build the engine again"):
        Session(open_engine(folder, check_digests=False))
