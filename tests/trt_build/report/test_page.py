"""The page of a report: what it shows, and that nothing of others becomes markup and nothing is loaded."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from html_pages import Page, loads_nothing

from trt_build.comparison.cost import Cost, Grain, PartCost
from trt_build.comparison.evaluation_text import EvaluationText
from trt_build.comparison.parity import THRESHOLDS
from trt_build.comparison.serving_ways import SERVING_LIMITS
from trt_build.report.contents import Choice, GreedyText, Place, Report, ReportedEngine, Token
from trt_build.report.page import page
from trt_build.report.tables import COLOURED_DECADES

HOSTILE = "<script>alert('1')</script>\u202e\x1b[31m\"&"


def part(mean, role="all", layer=None, expert=None):
    return PartCost(role=role, layer=layer, expert=expert, mean_kl=mean, standard_error=mean / 10, max_kl=9 * mean)


def record(scale, failures=(), experts=True):
    """The result of a verification, as engine.json has it; `scale` is the mean KL."""
    parts = [part(scale / 100, "embedding"), part(scale / 50, "head")]
    for layer in range(2):
        parts += [part(scale / (4 + layer), "attention", layer), part(scale / 8, "expert", layer)]
        parts += [part(scale / 20 / (1 + one), "expert", layer, one) for one in range(3) if experts]
    cost = Cost(grain=Grain.EXPERTS, num_tokens=64, num_windows=2, whole=part(scale), parts=tuple(parts))
    return {
        "mean_kl": scale, "mean_decoded_kl": scale, "p99_kl": 3 * scale, "max_kl": 9 * scale, "top1_agreement": 0.9,
        "clear_top1_agreement": 0.99, "engine_perplexity": 101.0, "reference_perplexity": 100.0,
        "perplexity_increase": 0.01, "routing_agreement": 0.95, "routing_by_layer": [0.96, 0.94],
        "max_logit_difference": 3.0, "max_decoded_difference": 2.0, "failures": list(failures),
        "findings": [f"a finding {HOSTILE}"],
        "questions": [
            {"question": "Are these the checkpoint's weights?", "passed": True,
             "largest": {"int4 in blocks of 64": {"matrix": 0.098, "row": 0.5, "factor": 0.002}},
             "limits": {"int4 in blocks of 64": {"matrix": 0.25, "row": 0.44}}},
            {"question": "Does the graph compute what the codes say?", "passed": False, "logits": 0.25, "allowed": 1e-4,
             "routers": {"0": 1e-7, "1": 2e-7}},
        ],
        "serving": {"decoding": {"positions": 8, "largest": 0.02, "mean": 0.5}},
        "cost": cost.to_json(),
    }  # fmt: skip


def engine(name, **fields):
    values = {
        "facts": (("precision", "int4"), ("size", "4.1 MB")), "record": record(0.04), "limits": THRESHOLDS["int4"],
        "serving": SERVING_LIMITS["int4"], "kl": np.geomspace(1e-5, 1, 64),
    }  # fmt: skip
    return ReportedEngine(name=name, **{**values, **fields})


def report(*engines):
    choice = Choice(text=f" a{HOSTILE}", probability=0.5)
    return Report(
        model=f"model {HOSTILE}",
        facts=(("family", HOSTILE),),
        engines=engines,
        places=(
            Place(
                number=7, before=f"before {HOSTILE}\n", following="\t", reference=Choice(text="b", probability=0.25),
                engines=tuple(choice for _ in engines), kl=tuple(0.75 for _ in engines),
            ),
        ),
        texts=(
            GreedyText(
                prompt=HOSTILE,
                engines=(
                    (Token(text="same"), Token(text=HOSTILE, instead=f"other {HOSTILE}")),
                    *[None] * (len(engines) - 1),
                ),
            ),
        ),
        text=EvaluationText(names=(HOSTILE,), content="text"),
        num_tokens=64,
        mixture_layers=(0, 1),
        versions={"numpy": "2.0"},
        command=f"moeship verify '{HOSTILE}'",
    )  # fmt: skip


TWO = report(engine("one"), engine(f"two {HOSTILE}", record=record(1e-4, failures=[f"it failed {HOSTILE}"])))


def test_the_page_loads_and_runs_nothing_and_what_others_wrote_is_text():
    content = page(TWO)
    assert loads_nothing(content)
    assert "<script" not in content
    assert "\x1b" not in content
    assert "\u202e" not in content
    assert not loads_nothing(content.replace("<main>", "<main><script>1</script>"))  # the check itself can fail
    assert not loads_nothing(content.replace("<main>", '<main onload="1">'))
    with pytest.raises(AssertionError):
        Page(content.replace("</section>", "", 1))


def test_the_page_is_for_phones_and_print_and_both_colour_schemes():
    content = page(TWO)
    names = {found.get("name"): found.get("content") for found in Page(content).named("meta")}
    assert names["viewport"] == "width=device-width, initial-scale=1"
    for rule in ("@media print", "@media (max-width: 699px)", "@media (prefers-color-scheme: dark)"):
        assert rule in content


def test_every_section_is_there_with_its_figures():
    content = page(TWO)
    found = Page(content)
    titles = re.findall(r"<h2>(.*?)</h2>", content)
    assert titles == [
        "Engines", "Four questions", "What the quantiser cost, part by part", "The same experts, layer by layer",
        "How far apart, token by token", "Where they differ most", "What they write", "How this was measured",
    ]  # fmt: skip
    text = found.text
    for words in (
        "Verification of 2 engines of model", "0.040 ≤ 0.060 ✓", "1.0e−4 ≤ 0.060 ✓", "0.098 ≤ 0.25 ✓", "0.50 ≤ 0.44",
        "0.25 ≤ 1.0e−4 ✗", "0.50 ≤ 0.010 ✗", "90.0 % ≥ 78.0 % ✓", "+1.0 % ≤ +3.0 % ✓", "101.0 (100.0)",
        "failed:it failed ", "a finding ", "SHA-256 982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1",
        "64 tokens of ", "version of numpy", "In the text: ⇥", "position 7", "1 of 2 tokens are not the reference's",
        "it would have said other ", "Its text is not shown.",
    ):  # fmt: skip
        assert words in text, words
    # Each engine: verdict, weights yes and the graph NO.
    assert (text.count("yes ✓"), text.count("within its limits ✓")) == (2, 2)
    assert len(found.named("svg")) == 2 + 1 + 1 + 3 * 2  # charts, and two swatches in each of three legends


def test_a_figure_of_weights_is_marked_as_missed_only_where_the_question_failed():
    """A band of few values may exceed a limit within its scatter."""
    failed = record(0.04)
    failed["questions"][0]["passed"] = False
    text = Page(page(report(engine("sound"), engine("failed", record=failed)))).text
    assert "error of a row0.50 ≤ 0.440.50 ≤ 0.44 ✗" in text
    assert "factor off 10.00200.0020" in text
    assert "error of a matrix0.098 ≤ 0.25 ✓0.098 ≤ 0.25 ✓" in text


def test_what_int8_caches_cost_has_rows_where_an_engine_has_them():
    """What is judged is the figure with float32 activations, where there is one."""
    cached = record(0.03)
    figures = {"kl": 0.0025, "top1": 0.975, "kl_float32_activations": 0.0004, "allowed": 1e-3}
    answer = {"question": "What do keys and values in int8 cost?", "passed": True, "int8_cache": figures}
    cached["questions"] = [*cached["questions"], answer]
    assert "keys and values in int8" not in page(report(engine("a"), engine("b")))
    text = Page(page(report(engine("a"), engine("b", record=cached)))).text
    assert "What do keys and values in int8 cost?–within its limits ✓" in text
    assert "mean KL from floats, nats–0.0025" in text
    assert "the KL with float32 activations–4.0e−4 ≤ 0.0010 ✓" in text


def test_figures_of_weights_that_no_engine_has_take_no_row():
    solved = record(0.03)
    solved["questions"][0]["largest"] = {"int5 in blocks of 32, solved": {"matrix": 0.058}}
    text = page(report(engine("a"), engine("b", record=solved)))
    shown = re.findall(r"(int\d in blocks of \d+(?:, solved)?): ([a-z, 1']+)", text)
    assert [name for recipe, name in shown if recipe.endswith("solved")] == ["error of a matrix"]
    assert [name for recipe, name in shown if not recipe.endswith("solved")] == [
        "factor off 1", "error of a row", "error of a matrix",
    ]  # fmt: skip
    assert "error of a matrix0.098 ≤ 0.25 ✓–" in Page(text).text  # one engine has it, the other one not
    assert "error of a matrix–0.058" in Page(text).text


def test_the_heat_of_a_cost_is_on_one_scale_for_all_engines():
    cells = re.findall(r'<td style="--a:([\d.]+)" title="[^"]*">([^<]*)</td>', page(TWO))
    by_text = {text: float(shade) for shade, text in cells}
    assert by_text["10"] == max(by_text.values()) == 0.7  # attention of layer 0 at 0.04 / 4, in thousandths
    assert by_text["0.025"] == pytest.approx(0.7 * (1 - np.log10(400) / COLOURED_DECADES), abs=0.01)
    assert by_text["40"] == 0.0  # all parts together, which is no part
    assert sorted(by_text, key=lambda text: by_text[text])[-2:] == ["8.0", "10"]


def test_a_cost_that_few_tokens_carry_is_in_italics():
    found = record(0.04)
    found["cost"]["parts"][2]["standard_error"] = 0.0051
    content = page(report(engine("one", record=found)))
    cells = re.findall(r'<td style="[^"]*" title="([^"]*)"( class="few")?>([^<]*)</td>', content)
    assert [cell for cell in cells if cell[1]] == [("± 5.1, the largest of a token 90", ' class="few"', "10")]


def test_an_engine_that_cannot_be_asked_says_why():
    reason = "format 3 <is old>"
    old = {
        **record(0.01),
        "questions": [{"question": "Are these the checkpoint's weights?", "passed": None, "unasked": reason}],
        "cost": {"question": "What did the quantiser cost?", "unasked": reason}, "serving": {},
    }  # fmt: skip
    absent = engine("absent", record=None, kl=None, note="an engine for another machine")
    recorded = engine("recorded", record={"mean_kl": 0.01, "failures": []}, kl=None, note="only recorded")
    text = Page(page(report(engine("old", record=old), absent, recorded))).text
    assert "not asked: format 3 <is old>" in text
    assert "No figures: format 3 <is old>." in text
    assert "absent: an engine for another machine" in text
    assert "No figures: an engine for another machine." in text
    assert "No figures: only recorded." in text
    assert text.count("not verified") == 1 + 4  # the verdict and each question
    assert "not asked: nothing was measured" in text


def test_dense_models_and_unmeasured_engines_leave_sections_out():
    bare = engine("bare", record=None, kl=None)
    empty = dataclasses.replace(report(bare), places=(), texts=(), mixture_layers=())
    titles = re.findall(r"<h2>(.*?)</h2>", page(empty))
    assert titles == ["Engines", "Four questions", "What the quantiser cost, part by part", "How this was measured"]
    assert "Verification of 1 engine of" in page(empty)
