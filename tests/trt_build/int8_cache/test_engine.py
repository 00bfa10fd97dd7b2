"""Engines with caches in int8: what a build writes, what a session serves, what verification says, what is refused.

ONNX Runtime's attention has a scale for each channel, found by the build; moeship's has one for each position.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from manifests import edit_manifest, read_values
from mixtral_checkpoints import write_mixtral_checkpoint
from safetensors.numpy import load_file, save_file

from cli.main import main
from export.exporter import INT8_CACHE_GRAPH
from export.onnx_graph.kv_scales import SCALES_FILE, write_scales
from export.provider import KERNELS, OWN_KERNELS, PER_CHANNEL
from export.tokenizer.loading import load_tokenizer
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.errors import RepositoryError
from triton_repo.packaging.package import LAYOUTS, PackageOptions, package_engine
from triton_repo.runtime.batching.memory.slots import Slots
from trt_build.comparison.evaluation_text import own_text
from trt_build.errors import EngineError
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import Engine, open_engine
from trt_build.ort.int8_cache.calibrating import MARGIN, calibrate
from trt_build.ort.int8_cache.graph import graph_failures
from trt_build.ort.int8_cache.loss import MOST_MEAN_KL, ask_about_int8_cache
from trt_build.ort.int8_cache.scales import read_scales
from trt_build.ort.memory import kv_bytes_of
from trt_build.ort.planning.plan import plan_engine
from trt_build.ort.planning.prepare import EngineOptions, prepare_build
from trt_build.ort.session import Session
from trt_build.ort.step_call import Row

TOKENS = np.random.default_rng(2).integers(0, 352, 300).tolist()


@pytest.fixture(scope="session")
def int8_engine(made_once, tiny_checkpoint) -> Path:
    """An fp32 engine with caches in int8, so that nothing but the caches is rounded."""

    def make(folder: Path) -> object:
        return build_engine(
            BuildOptions(checkpoint=str(tiny_checkpoint), output=folder, precision="fp32", kv_cache="int8")
        )

    return made_once("int8-cache", make)


@pytest.fixture(scope="session")
def engine_with_records(made_once, tiny_checkpoint) -> Path:
    """An int4 engine for moeship's kernels with caches in int8."""

    def make(folder: Path) -> object:
        return build_engine(
            BuildOptions(checkpoint=str(tiny_checkpoint), output=folder, kernels=OWN_KERNELS, kv_cache="int8")
        )

    return made_once("int8-cache-records", make)


@pytest.fixture(params=["per channel", pytest.param("per position", marks=pytest.mark.needs_kernels)])
def either_engine(request) -> Path:
    """An engine of each kind of scales."""
    name = "int8_engine" if request.param == "per channel" else "engine_with_records"
    return request.getfixturevalue(name)


@pytest.fixture
def damaged(tmp_path, int8_engine):
    """change of the scales by name -> an engine that has the changed ones."""

    def make(change) -> Engine:
        folder = shutil.copytree(int8_engine, tmp_path / "damaged")
        scales = load_file(folder / SCALES_FILE)
        change(scales)
        save_file(scales, folder / SCALES_FILE)
        return dataclasses.replace(open_engine(int8_engine), folder=folder)

    return make


def test_scales_hold_the_largest_magnitudes_of_the_float_cache(int8_engine):
    """By numpy: of a value its own channel's, of a rotary key that of its pair, which turning leaves as it is."""
    engine = open_engine(int8_engine)
    facts, session = engine.manifest.architecture, Session(engine)
    cache = session.new_cache()
    session.run(cache, TOKENS)
    scales, half = calibrate(engine, [TOKENS]), facts.rotary_dim // 2
    for layer in range(facts.num_layers):
        keys, values = cache.held(0)[2 * layer : 2 * layer + 2]
        expected = np.abs(np.stack([keys, values])).max(axis=2)
        pairs = np.sqrt(keys[..., :half] ** 2 + keys[..., half : 2 * half] ** 2).max(axis=1)
        expected[0, :, : 2 * half] = np.concatenate([pairs, pairs], axis=-1)
        expected = np.maximum(expected * MARGIN, expected.mean(axis=-1, keepdims=True)) / 127
        assert (scales[layer] >= expected).all()
        np.testing.assert_allclose(scales[layer], expected, rtol=1 / 128)


