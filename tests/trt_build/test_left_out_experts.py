"""Experts that no input can choose: an engine does without them, and its logits are the whole engine's bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from granitemoe_checkpoints import write_granitemoe_checkpoint
from kernel_nodes import levels
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from cli.main import main
from export.architecture import Router
from export.checkpoint.digests import source_digests
from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.merge.config import read_merge_config
from export.merge.merge import merge
from export.reference.model import Reference
from export.routing import diagnose, left_out_by_layer, left_out_of_every_layer
from tests.manifests import edit_manifest, read_values, write_values
from trt_build.comparison import parity
from trt_build.errors import EngineError
from trt_build.ort import kernels, verify
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine, weight_regions
from trt_build.ort.planning.plan import plan_engine
from trt_build.ort.planning.prepare import EngineOptions, prepare_build
from trt_build.ort.session import ScoringSession, Session
from trt_build.ort.step_call import Row

EXPERTS = Path(__file__).parents[2] / "examples/tiny-phixtral/experts"
OWN = pytest.mark.needs_kernels
KINDS = [
    ("fp32", "onnxruntime"),
    ("int8", "onnxruntime"),
    ("int4", "onnxruntime"),
    pytest.param("int8", "moeship", marks=OWN),
    pytest.param("int4", "moeship", marks=OWN),
]
RANDOM = np.random.default_rng(12)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Four trained experts by phixtral's own YAML, whose prompts are empty: every gate row is the same."""
    folder = tmp_path_factory.mktemp("merged")
    values = {
        "base_model": str(EXPERTS / "code"),
        "gate_mode": "cheap_embed",
        "experts": [
            {"source_model": str(EXPERTS / name), "positive_prompts": [""]}
            for name in ("code", "prose", "tests", "headers")
        ],
    }
    (folder / "merge.yml").write_text(yaml.safe_dump(values))
    return merge(read_merge_config(folder / "merge.yml"), folder / "checkpoint").folder


def build(checkpoint, output, precision="int4", kernels="onnxruntime", **options):
    if options.get("provider") == "cuda":
        kernels = None
    return build_engine(
        BuildOptions(checkpoint=str(checkpoint), output=output, precision=precision, kernels=kernels, **options)
    )


def both(checkpoint, folder, *kind, **options):
    """The engine of a checkpoint, and the one that keeps all experts."""
    return (
        build(checkpoint, folder / "less", *kind, **options),
        build(checkpoint, folder / "all", *kind, keep_all_experts=True, **options),
    )


def logits(engine, threads=None):
    """Of random texts: a prompt, then single tokens; eight texts in one step; every position, with the router's."""
    random, session, found = np.random.default_rng(3), Session(engine, threads), []
    for length in (1, 2, 17, 130):
        cache = session.new_cache()
        for ids in (random.integers(0, 256, length), *random.integers(0, 256, (5, 1))):
            found.append(session.run(cache, ids.tolist()).copy())
    rows = [Row(slot=slot, token_ids=random.integers(0, 256, 1 + 3 * slot).tolist()) for slot in range(8)]
    found.append(session.step(session.new_cache(slots=8), rows).copy())
    return [*found, *ScoringSession(engine, threads).run(random.integers(0, 256, 80).tolist())]


