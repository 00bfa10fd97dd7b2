"""Engines of formats 2 and 3, whose weights are packed for ONNX Runtime's CPU kernels: the numbers that they gave.

Those of format 3 are kept in engines/format_3.tar.xz, as the moeship of that time built them of a random phixtral.
Those of format 2, which hold the packed form of this machine's kernels alone, are made of them here: ONNX Runtime packs
the weights, whose blobs take the place of the codes, and the scales point to NaN.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.manifests import edit_manifest, read_values, write_values
from tests.mixtral_checkpoints import write_mixtral_checkpoint
from triton_repo.packaging.package import PackageOptions, package_engine
from trt_build.errors import EngineError
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine, record_verification
from trt_build.ort.kernels import library
from trt_build.ort.old_formats import packing
from trt_build.ort.old_formats.manifest import split_old_values
from trt_build.ort.old_formats.packed_alone import unpacked_weights
from trt_build.ort.session import ScoringSession, Session

KEPT = Path(__file__).parent / "engines" / "format_3.tar.xz"
PROMPT = [11, 5, 30, 42, 7, 8, 9, 150]
GRAPHS = ("model.onnx", "model_scoring.onnx")
PRECISIONS = pytest.mark.parametrize("precision", ["int8", "int4"])


@pytest.fixture
def format_3(tmp_path):
    """Precision -> the kept engine."""
    with tarfile.open(KEPT) as kept:
        # The argument `filter` is Python 3.11.4's, this attribute is of no effect before that.
        kept.extraction_filter = getattr(tarfile, "data_filter", None)
        kept.extractall(tmp_path / "kept")
    return lambda precision: tmp_path / "kept" / precision


@pytest.fixture
def format_2(tmp_path, format_3):
    """Precision -> an engine with the packed form alone."""
    return lambda precision: as_format_2(format_3(precision), tmp_path / f"format-2-{precision}")


def logits(folder):
    """Of a prompt and two tokens after it, and of the scoring graph."""
    session = Session(open_engine(folder, check_digests=False))
    cache = session.new_cache()
    decoded = [session.run(cache, ids).copy() for ids in (PROMPT, [3], [99])]
    return [*decoded, *ScoringSession(session.engine).run(PROMPT)]


def decoded_alone(folder, options=None):
    """Of the prompt and the two tokens, from ONNX Runtime and the graph as it lies there."""
    facts = open_engine(folder).manifest.architecture
    given = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    past = np.zeros((1, facts.num_kv_heads, 0, facts.head_size), np.float32)
    caches = {value.name: past for value in given.get_inputs() if value.name.startswith("past")}
    found, length = [], 0
    for ids in (PROMPT, [3], [99]):
        length += len(ids)
        feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, length), np.int64), **caches}
        first, *present = given.run(None, feeds)
        names = [value.name for value in given.get_outputs()][1:]
        caches = {name.replace("present", "past_key_values"): v for name, v in zip(names, present, strict=True)}
        found.append(first[0, 0])
    return found


def plain_logits(folder):
    """The logits of ONNX Runtime and the graphs as they lie there: it finds the packed form, or packs for itself."""
    facts = open_engine(folder).manifest.architecture
    past = np.zeros((1, facts.num_kv_heads, 0, facts.head_size), np.float32)
    scoring = onnxruntime.InferenceSession(str(folder / "model_scoring.onnx"), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": np.array([PROMPT]), "attention_mask": np.ones((1, len(PROMPT)), np.int64)}
    feeds |= {value.name: past for value in scoring.get_inputs() if value.name.startswith("past")}
    names = ["logits", *(f"router_logits.{layer}" for layer in range(facts.num_layers))]
    scored, *routed = scoring.run(names, feeds)
    return [*decoded_alone(folder), scored[0], np.stack(routed)[:, :, ::-1]]  # the experts are stored in reverse


def assert_equal(found, expected):
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def load(path):
    return onnx.load(str(path), load_external_data=False)


def entries_of(tensor):
    return {entry.key: entry.value for entry in tensor.external_data}


def set_entries(tensor, **entries):
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))


def packed_by_onnx_runtime(engine, scratch):
    """Quantised initializer -> the blobs that ONNX Runtime packs it into."""
    scratch.mkdir()
    model = load(engine / "model.onnx")
    for tensor in model.graph.initializer:
        entries = {key: value for key, value in entries_of(tensor).items() if not key.startswith("prepacked")}
        set_entries(tensor, **entries)
    packing.save_with_packed_forms(model.SerializeToString(), scratch / "packed.bin", engine)
    data = (scratch / "packed.bin").read_bytes()
    notes = {t.name: entries_of(t).get("prepacked_0", "") for t in load(scratch / "packed.onnx").graph.initializer}
    notes = {name: note for name, note in notes.items() if note and name.endswith(".codes")}
    places = {name: [blob.split(";")[:2] for blob in note.split("|")[1:]] for name, note in notes.items()}
    return {name: [data[int(start) :][: int(size)] for start, size in found] for name, found in places.items()}


def as_format_2(engine, folder):
    """A copy of an engine with the packed form alone."""
    shutil.copytree(engine, folder, ignore=lambda *_: ["model.0.onnx", "model.1.onnx"])
    blobs = packed_by_onnx_runtime(engine, folder.with_name(f"{folder.name}-scratch"))
    old, written, regions, places = (engine / "model.onnx.data").read_bytes(), b"", [], {}

    def append(name, content):
        nonlocal written
        content += bytes(-len(content) % 256)
        digest = hashlib.sha256(content).hexdigest()
        regions.append({"name": name, "offset": len(written), "bytes": len(content), "sha256": digest})
        written += content
        return regions[-1]["offset"]

    model = load(folder / "model.onnx")
    scales_of = {name: name.replace(".codes", ".scales") for name in blobs}
    for tensor in model.graph.initializer:
        entries, name = entries_of(tensor), tensor.name
        if name in blobs:
            starts = [append(f"{name}.{number}", blob) for number, blob in enumerate(blobs[name])]
            sizes = [len(blob) for blob in blobs[name]]
            note = "|".join(["x+17", *(f"{start};{size};0" for start, size in zip(starts, sizes, strict=True))])
            places[name] = {"offset": starts[0], "length": entries["length"], "prepacked_0": note}
        elif entries and name not in scales_of.values():
            offset, length = int(entries["offset"]), int(entries["length"])
            places[name] = {"offset": append(name, old[offset : offset + length]), "length": length}
    unread = {t.name: int(entries_of(t)["length"]) for t in model.graph.initializer if t.name in scales_of.values()}
    nan = append("unread_scales", np.full(max(unread.values()) // 4, np.nan, np.float32).tobytes())
    places |= {name: {"offset": nan, "length": length} for name, length in unread.items()}
    (folder / "model.onnx.data").write_bytes(written)
    for name in GRAPHS:
        model = load(folder / name)
        for tensor in model.graph.initializer:
            if tensor.name in places:
                set_entries(tensor, location="model.onnx.data", **places[tensor.name])
        (folder / name).write_bytes(model.SerializeToString())
    record = {"part": "all", "sources": {}, "regions": regions, "key": "x+17"}
    (folder / "weights.jsonl").write_text(json.dumps(record) + "\n")
    values = read_values(folder)
    del values["resident_bytes"], values["tokenizer"], values["kernels"]
    layout = layout_of_1_31((folder / "kernels.onnx").read_bytes(), folder.with_name(f"{folder.name}-probe"))
    write_with_files(folder, {**values, "format_version": 2, "stages": ["model.onnx"], "kernel_layout": layout})
    return folder


def write_with_files(folder, values):
    values["files"] = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": None if path.suffix == ".data" else hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.iterdir())
        if path.name != "engine.json"
    }
    write_values(folder, values)


def layout_of_1_31(probe, scratch):
    """SHA-256 of what 1.31 saved: each initializer and its blobs one after the other, the next at a multiple of 8."""
    scratch.mkdir()
    packing.save_with_packed_forms(probe, scratch / "packed.bin", scratch)
    data, written = (scratch / "packed.bin").read_bytes(), b""
    for tensor in load(scratch / "packed.onnx").graph.initializer:
        entries = entries_of(tensor)
        written += bytes(-len(written) % 8)
        blobs = [blob.split(";")[:2] for blob in entries.get("prepacked_0", "").split("|")[1:]]
        for offset, size in [(entries["offset"], entries["length"]), *blobs]:
            written += data[int(offset) :][: int(size)]
    return hashlib.sha256(written).hexdigest()


# Format 4 -------------------------------------------------------------------------------------------------------------


@pytest.mark.needs_kernels
@PRECISIONS
def test_an_engine_of_format_4_gives_the_logits_of_its_graphs_bit_for_bit(tiny_engines, tmp_path, precision):
    """Format 4 is the present one without the graph for steps of several sequences."""
    folder = Path(shutil.copytree(tiny_engines(precision), tmp_path / "format-4"))
    (folder / "model_serving.onnx").unlink()
    write_with_files(folder, {**read_values(folder), "format_version": 4})
    assert not open_engine(folder).has_serving_graph
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library()))
    for one, other in zip(logits(folder)[:3], decoded_alone(folder, options), strict=True):
        np.testing.assert_array_equal(one, other)
    record_verification(open_engine(folder), {"mean_kl": 0.25})
    assert open_engine(folder).manifest.verification == {"mean_kl": 0.25}


# Format 3 -------------------------------------------------------------------------------------------------------------


@PRECISIONS
def test_a_kept_engine_of_format_3_gives_the_logits_of_its_graphs_bit_for_bit(format_3, caplog, precision):
    folder = format_3(precision)
    assert open_engine(folder).manifest.format_version == 3
    assert_equal(logits(folder), plain_logits(folder))
    assert "build the engine again to have them mapped" in caplog.text


@PRECISIONS
def test_what_another_cpu_packed_is_not_read(format_3, precision):
    """Every byte of the packed form is another: no key and no blob is right, as on a CPU of other kernels."""
    folder = format_3(precision)
    expected = logits(folder)
    model = load(folder / "model.onnx")
    notes = [entries_of(tensor).get("prepacked_0", "") for tensor in model.graph.initializer]
    blobs = [tuple(map(int, blob.split(";")[:2])) for note in notes for blob in note.split("|")[1:]]
    assert len(blobs) >= 9
    data = bytearray((folder / "model.onnx.data").read_bytes())
    for start, size in blobs:
        data[start : start + size] = bytes(byte ^ 0xFF for byte in data[start : start + size])
    (folder / "model.onnx.data").write_bytes(data)
    edit_manifest(folder, kernel_layout="0" * 64)
    assert_equal(logits(folder), expected)


def test_what_verify_found_is_added_and_nothing_else_changed(format_3):
    folder = format_3("int4")
    before = read_values(folder)
    record_verification(open_engine(folder), {"mean_kl": 0.25})
    assert read_values(folder) == {**before, "verification": {"mean_kl": 0.25}}
    assert list(read_values(folder)) == list(before)
    assert open_engine(folder).manifest.verification == {"mean_kl": 0.25}


def test_memory_is_asked_for_one_form_of_the_weights(format_3):
    engine = open_engine(format_3("int4"))
    assert engine.resident_bytes == read_values(engine.folder)["resident_bytes"]
    assert engine.resident_bytes < 0.6 * engine.manifest.files["model.onnx.data"].bytes + 20_000


def test_an_old_engine_is_packaged(format_3, tmp_path):
    package_engine(PackageOptions(engine=format_3("int4"), name="old", output=tmp_path / "repository"))
    [engine] = (tmp_path / "repository").rglob("engine.json")
    assert_equal(logits(engine.parent), logits(format_3("int4")))


def test_an_engine_that_does_not_say_whose_kernels_is_for_onnx_runtimes(format_3):
    folder = format_3("int4")
    values = read_values(folder)
    assert values.pop("kernels") == "onnxruntime"
    write_values(folder, values)
    assert open_engine(folder).manifest.kernels == "onnxruntime"
    record_verification(open_engine(folder), {})
    assert "kernels" not in read_values(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kernel_layout": "x"}, "kernel_layout is 'x', expected a SHA-256"),
        ({"kernel_layout": 7}, "kernel_layout is 7, expected a SHA-256"),
        ({"resident_bytes": 0}, "resident_bytes is 0, expected 1 or more"),
        ({"resident_bytes": 10**9}, "resident_bytes is 1000000000, expected 1 to"),
        ({"resident_bytes": None}, "resident_bytes is None, expected 1 or more"),
        ({"tokenizer": None}, "tokenizer is missing"),
        ({"format_version": 4}, "keys missing or unknown: "),
        ({"format_version": 1}, "format version 1, and this moeship reads 2, 3, 4 and 5"),
    ],
    ids=str,
)
def test_an_old_manifest_that_no_build_wrote_is_refused(format_3, change, text):
    edit_manifest(format_3("int8"), **change)
    with pytest.raises(EngineError) as caught:
        open_engine(format_3("int8"))
    assert text in str(caught.value)


def test_a_resident_memory_of_one_byte_is_what_a_build_may_have_written():
    values = {"format_version": 3, "stages": [], "kernel_layout": None, "resident_bytes": 1}
    kept, old = split_old_values(values)
    assert (kept, old.resident_bytes) == ({"format_version": 3, "kernels": "onnxruntime"}, 1)
    with pytest.raises(ValueError, match="resident_bytes is 0, expected 1 or more"):
        split_old_values({**values, "resident_bytes": 0})


# Format 2 -------------------------------------------------------------------------------------------------------------


@PRECISIONS
def test_an_engine_with_the_packed_form_alone_gives_the_same_logits_bit_for_bit(format_3, format_2, precision):
    folder = format_2(precision)
    assert open_engine(folder).manifest.format_version == 2
    assert_equal(logits(folder), logits(format_3(precision)))


@PRECISIONS
def test_codes_and_scales_are_those_that_were_packed(format_3, format_2, precision):
    found = unpacked_weights(format_2(precision) / "model.onnx")
    data = (format_3(precision) / "model.onnx.data").read_bytes()
    tensors = {tensor.name: tensor for tensor in load(format_3(precision) / "model.onnx").graph.initializer}
    assert len(found) == 2 * (2 * 4 + 1)
    for name, values in found.items():
        entries = entries_of(tensors[name])
        assert list(values.shape) == list(tensors[name].dims)
        assert values.tobytes() == data[int(entries["offset"]) :][: int(entries["length"])]


def test_odd_rows_and_swiglu_experts_are_unpacked_too(tmp_path, format_3):
    sizes = {"hidden_size": 96, "ffn_size": 64, "head_dim": 32}
    source = write_mixtral_checkpoint(tmp_path / "source", seed=1, **sizes)
    options = BuildOptions(checkpoint=str(source), output=tmp_path / "built", precision="int4", kernels="onnxruntime")
    built = build_engine(options).folder
    shutil.copy(format_3("int4") / "kernels.onnx", built)
    write_with_files(built, {**read_values(built), "resident_bytes": 1})
    folder = as_format_2(built, tmp_path / "old")
    write_with_files(built, {name: v for name, v in read_values(built).items() if name != "resident_bytes"})
    found, expected = (Session(open_engine(path)) for path in (folder, built))
    for ids in (PROMPT, [3], [99]):
        np.testing.assert_array_equal(found.run(found.new_cache(), ids), expected.run(expected.new_cache(), ids))


def test_the_installed_runtimes_own_file_is_known_too(format_2, tmp_path):
    """Such an engine was made with the format of 1.31 and a later ONNX Runtime."""
    folder = format_2("int8")
    packing.save_with_packed_forms((folder / "kernels.onnx").read_bytes(), tmp_path / "packed.bin", tmp_path)
    expected = logits(folder)
    layout = hashlib.sha256((tmp_path / "packed.bin").read_bytes()).hexdigest()
    assert layout != read_values(folder)["kernel_layout"]
    edit_manifest(folder, kernel_layout=layout)
    assert_equal(logits(folder), expected)


def test_an_engine_of_other_kernels_is_refused_before_it_is_unpacked(format_2, monkeypatch):
    folder = format_2("int8")
    edit_manifest(folder, kernel_layout="0" * 64)
    monkeypatch.setattr("trt_build.ort.old_formats.graphs.unpacked_weights", None)
    with pytest.raises(EngineError, match=r"packed for the kernels of another CPU .* build the engine again"):
        Session(open_engine(folder))


def test_a_packed_form_that_these_kernels_do_not_make_is_refused(format_2):
    """A sum in the packed form that goes with none of its codes."""
    folder = format_2("int4")
    model = load(folder / "model.onnx")
    [codes] = [tensor for tensor in model.graph.initializer if tensor.name.endswith("h.0.mixer.Wqkv.weight.codes")]
    entries = entries_of(codes)
    with (folder / "model.onnx.data").open("r+b") as data:
        data.seek(int(entries["offset"]) + -(-int(entries["length"]) // 64) * 64 + 1)
        data.write(b"\x55")
    with pytest.raises(EngineError, match=r"pack a MatMulNBits weight of 4 bits differently .* build the engine again"):
        Session(open_engine(folder, check_digests=False))


def test_an_engine_of_format_2_lists_the_graph_that_tells_kernels_apart(format_2):
    folder = format_2("int4")
    files = read_values(folder)["files"]
    edit_manifest(folder, files={name: record for name, record in files.items() if name != "kernels.onnx"})
    with pytest.raises(EngineError, match=r"files not listed: \['kernels.onnx'\]"):
        open_engine(folder)


@pytest.mark.parametrize(
    ("operator", "codes", "scales", "bits"),
    [
        ("MatMulNBits", (100, 5, 16), (100, 5), 4),
        ("MatMulNBits", (33, 3, 32), (33, 3), 8),
        ("QMoE", (3, 50, 80), (3, 50, 5), 4),
        ("QMoE", (5, 16, 32), (5, 16, 1), 8),
    ],
)
def test_packing_tells_weights_apart(operator, codes, scales, bits):
    weight = packing.QuantizedWeight(
        operator=operator, codes=codes, scales=scales, bits=bits, block_size=32, accuracy_level=4
    )
    draw = np.random.default_rng(0)
    values, factors = draw.integers(0, 256, codes, dtype=np.uint8), draw.random(scales, dtype=np.float32)
    blob = packing.pack_in_memory(weight, values, factors)
    assert len(blob) >= values.nbytes + factors.nbytes
    values.flat[-1] ^= 1
    assert (packing.pack_in_memory(weight, values, factors) != blob).any()