def test_a_sessions_cache_holds_the_codes_of_what_the_float_cache_holds(int8_engine):
    """Of the first layer, whose keys and values come before any cache is read."""
    engine = open_engine(int8_engine)
    held = []
    for kv_cache in ("float", "int8"):
        session = Session(engine, kv_cache=kv_cache)
        cache = session.new_cache()
        session.run(cache, TOKENS)
        held.append([array.copy() for array in cache.held(0)[:2]])
    for floats, codes, scales in zip(*held, read_scales(engine)[0], strict=True):
        assert codes.dtype == np.int8
        expected = np.clip(np.rint(floats / scales[:, None]), -128, 127)
        assert np.abs(codes - expected).max() <= 1
        assert (codes == expected).mean() > 0.999


def test_ragged_steps_over_int8_slots_give_each_sequence_its_own_logits(either_engine):
    session = Session(open_engine(either_engine), kv_cache="int8")
    alone, cache = session.new_cache(), session.new_cache(3)
    parts = {0: TOKENS[:130], 2: TOKENS[130:137]}
    rows = [Row(slot=0, token_ids=parts[0][:127], num_logits=2), Row(slot=2, token_ids=parts[2][:1])]
    found = [session.step(cache, rows).copy()]
    rows = [
        Row(slot=0, token_ids=parts[0][127:]),
        Row(slot=1, token_ids=TOKENS[:5]),
        Row(slot=2, token_ids=parts[2][1:]),
    ]
    found.append(session.step(cache, rows).copy())
    for slot, tokens, first in ((0, parts[0][:127], found[0][1]), (2, parts[2][:1], found[0][2])):
        alone.shorten(0, 0)
        np.testing.assert_allclose(session.run(alone, tokens), first, atol=1e-4)
        last = session.run(alone, parts[slot][len(tokens) :])
        np.testing.assert_allclose(last, found[1][0 if slot == 0 else 2], atol=1e-4)


def test_slots_in_int8_are_copied_shortened_and_given_back(either_engine):
    session = Session(open_engine(either_engine), kv_cache="int8")
    cache = session.new_cache(2)
    expected = session.step(cache, [Row(slot=0, token_ids=TOKENS[:100])]).copy()
    cache.copy(0, 1, 99)
    again = session.step(cache, [Row(slot=1, token_ids=TOKENS[99:100])]).copy()
    np.testing.assert_allclose(again, expected, atol=1e-5)
    cache.release(0, 50)
    session.step(cache, [Row(slot=0, token_ids=TOKENS[50:99])])
    np.testing.assert_allclose(session.step(cache, [Row(slot=0, token_ids=TOKENS[99:100])]), expected, atol=1e-5)
    cache.release(0)
    assert cache.lengths == [0, 100]


def test_caches_take_less_than_a_third_of_the_bytes(either_engine):
    """Heads of 32 channels: records of 36 bytes. Each head begins in a page of its own."""
    engine = open_engine(either_engine)
    of_floats, of_codes = (Session(engine, kv_cache=kv_cache).new_cache(2) for kv_cache in ("float", "int8"))
    assert kv_bytes_of(engine, "int8") <= 0.3 * kv_bytes_of(engine)
    pages = len(of_codes.held(0)) * engine.manifest.architecture.num_kv_heads * mmap.PAGESIZE
    assert of_codes.bytes_of(600) <= 0.3 * of_floats.bytes_of(600) + pages


def test_a_memory_budget_for_one_sequence_of_floats_holds_three_in_int8(either_engine):
    """Of 640 positions, where each head's positions begin in a page of their own; longer ones come nearer to four."""
    engine = open_engine(either_engine)
    of_floats, of_codes = (Session(engine, kv_cache=kv_cache).new_cache(8) for kv_cache in ("float", "int8"))
    budget = of_floats.bytes_of(640)
    counts = [sum(Slots(cache, budget).fits(count, 640) for count in range(1, 9)) for cache in (of_floats, of_codes)]
    assert counts == [1, 3]


