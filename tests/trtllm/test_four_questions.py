"""`moeship verify` asks the four questions of an engine that the stand-in built and runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from html_pages import Page
from safetensors.numpy import load_file, save_file
from trtllm.building import build, manifest_of
from trtllm.library import install_programs

from cli.main import main
from trt_build.comparison.parity import THRESHOLDS, measure, near_ties
from trt_build.engine_files import record_files
from trt_build.report.visible import number
from trt_build.trtllm.engine import open_trtllm_engine, write_trtllm_manifest
from trt_build.trtllm.questions.logits import (
    GENERATION_LIMITS,
    ask_about_cost,
    ask_about_generation,
    ask_about_logits,
    judged_differences,
)

TOKENS = "24"


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory, torch_python):
    with pytest.MonkeyPatch.context() as patch:
        yield install_programs(tmp_path_factory.mktemp("programs") / "bin", patch, torch_python)


def verified(capfd, engine, reference, *flags):
    """Exit status, the printed JSON, and what went to stderr."""
    status = main(["verify", str(engine), "--reference", str(reference), "--tokens", TOKENS, "--json", *flags])
    told = capfd.readouterr()
    return status, json.loads(told.out) if told.out else None, told.err


def test_the_four_questions_of_a_sound_engine(copied_engine, small_phixtral, capfd, monkeypatch):
    monkeypatch.setenv("STANDIN_ACTIVATIONS", "float16")
    status, found, _ = verified(capfd, copied_engine, small_phixtral)
    assert status == 0
    weights, graph, cost = found["questions"]
    assert [answer["passed"] for answer in (weights, graph, cost)] == [True] * 3
    assert weights["largest"] == {"int4 with a scale a row": weights["largest"]["int4 with a scale a row"]}
    assert weights["asked_of"] == manifest_of(copied_engine)["questions"][0]["asked_of"]
    assert graph["num_tokens"] == 24
    assert 1e-6 < graph["logits"] <= graph["allowed"]  # float16 between the operations
    assert found["mean_kl"] == pytest.approx(cost["mean_kl"], rel=0.05)  # the quantiser's, by either
    assert 0.5 < cost["routing_agreement"] <= 1
    assert set(found["serving"]) == {"generation"}
    assert found["serving"]["generation"]["positions"] == 12
    assert manifest_of(copied_engine)["verification"] == found
    assert main(["verify", str(copied_engine), "--reference", str(small_phixtral), "--tokens", TOKENS]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "Are these the checkpoint's weights? yes"
    assert lines[2] == "Does the graph compute what the codes say? yes"
    assert lines[4] == "What did the quantiser cost? within its limits"
    assert any(line.startswith("served in generation as scored") for line in lines)


def test_a_report_of_an_engine_that_can_run_shows_its_figures(copied_engine, small_phixtral, tmp_path, capfd):
    out = tmp_path / "report.html"
    status, found, _ = verified(capfd, copied_engine, small_phixtral, "--report", str(out))
    assert status == 0
    text = Page(out.read_text()).text
    for words in (
        f"{number(found['mean_kl'])} ≤ ", "in generation: largest difference",
        "int4 with a scale a row: error of a row",
        "layer 1", "Its text is not shown.", "Where they differ most",
    ):  # fmt: skip
        assert words in text, words


def test_the_cost_of_rank_files_is_told_apart_over_the_ids_that_stand_for_text(copied_engine, small_phixtral, capfd):
    """All parts together are the third question, asked of the same tokens."""
    status, found, _ = verified(capfd, copied_engine, small_phixtral, "--cost", "experts")
    cost, whole = found["cost"], found["questions"][2]
    assert status == 0
    assert cost["tokens"] == whole["num_tokens"] == 24
    assert cost["whole"]["mean_kl"] == pytest.approx(whole["mean_kl"], rel=1e-3)
    parts = {(part["role"], part.get("layer"), part.get("expert")): part["mean_kl"] for part in cost["parts"]}
    assert {("attention", 0, None), ("expert", 1, None), ("expert", 1, 2)} <= set(parts)
    assert all(0 <= kl < 1 for kl in parts.values())


def test_experts_per_token_that_the_build_overrode_are_a_finding(tmp_path, small_phixtral, capfd):
    build(small_phixtral, tmp_path / "engine", precision="fp16", experts_per_token=1)
    status, found, _ = verified(capfd, tmp_path / "engine", small_phixtral)
    assert status == 0
    assert found["findings"][0] == (
        "the engine takes 1 experts per token, and the checkpoint's config.json says 2: the reference was computed "
        "with 1; that is right where the engine was built with --experts-per-token"
    )


def test_rank_files_that_are_gone_leave_the_answer_of_the_build(copied_engine, small_phixtral, capfd):
    folder = copied_engine.with_name("engine.checkpoint")
    moved = folder.rename(folder.with_name("elsewhere"))
    status, found, _ = verified(capfd, copied_engine, small_phixtral)
    weights, graph, cost = found["questions"]
    assert (status, weights["passed"]) == (0, True)
    digest = hashlib.sha256((moved / "rank0.safetensors").read_bytes()).hexdigest()
    assert weights["asked"] == f"when the engine was built, of rank files that are gone (SHA-256 {digest[:12]}…)"
    assert weights["asked_of"].keys() == {"config.json", "rank0.safetensors"}
    assert weights["asked_of"]["rank0.safetensors"] == digest
    assert (graph["passed"], cost["passed"]) == (None, None)
    assert graph["unasked"] == f"the rank files that engine was built from are not in {folder}"
    status, found, _ = verified(capfd, copied_engine, small_phixtral, "--trtllm-checkpoint", str(moved))
    assert [answer["passed"] for answer in found["questions"]] == [True] * 3
    assert "asked" not in found["questions"][0]
    (moved / "config.json").write_text("{}")
    status, found, _ = verified(capfd, copied_engine, small_phixtral, "--trtllm-checkpoint", str(moved))
    assert "of rank files that are changed since (SHA-256" in found["questions"][0]["asked"]


def test_an_engine_that_was_not_asked_says_so(tmp_path, small_phixtral, capfd):
    outcome = build(small_phixtral, tmp_path / "engine", precision="int8", unchecked=True)
    assert outcome.verification.questions[0].unasked == "the build was told not to"
    assert manifest_of(outcome.engine.folder)["questions"] == []
    _, found, _ = verified(capfd, outcome.engine.folder, small_phixtral)
    assert found["questions"][0]["passed"] is True
    shutil.rmtree(tmp_path / "engine.checkpoint")
    _, found, _ = verified(capfd, outcome.engine.folder, small_phixtral)
    assert found["questions"][0]["unasked"] == f"the rank files are not in {tmp_path / 'engine.checkpoint'}"


def rewritten(engine, edit):
    """Change what the stand-in's engine holds, and its record."""
    manifest = open_trtllm_engine(engine).manifest
    edit(engine)
    write_trtllm_manifest(engine, replace(manifest, files=record_files(engine)))


