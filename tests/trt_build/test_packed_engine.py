"""Engines whose weights are packed for the CPU's kernels: the same numbers, mapped, and refused on other kernels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.onnx_graph.packing import QuantizedWeight, kernel_layout, packed_bytes, probe_graph
from export.output import forget_pages
from tests.checkpoints import write_phixtral_checkpoint
from trt_build.build_engine import BuildOptions, build_engine
from trt_build.engine import open_engine
from trt_build.errors import EngineError
from trt_build.ort.device import read_in_huge_pages
from trt_build.ort.session import ScoringSession, Session

PROMPT = [11, 5, 300, 42, 7, 8, 9, 150]


@pytest.fixture
def copies(tmp_path, tiny_engines):
    return lambda precision: Path(shutil.copytree(tiny_engines(precision), tmp_path / precision))


def edit_graphs(folder, edit):
    """Change the packed initializers of what a session loads: `edit` gets a name and its external data as a mapping.
    Digests are left as they were."""
    manifest = json.loads((folder / "engine.json").read_text())
    for name in manifest["stages"]:
        model = onnx.load(str(folder / name), load_external_data=False)
        for tensor in model.graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if "prepacked_0" in entries:
                edit(tensor.name, entries)
                del tensor.external_data[:]
                for key, value in entries.items():
                    tensor.external_data.add(key=key, value=value)
        (folder / name).write_bytes(model.SerializeToString())
        manifest["files"][name]["bytes"] = (folder / name).stat().st_size
    (folder / "engine.json").write_text(json.dumps(manifest))


def logits(folder):
    session = Session(open_engine(folder, check_digests=False))
    cache = session.new_cache()
    return [session.run(cache, ids).copy() for ids in (PROMPT, [3], [99])]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_packed_weights_give_the_logits_of_portable_ones_bit_for_bit(tiny_engines, precision):
    packed, portable = tiny_engines(precision), tiny_engines(precision, portable=True)
    for found, expected in zip(logits(packed), logits(portable), strict=True):
        np.testing.assert_array_equal(found, expected)
    scored, routed = ScoringSession(open_engine(packed)).run(PROMPT)
    expected, expected_routing = ScoringSession(open_engine(portable)).run(PROMPT)
    np.testing.assert_array_equal(scored, expected)
    np.testing.assert_array_equal(routed, expected_routing)


def test_the_stages_are_the_whole_graphs_nodes_and_weights_each_once(tiny_engines):
    folder = tiny_engines("int4")
    assert open_engine(folder).manifest.stages == ("model.0.onnx", "model.1.onnx")
    whole, *halves = (
        onnx.load(str(folder / name), load_external_data=False).graph
        for name in ("model.onnx", "model.0.onnx", "model.1.onnx")
    )
    facts = {node.name for node in halves[0].node} & {node.name for node in halves[1].node}
    assert facts == {node.name for node in whole.node if node.name.startswith("attention/")}
    assert {node.name for half in halves for node in half.node} == {node.name for node in whole.node}
    weights = [tensor.name for half in halves for tensor in half.initializer if tensor.external_data]
    assert sorted(weights) == sorted(tensor.name for tensor in whole.initializer if tensor.external_data)


def test_a_blob_in_another_layers_place_changes_the_logits(copies, tiny_engines):
    folder, blobs = copies("int4"), {}

    def exchange(name, entries):
        if name.endswith("moe.mlp.fc1.weight.codes"):
            key, _, places = entries["prepacked_0"].partition("|")
            entries["prepacked_0"] = f"{key}|{blobs.get('last', places)}"
            blobs["last"] = places

    edit_graphs(folder, exchange)
    assert not np.allclose(logits(folder)[0], logits(tiny_engines("int4"))[0], atol=1e-2)


def test_kernels_that_meet_no_key_give_no_plausible_logits(copies):
    folder = copies("int4")
    edit_graphs(folder, lambda name, entries: entries.update(prepacked_0=f"x{entries['prepacked_0']}"))
    with pytest.raises(EngineError, match="its logits are not finite; check it with moeship verify"):
        logits(folder)


def test_an_engine_packed_for_other_kernels_is_refused_before_it_is_loaded(copies):
    folder = copies("int8")
    manifest = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**manifest, "kernel_layout": "0" * 64}))
    for session in (Session, ScoringSession):
        with pytest.raises(EngineError, match=r"packed for the kernels of another CPU .* or anywhere with --portable"):
            session(open_engine(folder))


def test_the_data_file_holds_one_form_of_each_weight(tiny_engines):
    """The packed form has the codes, a scale and a sum for each block; the portable one lacks the sum."""
    model = onnx.load(str(tiny_engines("int4", portable=True) / "model.onnx"), load_external_data=False)
    sums = sum(
        4 * int(np.prod(tensor.dims))
        for tensor in model.graph.initializer
        if tensor.name.endswith(".scales") and "wte" not in tensor.name
    )
    largest = max(4 * int(np.prod(t.dims)) for t in model.graph.initializer if t.name.endswith(".scales"))
    packed, portable = (
        (tiny_engines("int4", portable=value) / "model.onnx.data").stat().st_size for value in (False, True)
    )
    slack = 512 * len(model.graph.initializer)  # what lies between neighbours, and the kernels' own padding
    assert portable < packed <= portable + sums + largest + slack


@pytest.mark.parametrize(
    ("operator", "codes", "scales", "bits"),
    [
        ("MatMulNBits", (100, 5, 16), (100, 5), 4),
        ("MatMulNBits", (33, 3, 32), (33, 3), 8),
        ("QMoE", (3, 50, 80), (3, 50, 5), 4),
        ("QMoE", (5, 16, 32), (5, 16, 1), 8),
    ],
)
def test_packed_bytes_are_those_that_packing_gives(tmp_path, operator, codes, scales, bits):
    from export.onnx_graph.packing import packed

    weight = QuantizedWeight(operator=operator, codes=codes, scales=scales, bits=bits, block_size=32, accuracy_level=4)
    draw = np.random.default_rng(0)
    values = draw.integers(0, 256, codes, dtype=np.uint8), draw.random(scales, dtype=np.float32)
    with packed(weight, [values], tmp_path) as found:
        assert tuple(blob.length for blob in found.blobs) == packed_bytes(weight)
    assert not list(tmp_path.iterdir())


def test_the_layout_tells_kinds_of_weights_apart():
    def layout(**changes):
        facts = {"operator": "MatMulNBits", "codes": (64, 5, 16), "scales": (64, 5), "bits": 4, "block_size": 32}
        return kernel_layout(probe_graph([QuantizedWeight(**{**facts, "accuracy_level": 4, **changes})]))

    assert layout() == layout(codes=(9, 7, 16), scales=(9, 7))
    assert len({layout(), layout(block_size=64, codes=(64, 5, 32)), layout(bits=8, codes=(64, 5, 32))}) == 3


MEMORY_PROGRAM = """
import sys
from trt_build.engine import open_engine
from trt_build.ort.session import Session