def test_every_file_is_planned_to_the_byte(tmp_path, tiny_checkpoint, int8_engine):
    options = {"precision": "fp32", "kv_cache": "int8"}
    planned = plan_engine(prepare_build(EngineOptions(checkpoint=str(tiny_checkpoint), **options)))
    assert planned.files == {path.name: path.stat().st_size for path in int8_engine.iterdir()}
    of_floats = plan_engine(prepare_build(EngineOptions(checkpoint=str(tiny_checkpoint), precision="fp32")))
    assert 4 * planned.kv_bytes_per_token == of_floats.kv_bytes_per_token
    assert planned.cache_seconds > 0 == of_floats.cache_seconds
    again = build_engine(BuildOptions(checkpoint=str(tiny_checkpoint), output=tmp_path / "again", **options))
    for name in (SCALES_FILE, INT8_CACHE_GRAPH, "engine.json"):
        assert (again.folder / name).read_bytes() == (int8_engine / name).read_bytes()


@pytest.mark.needs_kernels
def test_a_build_for_moeships_kernels_finds_no_scales_and_is_planned_to_the_byte(
    tmp_path, tiny_checkpoint, engine_with_records, monkeypatch
):
    options = EngineOptions(checkpoint=str(tiny_checkpoint), kernels=OWN_KERNELS, kv_cache="int8")
    planned = plan_engine(prepare_build(options))
    assert planned.files == {path.name: path.stat().st_size for path in engine_with_records.iterdir()}
    assert not (engine_with_records / SCALES_FILE).exists()
    assert planned.cache_seconds == 0
    of_floats = plan_engine(prepare_build(dataclasses.replace(options, kv_cache="float")))
    size = open_engine(engine_with_records).manifest.architecture.head_size
    assert planned.kv_bytes_per_token * 4 * size == of_floats.kv_bytes_per_token * (size + 4)
    monkeypatch.setattr("trt_build.ort.memory.available_memory", lambda: planned.resident_bytes)
    with pytest.raises(EngineError, match=f"{planned.sequence_bytes / 1e9:.2f} GB for keys and values"):
        Session(open_engine(engine_with_records), kv_cache="int8")