def spoil_dense(engine):
    tensors = load_file(engine / "rank0.engine")
    tensors["transformer.layers.1.attention.dense.bias"][::2] += np.float16(0.5)  # LayerNorm hides a shift of all
    save_file(tensors, engine / "rank0.engine")


def one_expert_less(engine):
    config = json.loads((engine / "config.json").read_text())
    config["pretrained_config"]["moe"]["top_k"] = 1
    (engine / "config.json").write_text(json.dumps(config))


def test_an_engine_that_computes_something_else_fails_by_the_second_question(copied_engine, small_phixtral, capfd):
    rewritten(copied_engine, spoil_dense)
    status, found, told = verified(capfd, copied_engine, small_phixtral)
    weights, graph, _ = found["questions"]
    assert (status, weights["passed"], graph["passed"]) == (1, True, False)
    assert "the logits differ, first at position 0 of window 1: found" in told


def test_an_engine_of_another_number_of_experts_fails_by_the_first_and_the_second(copied_engine, small_phixtral, capfd):
    rewritten(copied_engine, one_expert_less)
    status, found, _ = verified(capfd, copied_engine, small_phixtral)
    weights, graph, _ = found["questions"]
    assert (status, weights["passed"], graph["passed"]) == (1, False, False)
    assert weights["failures"] == ["config.json, pretrained_config: moe: top_k is 1, expected 2"]


