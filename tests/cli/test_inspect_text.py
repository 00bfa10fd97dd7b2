"""`moeship inspect CHECKPOINT --text FILE`: table, JSON and page, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_phi_checkpoint
from granitemoe_checkpoints import write_granitemoe_checkpoint
from html_pages import Page, loads_nothing

from cli.inspect_text import usage_lines
from cli.main import main
from export.architecture import Router
from export.reference.usage import Usage, layer_usage
from trt_build.ort.build import BuildOptions, build_engine

MIXTRAL = Path(__file__).parents[2] / "examples/tiny-mixtral/checkpoint"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("def read(self, size=-1):\n    return self._buffer[:size]\n\nThe file is read as bytes.\n" * 40)
    return path


def inspect(capsys, *words):
    status = main(["inspect", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def random_usage(experts, layers=3, k=2):
    random = np.random.default_rng(1)
    logits = random.standard_normal((layers, 300, experts)).astype(np.float32)
    return Usage(
        num_experts=experts, experts_per_token=k, num_tokens=300, num_windows=1,
        layers=tuple(layer_usage(number, one, Router(), k) for number, one in enumerate(logits)),
    )  # fmt: skip


def test_json_has_the_use_of_each_layer_and_the_text(text, capsys):
    status, out, _ = inspect(capsys, MIXTRAL, "--text", text, "--tokens", 600, "--json")
    values = json.loads(out)
    usage = values["usage"]
    assert status == 0
    assert values["family"] == "mixtral"
    assert usage["text"]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (usage["num_tokens"], usage["num_windows"], len(usage["layers"])) == (600, 2, 3)
    for layer in usage["layers"]:
        assert sum(layer["chosen"]) == 1200
        assert sum(layer["load"]) == pytest.approx(1) == pytest.approx(sum(layer["weight_shares"]))
        assert np.sum(layer["together"]) == 1200  # each token's pair, in both orders


def test_the_table_has_the_loads_of_each_layer(text, capsys):
    status, out, _ = inspect(capsys, MIXTRAL, "--text", text, "--tokens", 600)
    _, json_out, _ = inspect(capsys, MIXTRAL, "--text", text, "--tokens", 600, "--json")
    table = out[out.index("use of experts: 600 tokens in 2 windows of") :].splitlines()
    assert status == 0
    for line, layer in zip(table[2:5], json.loads(json_out)["usage"]["layers"], strict=True):
        words = [word for word in line.split() if word.replace(".", "").isdigit()]
        assert words[0] == str(layer["layer"])
        assert words[1:5] == [f"{100 * share:.1f}" for share in layer["load"]]
        assert words[5:9] == [f"{100 * share:.0f}" for share in layer["weight_shares"]]


def test_experts_per_token_can_be_replaced(text, capsys):
    _, out, _ = inspect(capsys, MIXTRAL, "--text", text, "--tokens", 64, "--experts-per-token", 1, "--json")
    assert [sum(layer["chosen"]) for layer in json.loads(out)["usage"]["layers"]] == [64, 64, 64]


@pytest.mark.parametrize(("experts", "k"), [(4, 2), (8, 2), (40, 8), (4, 4), (4, 1)])
def test_the_columns_of_the_table_are_aligned(experts, k):
    lines = usage_lines(random_usage(experts, k=k))
    place = lines[0].index("entropy") + len("entropy")
    assert [line[place - 1] for line in lines[1:4]] == ["%", "%", "%"]
    assert max(map(len, lines)) <= 140


def test_of_many_experts_the_table_names_the_ends():
    usage = random_usage(40)
    line = usage_lines(usage)[1]
    load = usage.layers[0].load
    assert f"e{load.argmax()} {100 * load.max():.1f} %" in line
    assert f"e{load.argmin()} {100 * load.min():.1f} %" in line


def test_the_page_shows_loads_entropy_and_pairs_and_loads_nothing(text, tmp_path, capsys):
    report = tmp_path / "<b>use.html"
    status, _, _ = inspect(capsys, MIXTRAL, "--text", text, "--tokens", 600, "--report", report)
    content = report.read_text("utf-8")
    page = Page(content)
    assert status == 0
    assert loads_nothing(content)
    assert len(page.named("svg")) == 2 + 2 + 3
    assert "layer 2, expert 3: " in page.text
    assert "experts 2 and 3: " in page.text
    assert "<b>use.html" in page.text


def test_the_page_of_many_experts_has_a_bounded_number_of_cells(tmp_path, capsys):
    from trt_build.comparison.evaluation_text import own_text
    from trt_build.report.usage_page import MOST_CELLS, UsageReport, usage_page

    usage = random_usage(64, layers=12, k=8)
    report = UsageReport(
        model="m", computed="By hand.", facts=(), usage=usage, text=own_text(), versions={}, command="c"
    )
    content = usage_page(report)
    assert content.count("<rect") <= MOST_CELLS + 2 * 12 * 64
    assert "The 4 of 12 layers that are furthest from independence." in Page(content).text


def test_a_page_of_one_expert_a_token_has_no_pairs(text, tmp_path, capsys):
    report = tmp_path / "one.html"
    words = (MIXTRAL, "--text", text, "--tokens", 64, "--experts-per-token", 1, "--report", report)
    assert inspect(capsys, *words)[0] == 0
    assert "there are no pairs" in Page(report.read_text("utf-8")).text


def test_another_family_is_routed_too(text, tmp_path, capsys):
    folder = write_granitemoe_checkpoint(tmp_path / "granite", seed=1)
    status, out, _ = inspect(capsys, folder, "--text", text, "--tokens", 40, "--json")
    assert status == 0
    assert json.loads(out)["usage"]["num_tokens"] == 40


@pytest.mark.parametrize("flags", [("--tokens", "64"), ("--report", "x.html"), ("--tokens", "9", "--report", "x.html")])
def test_flags_of_a_text_are_refused_without_one(flags, capsys):
    status, _, err = inspect(capsys, MIXTRAL, *flags)
    assert status == 2
    verb = "belong" if len(flags) > 2 else "belongs"
    assert f"{verb} to a text; name one with --text FILE" in err
    assert "Traceback" not in err


def test_refusals_name_what_is_wrong(text, tmp_path, capsys):
    dense = write_phi_checkpoint(tmp_path / "dense", seed=1)
    short = tmp_path / "short.txt"
    short.write_text("few words")
    taken = tmp_path / "taken.html"
    taken.write_text("mine")
    cases = [
        ((dense, "--text", text), "is a dense phi: it has no experts"),
        ((MIXTRAL, "--text", short), "expected at least 512, the first window of a measurement of 2048 tokens"),
        ((MIXTRAL, "--text", tmp_path / "absent.txt"), "it cannot be read"),
        ((MIXTRAL, "--text", text, "--tokens", 2), "asked for 2 tokens, expected at least 4"),
        ((MIXTRAL, "--text", text, "--report", tmp_path), "is a folder, expected the name of an HTML file"),
        ((MIXTRAL, "--text", text, "--report", taken), "taken.html"),
    ]
    for words, message in cases:
        status, out, err = inspect(capsys, *words)
        assert (status, out) == (2, "")
        assert message in err
    assert taken.read_text() == "mine"


def test_an_engine_routes_the_text_too(text, tmp_path, capsys):
    engine = build_engine(BuildOptions(checkpoint=str(MIXTRAL), output=tmp_path / "engine", precision="fp32"))
    report = tmp_path / "use.html"
    words = ("--text", text, "--tokens", 600, "--json")
    _, out, _ = inspect(capsys, MIXTRAL, *words)
    status, of_engine, _ = inspect(capsys, engine.folder, *words, "--report", report)
    expected, found = json.loads(out)["usage"], json.loads(of_engine)["usage"]
    assert status == 0
    assert found["text"] == expected["text"]
    for one, other in zip(found["layers"], expected["layers"], strict=True):
        assert one["chosen"] == pytest.approx(other["chosen"], abs=2)  # fp32 differs by the order of summation
        assert one["entropy"] == pytest.approx(other["entropy"], abs=1e-3)
    assert "The engine computed it, at fp32." in Page(report.read_text("utf-8")).text
    assert "use of experts: 64 tokens" in inspect(capsys, engine.folder, "--text", text, "--tokens", 64)[1]
    status, _, err = inspect(capsys, engine.folder, "--tokens", 64)
    assert (status, "--tokens belongs to a text" in err) == (2, True)


def test_a_dense_engine_is_refused(text, tmp_path, capsys):
    dense = write_phi_checkpoint(tmp_path / "dense", seed=1, hidden_size=64, num_heads=4, rotary_dim=16)
    engine = build_engine(BuildOptions(checkpoint=str(dense), output=tmp_path / "engine", precision="fp32"))
    status, out, err = inspect(capsys, engine.folder, "--text", text)
    assert (status, out) == (2, "")
    assert "is a dense phi: it has no experts" in err
