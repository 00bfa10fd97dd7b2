"""`moeship verify` asks both questions, and `moeship build` the first; a wrong engine fails both commands."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
from engine_faults import FAULTS, with_fault

from cli.verify import answer_lines
from trt_build.build_engine import add_arguments
from trt_build.comparison.evaluation_text import read_texts
from trt_build.ort import command
from trt_build.ort.verify import verify_engine


@pytest.fixture
def wrong(built, tmp_path):
    """An int8 engine with one bias of zero, which text does not show."""
    engine, model = built("phixtral", "int8", "onnxruntime")
    fault = FAULTS["one bias of zero"]
    return with_fault(engine, tmp_path / "wrong", fault, model.family.network(model.weights.checkpoint.config))


def test_verify_reports_both_answers_and_fails_by_the_first(wrong, tiny_checkpoint):
    verification = verify_engine(wrong, str(tiny_checkpoint), read_texts([]), 64, lambda _: None)
    weights, graph = verification.to_json()["questions"]
    assert (weights["passed"], graph["passed"]) == (False, True)
    assert verification.failures[0] == weights["failures"][0]
    lines = answer_lines(verification.questions)
    assert lines[0] == "Are these the checkpoint's weights? NO"
    assert "  layer 1, bias transformer.h.1.mixer.out_proj.bias, row 3: found 0, expected" in lines[2]
    assert lines[3] == "Does the graph compute what the codes say? yes"
    assert lines[4].startswith("  64 tokens: logits off by ")


@pytest.mark.parametrize("flags", [[], ["--unchecked"]])
def test_a_build_asks_the_first_question_unless_it_is_told_not_to(wrong, tiny_checkpoint, monkeypatch, flags):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(
        [str(tiny_checkpoint), "--output", str(Path("engine")), "--precision", "int8", *flags]
    )
    monkeypatch.setattr(command, "build_engine", lambda *_: wrong)
    failure = command.build(arguments, None).failure
    if flags:
        assert failure is None
    else:
        assert f"its weights are not those of {tiny_checkpoint}: layer 1, bias transformer.h.1.mixer" in failure


def test_a_cost_past_its_limits_names_the_layer_and_the_role_that_cost_most(built, tiny_checkpoint, tmp_path):
    engine, model = built("phixtral", "int8", "onnxruntime")
    network = model.family.network(model.weights.checkpoint.config)
    wrong = with_fault(engine, tmp_path / "wrong", FAULTS["experts' second of zeros"], network)
    verification = verify_engine(wrong, str(tiny_checkpoint), read_texts([]), 64, lambda _: None)
    [told] = [text for text in verification.failures if "costs most" in text]
    assert told.startswith("the part that costs most is the experts of layer 1: ")
    assert " nats of mean KL over 64 tokens, with all else the checkpoint's; all parts together " in told
    assert {part.layer for part in verification.cost.parts if part.role == "expert"} == {0, 1, 2}


def test_a_graph_that_is_past_the_limits_is_told_from_stored_weights_that_are_not(built, tiny_checkpoint, tmp_path):
    engine, model = built("phixtral", "int8", "onnxruntime")
    network = model.family.network(model.weights.checkpoint.config)
    wrong = with_fault(engine, tmp_path / "wrong", FAULTS["another layer's queries"], network)
    verification = verify_engine(wrong, str(tiny_checkpoint), read_texts([]), 64, lambda _: None)
    [told] = [text for text in verification.failures if text.startswith("all weights as the engine stores them cost ")]
    assert "within the limit: what is past it comes from the graph, or from rounded activations" in told


def test_the_weights_of_an_engine_that_names_no_method_are_not_asked_about(built, tiny_checkpoint):
    engine, _ = built("phixtral", "int8", "onnxruntime")
    precision = engine.manifest.precision
    roles = {role: replace(stored, methods=()) for role, stored in precision.roles.items()}
    engine = replace(engine, manifest=replace(engine.manifest, precision=replace(precision, roles=roles)))
    verification = verify_engine(engine, str(tiny_checkpoint), read_texts([]), 64, lambda _: None)
    weights, graph = verification.questions
    assert weights.unasked == "engine.json does not say by which method its codes were chosen; build the engine again"
    assert (weights.passed, graph.passed, verification.failures) == (None, True, ())
