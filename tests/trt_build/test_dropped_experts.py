"""`--drop-below`: which experts are dropped, that engine, plan and verify agree, what it costs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_phi_checkpoint
from manifests import edit_manifest, read_values

from cli.main import main
from export.architecture import Router
from export.checkpoint.folder import open_checkpoint
from export.errors import ConfigError
from export.families import read_model
from export.reference.model import Reference
from export.reference.remaining import RemainingReference
from export.reference.usage import layer_usage, measure_usage
from export.reference.windows import text_windows
from export.tokenizer.surplus import model_settings
from trt_build.errors import EngineError
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine
from trt_build.ort.planning.dropping import DropOptions, choose_dropped
from trt_build.ort.planning.plan import plan_engine
from trt_build.ort.planning.prepare import EngineOptions, prepare_build
from trt_build.ort.questions.graph import ask_about_graph
from trt_build.ort.questions.weights import ask_about_weights
from trt_build.ort.session import ScoringSession, Session
from trt_build.ort.step_call import Row

CHECKPOINT = str(Path(__file__).parents[2] / "examples/tiny-mixtral/checkpoint")
BELOW, TOKENS = 0.12, 1280
KINDS = [
    ("fp32", "onnxruntime", "cpu"),
    ("int4", "onnxruntime", "cpu"),
    pytest.param(("int4", "moeship", "cpu"), marks=pytest.mark.needs_kernels),
]
CUDA = [("fp16", None, "cuda"), ("int4", None, "cuda")]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"def read_{n}(self, size=-1):\n    return self._buffer[{n * 37 % 101}:size]\n\n" for n in range(90)]
    path.write_text("".join(lines) + "The file is read as bytes, and names are looked up.\n" * 20)
    return path


@pytest.fixture(scope="module")
def options(text):
    return DropOptions(below=BELOW, texts=(text,), num_tokens=TOKENS)


@pytest.fixture(scope="module")
def model():
    return read_model(open_checkpoint(CHECKPOINT))


@pytest.fixture(scope="module")
def loads(model, text):
    """Each layer's loads over the tokens that are not held out."""
    token_ids = model_settings(model).tokenizer.encode_prompt(text.read_text())
    windows = text_windows(token_ids, TOKENS, 512, "testing")  # of 512, 512 and 256: too few to hold one out
    return {layer.layer: layer.load for layer in measure_usage(model, windows).layers}


@pytest.fixture(scope="module")
def built(tmp_path_factory, options):
    """(kind) -> an engine without the experts of small load."""
    folder, engines = tmp_path_factory.mktemp("engines"), {}

    def built(kind):
        if kind not in engines:
            precision, kernels, provider = kind
            engines[kind] = build_engine(
                BuildOptions(
                    checkpoint=CHECKPOINT, output=folder / "-".join(map(str, kind)), precision=precision,
                    kernels=kernels, provider=provider, dropping=options,
                )
            )  # fmt: skip
        return engines[kind]

    return built


def test_engine_json_says_what_was_dropped_by_which_loads(built, loads, text):
    manifest = built(KINDS[0]).manifest
    record = manifest.dropped_experts
    expected = {layer: tuple(np.flatnonzero(load < BELOW).tolist()) for layer, load in loads.items()}
    assert any(expected.values())
    assert {int(layer): found.experts for layer, found in record.layers.items()} == expected
    assert manifest.left_out_experts == {str(layer): experts for layer, experts in expected.items() if experts}
    for layer, load in loads.items():
        assert record.layers[str(layer)].load == pytest.approx(load.tolist(), abs=1e-5)
    assert (record.below, record.text["names"], record.text["tokens"]) == (BELOW, [str(text)], TOKENS)
    assert open_engine(built(KINDS[0]).folder).manifest == manifest


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_computes_the_model_without_the_experts(built, model, kind):
    engine = built(kind)
    window = np.random.default_rng(5).integers(0, 500, 120).tolist()
    weights, graph = ask_about_weights(engine, model), ask_about_graph(engine, model, window)
    assert (weights.passed, graph.passed) == (True, True), (weights.failures, graph.failures)
    if kind[0] == "fp32":
        lacking = engine.manifest.lacking_experts
        remaining = RemainingReference(Reference(model), model.architecture.mixture_layers, lacking)
        [(expected, routed)] = remaining.run([window])
        found, found_routed = ScoringSession(engine).run(window)
        np.testing.assert_allclose(found, expected, atol=1e-3)
        np.testing.assert_allclose(found_routed, routed, atol=1e-2)


