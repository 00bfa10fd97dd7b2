"""The committed experts: what they are, what their mixture is worth through the engine, and parity on real text."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoding import KINDS, QUANTISED, each, genai_greedy, greedy, load_genai
from torch_reference import load_reference, run_model

from cli.main import main
from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.merge.config import read_merge_config
from export.merge.gate_training import GateTraining, TrainingText
from export.merge.merge import merge
from export.tokenizer.loading import load_tokenizer
from trt_build.comparison import parity
from trt_build.comparison.serving_ways import SERVING_LIMITS
from trt_build.ort import verify
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import Engine, open_engine
from trt_build.ort.served_as_scored import compare_serving
from trt_build.ort.session import Session

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "tiny-phixtral"
FP32 = KINDS[0]
TEXT_CHARACTERS = 40_000  # of a slice, enough for 2048 tokens
SLICES = ("code", "prose", "tests", "headers")
PROMPTS = (
    "def main(", "import os\n", "class Queue:\n    def ", "Return the ", "self.assertEqual(", "#include <",
    "for i in range(", "The following ",
)  # fmt: skip


def load_corpus():
    spec = importlib.util.spec_from_file_location("corpus", EXAMPLE / "corpus.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["corpus"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def held_out():
    """Slice -> windows of 256 token ids of text that no expert was trained on."""
    tokenizer = load_tokenizer(EXAMPLE / "experts" / "code")
    return {
        name: list(parity.split_windows(tokenizer.encode(text[:TEXT_CHARACTERS]), 256, 2048))
        for name, text in load_corpus().held_out_texts().items()
    }


def test_gates_that_are_fitted_to_text_are_better_than_each_expert_and_than_equal_gates(tmp_path):
    """The cure for phixtral's own recipe, over text that no expert was trained on, a stretch of which no gate saw."""
    texts = tuple(TrainingText(name=name, content=text) for name, text in load_corpus().held_out_texts().items())
    config = read_merge_config(EXAMPLE / "empty-prompts.yml")
    rows = merge(config, tmp_path / "trained", training=GateTraining(texts=texts, tokens=2560)).trained.perplexities
    trained = rows["mixture, gates trained"][-1]
    others = {who: values[-1] for who, values in rows.items() if who != "mixture, gates trained"}
    assert len(others) == 5
    assert trained < min(others.values()), (trained, others)


@pytest.fixture(scope="module")
def engines(tmp_path_factory, trained_phixtral) -> dict[tuple[str, str], Engine]:
    folder = tmp_path_factory.mktemp("engines")
    return {
        kind: build_engine(
            BuildOptions(
                checkpoint=str(trained_phixtral), output=folder / "-".join(kind), precision=kind[0], kernels=kind[1]
            )
        )
        for kind in KINDS
    }  # fmt: skip


class Computed:
    """Stands for a reference; its logits and router logits were computed before."""

    def __init__(self, found):
        self._found = found

    def run(self, windows, progress):
        return (self._found[tuple(window)] for window in windows)


@pytest.fixture(scope="module")
def reference(trained_phixtral):
    return load_reference(read_model(open_checkpoint(trained_phixtral)))


@pytest.fixture(scope="module")
def some_windows(held_out):
    """1024 tokens of each slice."""
    return [window for part in held_out.values() for window in part[:4]]


@pytest.fixture(scope="module")
def exact_perplexity(engines, some_windows) -> float:
    """The float32 engine's."""
    return verify.perplexity(engines[FP32], some_windows)


def test_every_expert_is_small_and_fit_for_every_engines_packing():
    for name in SLICES:
        folder = EXAMPLE / "experts" / name
        facts = read_model(open_checkpoint(folder)).architecture
        assert (folder / "model.safetensors").stat().st_size <= 6_000_000
        assert (facts.hidden_size % 64, facts.ffn_size % 64, facts.head_size in (32, 64)) == (0, 0, True)


@pytest.mark.needs_kernels
def test_the_guide_shows_what_plan_prints_of_the_example(tmp_path, trained_phixtral, monkeypatch, capsys):
    """All lines that no machine changes. engine.json names versions of libraries, so the bytes of all files vary a
    little."""
    (tmp_path / "checkpoint").symlink_to(trained_phixtral)
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "checkpoint", "--precision", "int4"]) == 0
    section = (ROOT / "docs/guide.md").read_text("utf-8").partition("$ moeship plan checkpoint")[2].partition("```")[0]
    shown, printed = section.splitlines()[1:], capsys.readouterr().out.splitlines()
    own = ("  making it", "in ", "  sequences beside", "  tokens per second", "  all files")
    assert [line for line in shown if not line.startswith(own)] == [x for x in printed if not x.startswith(own)]
    sizes = [int(re.search(r"all files  ([\d,]+)", "\n".join(text))[1].replace(",", "")) for text in (shown, printed)]
    assert abs(sizes[0] - sizes[1]) <= 32


