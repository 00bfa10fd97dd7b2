"""`moeship verify` asks both questions, and `moeship build` the first; a wrong engine fails both commands."""

from __future__ import annotations

import argparse
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