def expect_same_bits(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


def with_rows(source, folder, rows):
    """A copy of a checkpoint; `rows`: layer -> for each expert the gate row that it gets."""
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    gates = sorted(name for name in tensors if name.endswith(("gate.weight", "router.layer.weight")))
    for layer, numbers in rows.items():
        tensors[gates[layer]] = np.ascontiguousarray(tensors[gates[layer]][numbers])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stored(engine, name):
    [tensor] = [t for t in graph_of(engine).initializer if t.name == name]
    return tuple(tensor.dims)


def graph_of(engine, name="model.onnx"):
    return onnx.load(str(engine.folder / name), load_external_data=False).graph


@pytest.mark.parametrize(("precision", "kernels"), KINDS)
def test_phixtrals_own_recipe_needs_two_of_four_experts_and_gives_the_same_bits(merged, tmp_path, precision, kernels):
    less, whole = both(merged, tmp_path, precision, kernels)
    assert less.manifest.left_out_experts == {str(layer): (2, 3) for layer in range(4)}
    assert whole.manifest.left_out_experts == {}
    assert less.manifest.source == whole.manifest.source
    assert less.manifest.routing == whole.manifest.routing
    expected = logits(whole)
    for threads in (None, 1, 2, 4):
        expect_same_bits(logits(less, threads), expected)
    plans = [plan_engine(prepare_build(EngineOptions(checkpoint=str(merged), precision=precision, kernels=kernels,
                                                     keep_all_experts=kept))) for kept in (False, True)]  # fmt: skip
    for engine, plan in zip((less, whole), plans, strict=True):
        assert plan.files == {path.name: path.stat().st_size for path in engine.folder.iterdir()}
        assert plan.average_bits_per_weight == pytest.approx(
            engine.manifest.precision.average_bits_per_weight, abs=1e-3
        )
        weight_regions(engine.folder, engine.manifest.files["model.onnx.data"].bytes)
    half, full = (plan.roles["expert"] for plan in plans)
    assert 2 * half.total_bytes == full.total_bytes
    assert 2 * half.num_weights == full.num_weights
    assert half.bytes_per_token == half.total_bytes == full.bytes_per_token
    assert plans[0].roles["router"] == plans[1].roles["router"]


@pytest.mark.needs_kernels
def test_every_instruction_set_gives_the_bits_of_the_whole_engine(merged, tmp_path, monkeypatch):
    less, whole = both(merged, tmp_path, "int4", "moeship")
    expected = logits(whole)
    for level in levels():
        monkeypatch.setenv(kernels.LEVEL_VARIABLE, level)
        expect_same_bits(logits(less), expected)


@pytest.mark.parametrize(("precision", "kernels"), KINDS[1:])
def test_sums_of_three_experts_are_the_same(tiny_checkpoint, tmp_path, precision, kernels):
    checkpoint = with_rows(tiny_checkpoint, tmp_path / "c", {0: [0, 1, 0, 0, 0], 1: [2, 2, 2, 2, 2]})
    less, whole = both(checkpoint, tmp_path, precision, kernels, experts_per_token=3)
    assert less.manifest.left_out_experts == {"0": (4,), "1": (3, 4)}
    expect_same_bits(logits(less), logits(whole))


@pytest.mark.parametrize(("precision", "kernels"), KINDS)
def test_each_layer_does_without_its_own(tiny_checkpoint, tmp_path, precision, kernels):
    checkpoint = with_rows(tiny_checkpoint, tmp_path / "c", {0: [0, 1, 0, 0, 1], 2: [3, 3, 4, 3, 3]})
    less, whole = both(checkpoint, tmp_path, precision, kernels)
    assert less.manifest.left_out_experts == {"0": (3,), "2": (3, 4)}
    found, expected = logits(less), logits(whole)
    if precision == "fp32":  # MoE divides by the sum over all experts, then by that of the chosen, and rounds each time
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)
    else:
        expect_same_bits(found, expected)
    biases = [f"transformer.h.{layer}.moe.mlp.fc2.bias" for layer in range(3)]
    assert [stored(less, name)[0] for name in biases] == [4, 5, 3]
    assert [stored(whole, name)[0] for name in biases] == [5, 5, 5]
    assert stored(less, "transformer.h.2.moe.gate.weight")[0] == 5


def test_experts_of_one_stored_tensor_are_read_to_the_last_byte(tmp_path):
    source = write_granitemoe_checkpoint(tmp_path / "s", seed=1, hidden_size=96, ffn_size=64, head_dim=32)
    checkpoint = with_rows(source, tmp_path / "c", {0: [2, 1, 2, 2, 0], 1: [0, 0, 0, 0, 0]})
    less, whole = both(checkpoint, tmp_path, "int8")
    assert less.manifest.left_out_experts == {"0": (3,), "1": (2, 3, 4)}
    assert less.manifest.source == whole.manifest.source
    runs = {
        name: found for record in map(json.loads, (less.folder / "weights.jsonl").read_text().splitlines())
        for name, found in record["sources"].items()
    }  # fmt: skip
    sizes = {name: sum(run["bytes"] for run in found) for name, found in runs.items()}
    assert sizes == {name: item.num_bytes for name, item in open_checkpoint(checkpoint).tensors.items()}
    expect_same_bits(logits(less), logits(whole))