@pytest.mark.parametrize("kind", CUDA)
def test_engines_for_cuda_store_the_remaining_experts(built, model, kind):
    engine = built(kind)
    assert ask_about_weights(engine, model).passed
    assert engine.manifest.left_out_experts == built(KINDS[0]).manifest.left_out_experts


def test_served_tokens_are_counted_for_the_experts_that_compute_them(built):
    engine = built(KINDS[0])
    session = Session(engine)
    tokens = np.random.default_rng(5).integers(0, 500, 90).tolist()
    room = session.routing.room(num_tokens=90)
    session.step(session.new_cache(), [Row(slot=0, token_ids=tokens)], room)
    counts = session.routing.count_chosen(room)
    assert counts.sum(axis=1).tolist() == [180, 180, 180]
    for layer, experts in engine.manifest.lacking_experts.items():
        assert not counts[layer, list(experts)].any()


def test_a_plan_has_the_sizes_and_the_price_of_the_build(built, options):
    engine = built(KINDS[1])
    plan = plan_engine(
        prepare_build(EngineOptions(checkpoint=CHECKPOINT, precision="int4", kernels="onnxruntime", dropping=options))
    )
    assert plan.files == {name: (engine.folder / name).stat().st_size for name in plan.files}
    assert plan.dropped_experts == engine.manifest.dropped_experts
    whole = plan_engine(prepare_build(EngineOptions(checkpoint=CHECKPOINT, precision="int4", kernels="onnxruntime")))
    assert whole.weights_bytes - plan.weights_bytes == plan.dropped_experts.saved_bytes > 0
    notes = " ".join(plan.notes)
    assert "their load is below 12.00% of their layers' places" in notes
    assert "without them, against the whole model: KL" in notes


def test_verify_compares_with_the_remaining_model_and_tells_the_price(built, model, text, capsys):
    engine = built(KINDS[0])
    words = ["--reference", CHECKPOINT, "--text", str(text), "--tokens", "640", "--json"]
    assert main(["verify", str(engine.folder), *words]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["failures"] == []
    assert values["mean_kl"] < 1e-6
    assert any("is compared with the model without them" in finding for finding in values["findings"])
    token_ids = model_settings(model).tokenizer.encode_prompt(text.read_text())
    windows = [token_ids[:512], token_ids[512:640]]
    remaining = RemainingReference(Reference(model), (0, 1, 2), engine.manifest.lacking_experts)
    kl, same, lost = 0.0, 0, 0.0
    both = zip(windows, remaining.run(windows), Reference(model).run(windows), strict=True)
    for window, (found, _), (expected, _) in both:
        for row, (one, other) in enumerate(zip(found.astype(np.float64), expected.astype(np.float64), strict=True)):
            p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (other, one))
            kl += float((p * np.log(p / q)).sum())
            same += one.argmax() == other.argmax()
            if row + 1 < len(window):
                lost += math.log(p[window[row + 1]] / q[window[row + 1]])
    price = values["dropping"]
    assert price["num_tokens"] == 640
    assert price["mean_kl"] == pytest.approx(kl / 640, rel=1e-3)
    assert price["top1_agreement"] == pytest.approx(same / 640, abs=1e-5)
    assert price["perplexity_increase"] == pytest.approx(math.exp(lost / 638) - 1, abs=1e-4)


def test_the_cost_is_told_apart_for_an_engine_that_lacks_experts(built, text, capsys):
    words = ["--reference", CHECKPOINT, "--text", str(text), "--tokens", "512", "--cost", "experts"]
    assert main(["verify", str(built(KINDS[1]).folder), *words, "--cost-tokens", "32", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    lacking = built(KINDS[1]).manifest.lacking_experts
    told = {(part["layer"], part["expert"]) for part in cost["parts"] if "expert" in part}
    assert told == {(layer, e) for layer in range(3) for e in range(4) if e not in lacking.get(layer, ())}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"0": {"load": [0.25] * 4, "experts": [0, 1, 2, 3]}}, "dropped_experts.layers.0 drops"),
        ({"9": {"load": [0.25] * 4, "experts": [1]}}, "dropped_experts.layers.9 drops"),
        ({"0": {"load": [0.5, 0.5], "experts": []}}, "dropped_experts.layers.0 has 2 loads, expected 4"),
        ({"0": {"load": ["much"], "experts": []}}, "engine.json is malformed"),
    ],
)
def test_an_engine_json_that_contradicts_itself_is_refused(built, tmp_path, layers, message):
    folder = shutil.copytree(built(KINDS[0]).folder, tmp_path / "engine")
    edit_manifest(folder, dropped_experts={**read_values(folder)["dropped_experts"], "layers": layers})
    with pytest.raises(EngineError, match=message):
        open_engine(folder, check_digests=False)