def private():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

import onnxruntime, numpy
before = private()
session = Session(open_engine(sys.argv[1], check_digests=False), threads=1)
cache = session.new_cache()
session.run(cache, list(range(5, 40)))
print(private() - before)
"""


def test_packed_weights_are_mapped_and_not_held_in_private_memory(tmp_path):
    sizes = {
        "hidden_size": 512, "num_heads": 8, "num_kv_heads": 8, "rotary_dim": 32, "ffn_size": 2048, "num_layers": 4,
        "max_positions": 64,
    }  # fmt: skip
    checkpoint = write_phixtral_checkpoint(tmp_path / "c", seed=1, num_experts=8, experts_per_token=2, **sizes)
    private = {}
    for portable in (False, True):
        output = tmp_path / f"engine-{portable}"
        engine = build_engine(BuildOptions(checkpoint=str(checkpoint), output=output, portable=portable))
        done = subprocess.run(
            [sys.executable, "-c", MEMORY_PROGRAM, output], capture_output=True, text=True, check=True
        )
        private[portable] = int(done.stdout) / engine.num_bytes
    assert private[False] < 0.5 < 1.0 < private[True]


def test_reading_ahead_takes_any_file_and_changes_nothing(tmp_path):
    path = tmp_path / "data"
    for num_bytes in (1, 5000, (1 << 21) + 1):
        path.write_bytes(bytes(range(256)) * (num_bytes // 256 + 1))
        forget_pages(path)
        read_in_huge_pages(path)
        assert path.read_bytes() == bytes(range(256)) * (num_bytes // 256 + 1)
