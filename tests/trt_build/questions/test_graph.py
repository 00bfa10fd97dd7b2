"""The second question: sound graphs compute what their codes say, and a fault of nodes or edges is found."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import pytest
from decoding import KINDS, each
from engine_faults import FAULTS, with_fault

from export.provider import PROVIDERS
from trt_build.ort.device import Device
from trt_build.ort.questions.graph import ask_about_graph
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


@pytest.mark.needs_kernels
@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.at == "graph"])
def test_what_the_first_question_cannot_see_the_second_does(built, tmp_path, name):
    engine, model = built("phixtral", "int4", "moeship")
    wrong = with_fault(engine, tmp_path / "wrong", FAULTS[name], network(model))
    assert ask_about_weights(wrong, model).passed is True
    assert ask_about_graph(wrong, model, TOKENS).passed is False