def usage(loads, k=2):
    """Of a layer whose experts have these loads, in hundredths of the places."""
    counts = np.array(loads)
    found = layer_usage(0, np.zeros((1, len(loads)), np.float32), Router(), k)
    return dataclasses.replace(found, num_tokens=100 // k, chosen=counts)


@pytest.mark.parametrize(
    ("loads", "dead", "below", "dropped"),
    [
        ([50, 40, 9, 1], (), 0.1, (2, 3)),
        ([50, 40, 9, 1], (), 0.02, (3,)),
        ([50, 40, 10, 0], (), 0.1, (3,)),  # below, and not at the bound
        ([97, 1, 1, 1], (), 0.5, (2, 3)),  # two remain; of equal loads the lower index stays
        ([60, 40, 0, 0], (3,), 0.1, (2,)),
        ([60, 40, 0, 0], (2, 3), 0.9, ()),
        ([25, 25, 25, 25], (), 0.2, ()),
    ],
)
def test_experts_below_the_bound_are_dropped_and_k_remain(loads, dead, below, dropped):
    assert choose_dropped(usage(loads), dead, below) == dropped


def test_nothing_is_dropped_where_nothing_is_below_the_bound(text):
    options = DropOptions(below=0.001, texts=(text,), num_tokens=TOKENS)
    build = prepare_build(EngineOptions(checkpoint=CHECKPOINT, kernels="onnxruntime", dropping=options))
    assert (build.left_out, build.dropped.prices, build.dropped.saved_bytes) == ({}, (), 0)
    assert "dropped: no expert, since none has a load below 0.10%" in build.notes[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drop-below", "0.1"], "the load is measured over a text; name one with --text FILE"),
        (["--drop-below", "0", "--text", "T"], "expected a share of a layer's places above 0 and below 1"),
        (["--drop-below", "1", "--text", "T"], "expected a share of a layer's places above 0 and below 1"),
        (["--drop-below", "nan", "--text", "T"], "expected a share of a layer's places above 0 and below 1"),
        (["--drop-below", "0.1", "--text", "T", "--keep-all-experts"], "--keep-all-experts asks for the contrary"),
        (["--text", "T"], "--text belongs to --drop-below"),
        (["--drop-tokens", "9"], "--drop-tokens belongs to --drop-below"),
        (["--drop-below", "0.1", "--text", "T", "--drop-tokens", "2"], "asked for 2 tokens, expected at least 4"),
        (["--drop-below", "0.1", "--text", "SHORT"], "pass a longer text, or --drop-tokens 4"),
        (["--drop-below", "0.1", "--text", "absent"], "it cannot be read"),
        (
            ["--drop-below", "0.1", "--text", "T", "--backend", "tensorrt-llm"],
            "--drop-below, --text: for --backend onnxruntime only",
        ),
    ],
)
@pytest.mark.parametrize("command", ["build", "plan"])
def test_contradictions_are_refused(command, words, message, text, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("The file is")
    words = [{"T": str(text), "SHORT": str(short)}.get(word, word) for word in words]
    assert main([command, CHECKPOINT, "--output", str(tmp_path / "engine"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()


def test_dense_models_and_routers_that_read_all_logits_are_refused(tmp_path, text, options, model):
    dense = read_model(open_checkpoint(write_phi_checkpoint(tmp_path / "dense", seed=1)))
    with pytest.raises(ConfigError, match="is a dense phi: it has no experts"):
        options.check(dense, keep_all_experts=False)
    router = Router(normalise=False)
    other = dataclasses.replace(model, architecture=dataclasses.replace(model.architecture, router=router))
    with pytest.raises(ConfigError, match="makes the weights of the logits of all experts"):
        options.check(other, keep_all_experts=False)