@pytest.mark.needs_kernels
def test_a_sessions_records_hold_what_the_float_cache_holds(engine_with_records):
    """Of the first layer, whose keys and values come before any cache is read: each within half a step."""
    engine = open_engine(engine_with_records)
    held = []
    for kv_cache in ("float", "int8"):
        session = Session(engine, kv_cache=kv_cache)
        cache = session.new_cache()
        session.run(cache, TOKENS)
        held.append([array.copy() for array in cache.held(0)[:2]])
    size = engine.manifest.architecture.head_size
    for floats, records in zip(*held, strict=True):
        grids = (np.ascontiguousarray(records[..., size:]).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        scales, middles = grids[..., :1], grids[..., 1:]
        reach = np.abs(floats - middles).max(axis=-1, keepdims=True)
        assert (scales >= reach / 127).all()
        assert (scales <= reach / 127 * (1 + 1 / 64)).all()
        assert (np.abs(records[..., :size] * scales + middles - floats) <= 0.5001 * scales).all()


@pytest.mark.needs_kernels
def test_trained_engines_keep_their_loss_below_a_thousandth_as_they_are_served(tmp_path, trained_phixtral):
    """The limit of an int4 engine as it is served is wider; moeship's attention keeps that of the cache itself."""
    options = BuildOptions(
        checkpoint=str(trained_phixtral), output=tmp_path / "engine", kernels=OWN_KERNELS, kv_cache="int8"
    )
    engine = build_engine(options)
    text = load_tokenizer(engine.folder).encode_prompt(own_text().content)[:512]
    answer = ask_about_int8_cache(engine, [text])
    assert answer.passed
    assert answer.figures["int8_cache"]["kl"] <= MOST_MEAN_KL
    assert 0 < answer.figures["int8_cache"]["kl_float32_activations"] <= 0.5 * MOST_MEAN_KL


def test_a_mixtral_with_a_window_keeps_its_loss_small_and_wrong_scales_are_told(tmp_path):
    folder = tmp_path / "checkpoint"
    checkpoint = write_mixtral_checkpoint(folder, seed=4, hidden_size=64, ffn_size=64, config={"sliding_window": 48})
    options = BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", precision="fp32", kv_cache="int8")
    engine = build_engine(options)
    windows = [np.random.default_rng(1).integers(0, 365, 300).tolist()]
    answer = ask_about_int8_cache(engine, windows)
    assert answer.passed
    assert 0 < answer.figures["int8_cache"]["kl"] <= MOST_MEAN_KL
    assert answer.figures["int8_cache"]["num_tokens"] == 300
    write_scales(engine.folder, engine.manifest.architecture, read_scales(engine) / 8)
    answer = ask_about_int8_cache(engine, windows)
    assert answer.passed is False
    assert "with keys and values in int8 the mean KL" in answer.failures[0]


def test_verify_says_what_int8_caches_cost_and_records_it(tmp_path, tiny_checkpoint, int8_engine, capsys):
    """Random weights over the held-out text; the scales were found over another text."""
    folder = shutil.copytree(int8_engine, tmp_path / "engine")
    assert main(["verify", str(folder), "--reference", str(tiny_checkpoint), "--tokens", "96"]) == 0
    assert "What do keys and values in int8 cost? within its limits\n  96 tokens: KL " in capsys.readouterr().out
    recorded = open_engine(folder).manifest.verification["questions"][-1]
    assert recorded["question"] == "What do keys and values in int8 cost?"
    assert 0 < recorded["int8_cache"]["kl"] <= 1e-3


def test_a_graph_that_differs_from_the_serving_graph_elsewhere_is_told(tmp_path, either_engine):
    """A window of 400 positions changes no figure over 300 tokens."""
    folder = shutil.copytree(either_engine, tmp_path / "engine")
    model = onnx.load(str(folder / INT8_CACHE_GRAPH), load_external_data=False)
    [node] = [one for one in model.graph.node if one.op_type in ("GroupQueryAttention", "Attention")][2:]
    next(entry for entry in node.attribute if entry.name in ("local_window_size", "window")).i = 400
    (folder / INT8_CACHE_GRAPH).write_bytes(model.SerializeToString())
    engine = dataclasses.replace(open_engine(either_engine), folder=folder)
    told = f"{INT8_CACHE_GRAPH}: the node {node.name} is not that of model_serving.onnx"
    assert graph_failures(engine) == [told]
    assert ask_about_int8_cache(engine, [TOKENS]).failures[-1] == told
    assert graph_failures(open_engine(either_engine)) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda scales: scales.pop("layers.1.k_scale"), "layers.1.k_scale is missing"),
        (lambda scales: scales["layers.2.v_scale"].__setitem__((3, 5), np.nan), "layers.2.v_scale has nan for head 3"),
        (
            lambda scales: scales["layers.0.k_scale"].__setitem__((0, 1), 0),
            "layers.0.k_scale has 0.0 for head 0, channel",
        ),
        (lambda scales: scales["layers.0.k_scale"].__setitem__((0, 1), np.inf), "layers.0.k_scale has inf for head 0"),
        (
            lambda scales: scales.update({"layers.0.v_scale": scales["layers.0.v_scale"][:5]}),
            r"layers.0.v_scale is F32 \[5, 32\]",
        ),
    ],
)
def test_scales_that_no_cache_can_have_are_refused_by_name(damaged, change, told):
    with pytest.raises(EngineError, match=f"{told}.*build it again with --kv int8"):
        Session(damaged(change), kv_cache="int8")


def test_a_damaged_file_of_scales_is_no_engine(tmp_path, int8_engine):
    folder = shutil.copytree(int8_engine, tmp_path / "engine")
    content = bytearray((folder / SCALES_FILE).read_bytes())
    content[-1] ^= 1
    (folder / SCALES_FILE).write_bytes(content)
    with pytest.raises(EngineError, match=f"{SCALES_FILE}: found SHA-256"):
        open_engine(folder)
    (folder / SCALES_FILE).unlink()
    with pytest.raises(EngineError, match=f"{SCALES_FILE}: missing"):
        open_engine(folder)