def test_another_models_checkpoint_and_a_flag_of_the_other_backend_are_one_error(
    copied_engine, small_phixtral, packable_phixtral, tiny_engine, capfd
):
    status, _, told = verified(capfd, copied_engine, packable_phixtral)
    assert status == 2
    assert "they are not the same model; name the checkpoint that the engine was built from" in told
    status, _, told = verified(capfd, tiny_engine, small_phixtral, "--trtllm-checkpoint", "x")
    assert (status, "--trtllm-checkpoint: for engines of tensorrt-llm only" in told) == (2, True)


# Figures by hand ------------------------------------------------------------------------------------------------------


def test_logits_are_judged_before_the_first_near_tie_that_differs():
    expected = np.float32([[0, 4], [2, -2], [1, 1]])
    routers = np.float32([[[5, 1, 0], [3, 2.999, 0], [2, 1, 0]]])  # of position 1 the two largest are nearly equal
    assert near_ties(routers, 1, 0.001, 3).tolist() == [False, True, False]
    assert near_ties(routers, 3, 0.001, 3).tolist() == [False] * 3
    found = expected + np.float32([[0, 0.004], [0.4, 0], [0.4, 0]])
    judged = judged_differences(found, expected, routers, 1, "float16")
    assert judged.tolist() == pytest.approx([0.001], rel=1e-3)
    assert len(judged_differences(expected, expected, routers, 1, "float16")) == 3
    answer = ask_about_logits([judged], 3, "float16")
    assert (answer.passed, answer.figures["num_tokens"], answer.figures["behind_near_ties"]) == (True, 1, 2)
    judged = judged_differences(found, expected, None, 1, "float16")
    first, second = ask_about_logits([judged[:1], judged], 4, "float16").failures
    assert first.startswith("the logits differ, first at position 1 of window 2: found 1.00e-01")
    assert second.startswith("the logits differ by 5.05e-02 of the largest on average, allowed 2e-03; ")
    judged = judged_differences(found * np.nan, expected, routers, 1, "float16")
    assert len(ask_about_logits([judged], 3, "float16").failures) == 2
    assert ask_about_logits([judged[:0]], 3, "float16").passed is None


def test_the_cost_is_that_of_the_codes_alone():
    expected = np.float32([[0, 0], [0, np.log(3)]])
    found = np.float32([[0, 0], [0, 0]])
    limits = replace(THRESHOLDS["int4"], judged_tokens=2)
    answer = ask_about_cost([measure(found, expected, [0, 1])], limits)
    kl = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)  # of the second position; the first has none
    assert answer.figures["mean_kl"] == pytest.approx(kl / 2)
    assert answer.figures["max_kl"] == pytest.approx(kl)
    assert answer.passed is False


def test_generation_is_relative_to_the_largest_logit_of_the_context():
    way = ask_about_generation(np.float32([[1, 2], [3, -8]]), np.float32([[1, 2.5], [3, -10]]), 7)
    assert way.differences.tolist() == [0.05, 0.2]
    assert way.places == ("position 7", "position 8")
    told = way.failure(GENERATION_LIMITS["float32"])
    assert told.endswith("; an engine of TensorRT-LLM shows no layer, so the network or its build is to be looked at")