def test_each_expert_is_the_best_of_the_four_on_its_own_slice(tmp_path, held_out):
    found = {}
    for name in SLICES:
        options = BuildOptions(checkpoint=str(EXAMPLE / "experts" / name), output=tmp_path / name, precision="fp32")
        engine = build_engine(options)
        found[name] = {slice_name: verify.perplexity(engine, windows) for slice_name, windows in held_out.items()}
    for slice_name in held_out:
        assert min(SLICES, key=lambda name: found[name][slice_name]) == slice_name


@pytest.mark.parametrize("kind", each(QUANTISED))
def test_quantised_perplexity_stays_near_fp32(engines, some_windows, exact_perplexity, kind):
    assert (
        verify.perplexity(engines[kind], some_windows) / exact_perplexity - 1 <= {"int8": 0.003, "int4": 0.03}[kind[0]]
    )


@pytest.fixture(scope="module")
def expected(reference, held_out):
    """Window -> the reference's logits and router logits, computed once for every kind of engine."""
    text = [token for part in held_out.values() for window in part[:2] for token in window]
    windows = parity.split_windows(text, 512, 1536)
    return {tuple(window): run_model(reference, window) for window in windows}


@pytest.mark.parametrize("kind", each(KINDS))
def test_attention_that_is_scaled_by_three_percent_in_the_serving_graph_alone_is_caught(
    tmp_path, engines, held_out, kind
):
    window, limits = [*held_out["code"][0], *held_out["code"][1]], SERVING_LIMITS[kind[0]]
    sound = compare_serving(engines[kind], window, lambda _text: None)
    assert {way.failure(way.limits(limits)) for way in sound} == {None}
    wrong = open_engine(shutil.copytree(engines[kind].folder, tmp_path / "wrong"))
    graph = wrong.folder / "model_serving.onnx"
    model = onnx.load(str(graph), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "GroupQueryAttention" and attribute.name == "scale":
                attribute.f *= 1.03
    graph.write_bytes(model.SerializeToString())
    found = compare_serving(wrong, window, lambda _text: None)
    assert any(way.failure(way.limits(limits)) for way in found)
    if kind[0] != "fp32":
        assert max(way.mean / way.limits(limits).mean for way in found if way.exact) >= 10


@pytest.mark.parametrize("kind", each(KINDS))
def test_parity_holds_on_held_out_text(engines, expected, kind):
    windows = list(expected)
    report = verify.compare(engines[kind], Computed(expected), windows, lambda _text: None)
    assert report.num_tokens >= 1024
    assert report.num_decoded_tokens == 256
    assert report.failures(parity.THRESHOLDS[kind[0]]) == []


def test_greedy_text_of_eight_prompts_is_that_of_transformers(engines, reference):
    """Each token is the likeliest after all before it: with the prompt given, that is what transformers' generate
    writes, token by token. One call of the reference for a prompt tells all of them."""
    tokenizer, session = load_tokenizer(EXAMPLE / "experts" / "code"), Session(engines[FP32])
    for prompt in PROMPTS:
        encoded = tokenizer.encode(prompt)
        written = greedy(session, encoded, 64)
        logits, _ = run_model(reference, [*encoded, *written])
        assert logits[len(encoded) - 1 : -1].argmax(axis=-1).tolist() == written


@pytest.mark.parametrize("kind", each([FP32, ("int4", "onnxruntime"), ("int4", "moeship")]))
def test_onnxruntime_genai_writes_the_same_tokens(engines, kind):
    model, session = load_genai(engines[kind].folder), Session(engines[kind])
    tokenizer = load_tokenizer(engines[kind].folder)
    for prompt in PROMPTS:
        found = genai_greedy(model, tokenizer.encode(prompt), 48)
        assert len(found) > 0
        assert found == greedy(session, tokenizer.encode(prompt), 48)[: len(found)]


def test_the_training_log_and_the_perplexities_are_kept():
    rows = [json.loads(line) for line in (EXAMPLE / "training_log.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in rows} == {"base", *SLICES}
    scores = json.loads((EXAMPLE / "perplexity.json").read_text())
    for name in SLICES:
        assert min(SLICES, key=lambda expert: scores[expert][name]) == name
        assert np.isfinite(list(scores[name].values())).all()
