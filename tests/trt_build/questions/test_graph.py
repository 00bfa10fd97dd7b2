"""The second question: sound graphs compute what their codes say, and a fault of nodes or edges is found."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import pytest
from decoding import KINDS, each
from dense_checkpoints import write_dense_checkpoint
from engine_faults import FAULTS, with_fault

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.provider import PROVIDERS
from export.reference.model import Reference
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.device import Device
from trt_build.ort.engine import open_engine
from trt_build.ort.questions import graph_begins
from trt_build.ort.questions.graph import ask_about_graph
from trt_build.ort.questions.graph_begins import where_graph_begins
from trt_build.ort.questions.layer_outputs import stored_or_float32
from trt_build.ort.questions.stored_weights import open_stored_weights
from trt_build.ort.questions.weights import ask_about_weights

TOKENS = np.random.default_rng(3).integers(0, 256, 96).tolist()
# Of nodes and edges; the first question finds most of them too.
COMPUTED = [
    "another layer's queries", "a residual taken twice", "another layer's norm",
    "attention's scale times 1.03", "one position less in the window", "interleaved rotary", "no rotary",
    "one expert less in a layer", "another activation", "head bias dropped", "biases of the experts' second dropped",
]  # fmt: skip


def network(model):
    return model.family.network(model.weights.checkpoint.config)


@pytest.mark.parametrize("family", ["phixtral", "mixtral"])
@pytest.mark.parametrize(("precision", "kernels"), each(KINDS, apart=True))
def test_a_sound_graph_differs_by_the_order_of_summation_alone(built, family, precision, kernels):
    engine, model = built(family, precision, kernels)
    answer = ask_about_graph(engine, model, TOKENS)
    assert answer.failures == ()
    assert answer.figures["logits"] <= 5e-6
    assert max(answer.figures["routers"].values()) <= 5e-6


@pytest.mark.needs_kernels
@pytest.mark.parametrize("bits", [(2, 3, 4, 5, 6, 8), (6, 5, 8, 2, 3, 4)])
def test_every_number_of_bits_computes_what_its_codes_say(built, tmp_path, bits):
    embedding, qkv, out, first, second, head = bits
    rules = [
        {"role": "embedding", "bits": embedding},
        {"role": "head", "bits": head},
        {"weight": "qkv", "bits": qkv},
        {"weight": "out", "bits": out},
        {"weight": "first", "bits": first},
        {"weight": "second", "bits": second, "block": 32},
    ]
    recipe = tmp_path / f"bits-{''.join(map(str, bits))}.json"
    recipe.write_text(json.dumps({"default": {"bits": 4, "block": 64}, "rules": rules}))
    engine, model = built("mixtral", recipe, "moeship")
    answer = ask_about_graph(engine, model, TOKENS)
    assert answer.failures == ()
    assert answer.figures["logits"] <= 5e-6
    assert ask_about_weights(engine, model).failures == ()
    expected = {"Embedding": {(embedding, 64)}, "Experts": {(first, 64, second, 32)},
                "BlockLinear": {(qkv, 64), (out, 64), (head, 64)}}  # fmt: skip
    found = {}
    for node in onnx.load(str(engine.folder / "model.onnx"), load_external_data=False).graph.node:
        stated = {entry.name: entry.i for entry in node.attribute}
        names = ("bits", "block_size", "second_bits", "second_block_size")
        if node.domain == "moeship":
            found.setdefault(node.op_type, set()).add(tuple(stated[name] for name in names if name in stated))
    assert found == expected


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_cuda_graph_on_the_cpu_keeps_its_own_limit(built, precision):
    engine, model = built("phixtral", precision, "onnxruntime", "cuda")
    provider = dataclasses.replace(PROVIDERS["cuda"], runtime_name="CPUExecutionProvider", options={})
    answer = ask_about_graph(engine, model, TOKENS, device=Device(provider=provider, kind="cpu"))
    assert answer.failures == ()
    assert 1e-5 < answer.figures["logits"] <= answer.figures["allowed"] == 5e-3


@pytest.mark.parametrize(
    ("family", "precision", "kernels"),
    each([("phixtral", "int4", "moeship"), ("mixtral", "int8", "onnxruntime")], apart=True),
)
def test_each_fault_of_the_graph_is_found_at_ten_times_the_limit(built, tmp_path, family, precision, kernels):
    engine, model = built(family, precision, kernels)
    small = {}
    for name in COMPUTED:
        if FAULTS[name].needs_bias and family == "mixtral":
            continue
        wrong = with_fault(engine, tmp_path / "wrong", FAULTS[name], network(model))
        answer = ask_about_graph(wrong, model, TOKENS)
        # A mixture of another activation has other shapes, and ONNX Runtime refuses to run it.
        largest = answer.figures.get("logits", np.inf if answer.failures else 0.0)
        if not answer.failures or not largest >= 10 * 1e-4:
            small[name] = largest
    assert small == {}


@pytest.mark.needs_kernels
def test_a_failure_names_the_layer_where_the_difference_begins(built, tmp_path):
    engine, model = built("phixtral", "int4", "moeship")
    wrong = with_fault(engine, tmp_path / "a", FAULTS["one expert less in a layer"], network(model))
    told = ask_about_graph(wrong, model, TOKENS).failures[0]
    begin = "so it begins in the experts of layer 1, or in attention, norms or router of layer 2: found "
    assert told.startswith(f"the router logits of layer 2 are the first that differ, {begin}")
    wrong = with_fault(engine, tmp_path / "b", FAULTS["head bias dropped"], network(model))
    told = ask_about_graph(wrong, model, TOKENS).failures[0]
    assert told.startswith(
        "the logits differ, and no router's do, so it begins in the experts of layer 2 or behind them: "
    )
    assert told.endswith("; what the layers give differs by no more than 1e-04 of the largest, so it begins behind the "
                         "layers")  # fmt: skip


SIZES = {"hidden_size": 128, "ffn_size": 160, "num_layers": 2}
IN_A_LAYER = {
    "attention's scale times 1.03": "attention of layer 1",
    "another layer's queries": "attention of layer 1",
    "a residual taken twice": "MLP of layer 1",
    "another layer's norm": "attention of layer 1",
}


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_fault_in_a_layer_of_a_dense_model_is_told_by_layer_and_part(tmp_path, made_once, precision, monkeypatch):
    source = made_once("dense-llama", lambda folder: write_dense_checkpoint(folder, seed=3, family="llama", **SIZES))
    options = {"checkpoint": str(source), "precision": precision}
    built = made_once(f"dense-llama-{precision}", lambda folder: build_engine(BuildOptions(output=folder, **options)))
    engine, model = open_engine(built), read_model(open_checkpoint(source))
    for name, part in IN_A_LAYER.items():
        wrong = with_fault(engine, tmp_path / "wrong", FAULTS[name], network(model))
        [told] = ask_about_graph(wrong, model, TOKENS).failures
        assert told.startswith("the logits differ: found ")
        assert f"; it begins in the {part}, norms included: found " in told
    # Without a fault no part reaches a tenth of the limit.
    monkeypatch.setattr(graph_begins, "PART_LIMITS", {"float32": 1e-5})
    content = stored_or_float32(engine, "model_scoring.onnx")
    reference = Reference(dataclasses.replace(model, weights=open_stored_weights(engine, model)))
    told = where_graph_begins(engine, content, reference, None, TOKENS, lambda _: None, None)
    assert told.startswith("what the layers give differs by no more than 1e-05 of the largest")


@pytest.mark.needs_kernels
def test_a_fault_in_a_layer_of_a_mixture_is_told_by_part(built, tmp_path):
    engine, model = built("phixtral", "int4", "moeship")
    for name, part in {**IN_A_LAYER, "one expert less in a layer": "experts of layer 1"}.items():
        wrong = with_fault(engine, tmp_path / "wrong", FAULTS[name], network(model))
        told = ask_about_graph(wrong, model, TOKENS).failures[-1]
        if name == "a residual taken twice":  # attention and experts add to one residual, and their sum is wrong
            part = "residual's sum of layer 1"
        assert f"; it begins in the {part}, norms included: found " in told


@pytest.mark.needs_kernels
@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.at == "graph"])
def test_what_the_first_question_cannot_see_the_second_does(built, tmp_path, name):
    engine, model = built("phixtral", "int4", "moeship")
    wrong = with_fault(engine, tmp_path / "wrong", FAULTS[name], network(model))
    assert ask_about_weights(wrong, model).passed is True
    assert ask_about_graph(wrong, model, TOKENS).passed is False
