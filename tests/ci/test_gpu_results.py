"""The JSON of a GPU run: kept after every step, taken up by the next run, and of one machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.errors import ConfigError, MoeshipError

SCRIPTS = Path(__file__).parents[2] / "ci" / "gpu"
MACHINE = {"gpus": [{"name": "A100", "sm": 80}], "driver": "590.44.01", "packages": {"tensorrt_llm": "1.2.1"}}
PLACE = ("small", "fp16", "engine")


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu_results

    return gpu_results


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.json"


@pytest.fixture
def opened(module, path):
    """The results as a new run opens them."""
    return lambda **changes: module.open_results(path, {**MACHINE, **changes}, "0.1.0 abc")


def refuse(_found):
    raise AssertionError("the step is done")


def fail(_found):
    raise MoeshipError("building the engine: no memory")


def test_what_is_done_with_the_same_inputs_is_not_done_again(opened):
    found = opened().step(PLACE, {"tp": (1, 2)}, lambda found: found.update(bytes=5))
    assert found["bytes"] == 5
    assert opened().step(PLACE, {"tp": (1, 2)}, refuse) == found
    assert opened().step(PLACE, {"tp": (1, 4)}, lambda found: found.update(bytes=6))["bytes"] == 6


def test_what_failed_did_not_pass_or_was_cut_off_is_done_again(opened, path):
    assert opened().step(PLACE, {}, fail) is None
    entry = json.loads(path.read_text())["models"]["small"]["engines"]["fp16"]["engine"]
    assert (entry["status"], entry["moeship"]) == ("failed", "0.1.0 abc")
    assert opened().step(PLACE, {}, lambda found: found.update(failures=["mean KL 3"])) is not None

    def interrupt(found):
        found["half"] = True
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened().step(PLACE, {}, interrupt)
    results = opened()
    assert results.data["models"]["small"]["engines"]["fp16"]["engine"]["status"] == "running"
    assert results.step(PLACE, {}, lambda found: None)["status"] == "done"


def test_every_failure_is_named_and_an_unforeseen_one_keeps_its_traceback(opened, path):
    results = opened()
    results.step(PLACE, {}, fail)
    results.step(("small", "reference"), {}, lambda found: {}["answers"])
    results.step(("small", "int4", "verify"), {}, lambda found: found.update(failures=["mean KL 3", "top-1 2"]))
    data = json.loads(path.read_text())
    assert data["errors"] == results.errors()
    [reference, engine] = data["errors"]
    assert engine == "small fp16 engine: MoeshipError: building the engine: no memory"
    assert reference.startswith("small reference: Traceback")
    assert reference.endswith("KeyError: 'answers'")
    assert data["failures"] == ["small int4 verify: mean KL 3", "small int4 verify: top-1 2"]


def test_what_a_step_found_is_in_the_file_while_it_works(module, opened, path):
    results = opened()

    def work(found):
        found["ready_s"] = 3
        results.save()
        kept = json.loads(path.read_text())["models"]["small"]["engines"]["fp16"]["serve"]
        assert (kept["status"], kept["ready_s"]) == ("running", 3)

    assert results.step(("small", "fp16", "serve"), {}, work)["status"] == "done"


def test_lists_of_numbers_are_one_line_and_texts_stay_as_they_are(opened, path):
    texts = ["[\n 1,\n 2\n]", "[ 1 ]", "x"]
    opened().step(PLACE, {}, lambda found: found.update(samples=[[0.5, -1e-07, 3], []], texts=texts))
    text = path.read_text()
    assert "[0.5, -1e-07, 3]" in text
    entry = json.loads(text)["models"]["small"]["engines"]["fp16"]["engine"]
    assert (entry["samples"], entry["texts"]) == ([[0.5, -1e-07, 3], []], texts)


def test_another_machines_results_are_not_mixed_with_these(opened, path):
    opened().save()
    opened(driver_cuda="13.2").save()  # is told, and decides nothing
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"results of another machine or container \(driver 590.44.01, here 600.1\)"):
        opened(driver="600.1")
    assert path.read_bytes() == before
    for text in ("{", "[]", '{"format_version": 7, "machine": {}}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not the results of an earlier run"):
            opened()


def test_the_summary_says_what_is_known_of_each_engine(module, opened):
    level = {
        "concurrency": 4, "tokens_per_s": {"median": 812.4}, "client_busy": 0.31,
        "time_to_first_token_s": {"p50": 0.012, "p99": 0.02, "n": 16}, "inter_token_s": {"n": 0},
    }  # fmt: skip
    parity = {"mean_kl": 2e-6, "mean_decoded_kl": 3e-6, "top1_agreement": 0.999, "perplexity_increase": 1e-4}
    results = opened()
    results.step(("small", "fp16", "checkpoint"), {}, lambda found: None)
    results.step(PLACE, {}, lambda found: found.update(bytes=12_300_000))
    results.step(("small", "fp16", "verify"), {}, lambda found: found.update(parity))

    def serve(found):
        texts = [{"equals_reference": True}, {"equals_reference": False}]
        found.update(texts=texts, levels=[level, {"concurrency": 9, "error": "x"}])
        fail(found)

    results.step(("small", "fp16", "serve"), {}, serve)
    assert module.summary(results) == [
        "small fp16: checkpoint 0 s, engine 0 s, 12.3 MB",
        "  against the reference: mean KL 2.00e-06 scored and 3.00e-06 decoded, top-1 99.9%, perplexity +0.01%",
        "  greedy texts as the reference's: 1 of 2",
        "    4 streams: 812 tokens/s; first token 12.00 ms (p99 20.00), then not measured; "
        "the client took 31% of a core",
        "FAILED small fp16 serve: MoeshipError: building the engine: no memory",
    ]