def test_the_reference_is_the_whole_model_and_an_engine_without_an_expert_that_counts_is_told(
    merged, tmp_path, monkeypatch
):
    tokens = np.random.default_rng(4).integers(0, 256, 96).tolist()
    reference = Reference(read_model(open_checkpoint(merged)))
    good = verify.compare(build(merged, tmp_path / "good", "fp32"), reference, [tokens], lambda _: None)
    assert good.failures(parity.THRESHOLDS["fp32"]) == []
    assert good.routing_agreement == 1.0
    monkeypatch.setattr("trt_build.ort.planning.prepare.left_out_by_layer", lambda *_: dict.fromkeys(range(4), (0, 1)))
    bad = verify.compare(build(merged, tmp_path / "bad", "fp32"), reference, [tokens], lambda _: None)
    assert bad.failures(parity.THRESHOLDS["fp32"])


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_cudas_kernels_are_given_the_numbers_of_the_experts_that_are_kept(tiny_checkpoint, tmp_path, precision):
    checkpoint = with_rows(tiny_checkpoint, tmp_path / "c", {layer: [0, 1, 0, 0, 2] for layer in range(3)})
    engines = both(checkpoint, tmp_path, precision, provider="cuda")
    given = [_given_to_the_kernels(engine, np.random.default_rng(5).integers(0, 256, 300)) for engine in engines]
    kept = [0, 1, 2, 4]
    np.testing.assert_array_equal(given[0], given[1][..., kept])
    chosen = [parity.chosen_experts(values.astype(np.float32), 2) for values in given]
    np.testing.assert_array_equal(np.array(kept)[chosen[0]], chosen[1])
    assert (chosen[1] == 2).any()  # the other of the two equal rows that count