def test_an_engine_without_scales_says_to_build_it_again(tmp_path, tiny_engine, capsys):
    with pytest.raises(EngineError, match="built without keys and values in int8; build it again with --kv int8"):
        Session(open_engine(tiny_engine), kv_cache="int8")
    words = ["package", str(tiny_engine), "--name", "m", "--output", str(tmp_path / "repository")]
    assert main([*words, "--kv-cache-dtype", "int8"]) == 2
    assert "build it again with --kv int8, or leave --kv out here" in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()


def test_inspect_says_what_the_scales_are_for(either_engine, capsys):
    scales = open_engine(either_engine).manifest.cache_scales
    assert main(["inspect", str(either_engine)]) == 0
    assert f"keys and values  float, or int8 with scales {scales}\n" in capsys.readouterr().out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_package_says_how_keys_and_values_are_stored(tmp_path, int8_engine, layout):
    parameters = ModelParameters(kv_cache="int8")
    options = PackageOptions(
        engine=int8_engine, name="m", output=tmp_path / "repository", layout=layout, onnxruntime=parameters
    )
    package_engine(options)
    texts = [path.read_text() for path in (tmp_path / "repository").glob("*/config.pbtxt")]
    assert sum("moeship_kv_cache" in text and '"int8"' in text for text in texts) == 1


def test_another_dtype_and_other_backends_are_refused_by_name(tmp_path, tiny_checkpoint, capsys):
    with pytest.raises(RepositoryError, match="kv_cache is int4; expected float or int8"):
        package_engine(
            PackageOptions(
                engine=tmp_path, name="m", output=tmp_path / "r", onnxruntime=ModelParameters(kv_cache="int4")
            )
        )
    words = ["plan", str(tiny_checkpoint), "--kv"]
    for further, told in (
        (["fp8"], "fp8"),
        (["int8", "--backend", "tensorrt-llm"], "--kv: for --backend onnxruntime only"),
        (["int8", "--provider", "cuda"], "found --kv int8 for the provider cuda"),
    ):
        assert main([*words, *further]) == 2
        assert told in capsys.readouterr().err


def test_a_plan_states_what_calibrating_takes(tiny_checkpoint, capsys):
    assert main(["plan", str(tiny_checkpoint), "--kv", "int8", "--precision", "fp32"]) == 0
    assert "scales by running the engine over a text: under 20 s of one core" in capsys.readouterr().out
    assert main(["plan", str(tiny_checkpoint), "--kv", "int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_cache"] == "int8"


@pytest.mark.needs_kernels
def test_a_plan_for_moeships_kernels_says_that_nothing_is_found_beforehand(tiny_checkpoint, capsys):
    assert main(["plan", str(tiny_checkpoint), "--kv", "int8", "--kernels", "moeship"]) == 0
    assert "a scale for each position, found as it is written" in capsys.readouterr().out


@pytest.mark.needs_kernels
def test_an_engine_that_names_other_scales_is_no_engine(tmp_path, engine_with_records):
    folder = shutil.copytree(engine_with_records, tmp_path / "engine")
    edit_manifest(folder, kv_cache=read_values(folder)["kv_cache"] | {"scales": "per tensor"})
    with pytest.raises(EngineError, match="kv_cache.scales is .?per tensor.?, expected per channel or per position"):
        open_engine(folder)


@pytest.mark.needs_kernels
def test_an_engine_for_moeships_kernels_with_scales_of_channels_is_served_with_these(
    tmp_path, tiny_checkpoint, monkeypatch
):
    """As builds made them before there was an attention over records."""
    own = {"cpu": dataclasses.replace(KERNELS[OWN_KERNELS]["cpu"], cache_scales=PER_CHANNEL)}
    with monkeypatch.context() as patched:
        patched.setattr("export.provider.KERNELS", {**KERNELS, OWN_KERNELS: own})
        options = BuildOptions(
            checkpoint=str(tiny_checkpoint), output=tmp_path / "engine", kernels=OWN_KERNELS, kv_cache="int8"
        )
        build_engine(options)
    engine = open_engine(tmp_path / "engine")
    session = Session(engine, kv_cache="int8")
    cache = session.new_cache()
    session.run(cache, TOKENS[:20])
    size = engine.manifest.architecture.head_size
    assert cache.held(0)[0].shape[1:] == (20, size)
    assert kv_bytes_of(engine) == 4 * kv_bytes_of(engine, "int8")
    assert graph_failures(engine) == []