def _given_to_the_kernels(engine, tokens):
    """The router's logits in float16 of the first layer, computed by ONNX Runtime's CPU kernels."""
    model = onnx.load(str(engine.folder / "model_scoring.onnx"), load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type in ("MoE", "QMoE"))
    model.graph.output.append(helper.make_tensor_value_info(node.input[1], TensorProto.FLOAT16, None))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(engine.folder))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ids, facts = np.asarray(tokens)[None], engine.manifest.architecture
    empty = np.zeros((1, facts.num_kv_heads, 0, facts.head_size), np.float16)
    feeds = {value.name: empty for value in model.graph.input}
    return session.run([node.input[1]], feeds | {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]


def test_equal_rows_give_equal_logits_in_the_routers_product():
    """What the proof stands on. ONNX Runtime packs a constant matrix when it loads it, and then computes each column in
    the same order of sums, whichever columns are beside it. (It does not where packing is turned off.)"""
    unequal = []
    for experts in (2, 3, 4, 5, 8, 15, 16, 17, 33, 64, 65, 128, 200):
        for hidden in (32, 100, 255, 320, 1024, 2560, 4096):
            row = RANDOM.standard_normal((1, hidden)).astype(np.float32)
            for threads in (1, 4):
                product = _router(np.repeat(row, experts, axis=0), threads)
                for tokens in (1, 2, 3, 5, 8, 33, 128):
                    found = product(RANDOM.standard_normal((1, tokens, hidden)).astype(np.float32))
                    if (found.view(np.uint32) != found[..., :1].view(np.uint32)).any():
                        unequal.append((experts, hidden, threads, tokens))
    assert unequal == []


@pytest.mark.parametrize("strange", [0.0, -0.0, np.inf, -np.inf, np.nan, np.float32(1e-42), np.float32(3e38)])
def test_zeros_of_either_sign_and_values_past_all_numbers_tie_too(strange):
    gate = np.repeat(RANDOM.standard_normal((1, 320)).astype(np.float32), 6, axis=0)
    gate[:, ::3] = 0.0
    gate[3:, ::3] = -0.0
    assert diagnose({0: gate}, 2).layers[0].never_chosen == (2, 3, 4, 5)
    x = RANDOM.standard_normal((1, 9, 320)).astype(np.float32)
    x[:, ::2, ::5] = strange
    found = _router(gate, 2)(x)
    np.testing.assert_array_equal(found, np.broadcast_to(found[..., :1], found.shape))


def _router(gate, threads):
    """A graph's router by itself: x [1, T, H] -> logits [T, E]."""
    product = helper.make_node(
        "FusedMatMul", ["x", "gate"], ["y"], domain="com.microsoft",
        transA=0, transB=1, transBatchA=0, transBatchB=0, alpha=1.0,
    )  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [product], "router", [value("x", TensorProto.FLOAT, ["b", "t", gate.shape[1]])],
        [value("y", TensorProto.FLOAT, None)], [numpy_helper.from_array(gate, "gate")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    content = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0][0]


def test_no_expert_is_left_out_where_the_logits_of_the_others_count():
    report = diagnose({3: np.ones((4, 8), np.float32), 5: np.eye(4, 8, dtype=np.float32)}, 2)
    assert left_out_by_layer(report, Router()) == {3: (2, 3)}
    assert left_out_of_every_layer(report, Router()) == ()
    assert left_out_by_layer(None, Router()) == {}
    for router in (Router(normalise=False), Router(bias=True), Router(groups=2)):
        assert left_out_by_layer(report, router) == {}
    alike = diagnose({3: np.ones((4, 8), np.float32), 5: np.ones((4, 8), np.float32)}, 2)
    assert left_out_of_every_layer(alike, Router()) == (2, 3)
    assert left_out_of_every_layer(alike, Router(normalise=False)) == ()


SENTENCE = (
    "left out: experts 2 and 3 of all 4 layers: their gate rows equal those of experts before them, so that they can "
    "never be chosen"
)


def test_inspect_plan_and_build_say_it_in_one_line(merged, tmp_path, capsys):
    assert main(["inspect", str(merged)]) == 0
    assert "experts 2 and 3 of all 4 layers; engines do without them\n" in capsys.readouterr().out
    flags = ["--precision", "int4", "--kernels", "onnxruntime"]
    for more, times in (([], 1), (["--keep-all-experts"], 0)):
        assert main(["plan", str(merged), *flags, *more]) == 0
        assert capsys.readouterr().out.count(SENTENCE) == times
        output = tmp_path / f"engine-{times}"
        assert main(["build", str(merged), *flags, *more, "--method", "nearest", "--output", str(output)]) == 0
        assert open_engine(output).manifest.left_out_experts == (
            {str(layer): (2, 3) for layer in range(4)} if times else {}
        )


def test_a_build_logs_what_it_leaves_out(merged, tmp_path, caplog):
    caplog.set_level("INFO")
    build(merged, tmp_path / "engine")
    assert caplog.messages.count(SENTENCE) == 1


def test_an_engine_of_before_has_no_such_field_and_opens(tiny_engines, tmp_path, merged):
    engine = build(merged, tmp_path / "engine", keep_all_experts=True)
    values = read_values(engine.folder)
    del values["left_out_experts"]
    write_values(engine.folder, values)
    assert open_engine(engine.folder).manifest.left_out_experts == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"4": [3]}, "left_out_experts.4: there is no such layer of experts"),
        ({"01": [3]}, "left_out_experts.01: there is no such layer of experts"),
        ({"1": [3, 3]}, "left_out_experts.1 is (3, 3), expected some of 4 experts, each once"),
        ({"1": [4]}, "expected some of 4 experts, each once"),
        ({"1": [1, 2, 3]}, "leaves fewer than the 2 experts that a token needs"),
        ([2, 3], "left_out_experts is [2, 3], expected"),
    ],
)
def test_a_manifest_that_leaves_out_what_it_cannot_is_refused(merged, tmp_path, value, text):
    engine = build(merged, tmp_path / "engine")
    edit_manifest(engine.folder, left_out_experts=value)
    with pytest.raises(EngineError) as caught:
        open_engine(engine.folder)
    assert text in str(caught.value)


def test_verify_finds_that_the_reference_is_the_source(merged, tmp_path):
    engine = build(merged, tmp_path / "engine")
    assert source_digests(open_checkpoint(merged), {}) == dict(engine.manifest.source.digests)
