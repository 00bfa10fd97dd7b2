"""Comparing two load tests: that intervals hold the truth as often as they say, and see a difference that is there."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from bench_standin import works
from html_pages import Page, loads_nothing

from cli.bench_charts import ratio_axis
from cli.bench_compare_page import compare_page
from cli.main import main
from clients.bench.compare import compare, unpaired
from clients.bench.kept import Keeper, Level, LoadTest
from clients.bench.load import Load
from clients.bench.records import Record, Run
from clients.bench.report import summarise
from export.errors import ConfigError


def measured(seed, *, count=600, scale=1.0, correlation=0.0, sigma=0.5, name="10/s"):
    """A load of 60 s whose first tokens are lognormal with median `scale` * 0.1 s. With `correlation` the logarithms
    follow each other as an autoregressive process of order one."""
    draws = np.random.default_rng(seed)
    noise = draws.normal(size=count)
    for at in range(1, count):
        noise[at] = correlation * noise[at - 1] + (1 - correlation**2) ** 0.5 * noise[at]
    firsts = scale * 0.1 * np.exp(sigma * noise)
    records = [
        Record(
            index=index, stream=index, due_s=60.0 * index / count, sent_s=0.0, max_tokens=2,
            arrivals=[(60.0 * index / count + first, 1), (60.0 * index / count + first + 0.01, 1)],
            end_s=60.0 * index / count + first + 0.01, finish_reason="length",
        )
        for index, first in enumerate(firsts.tolist())
    ]  # fmt: skip
    load = Load(rate=10.0, duration_s=60.0)
    run = Run(records=records, window_s=60.0, cpu_s=0.0, counting="x")
    report = summarise(run, load, works(), 2)
    return LoadTest(about={}, levels=[Level(name=name, report=report, records=records)])


def difference(a, b, figure):
    [compared] = compare(a, b)
    return next(one for one in compared.differences if one.figure == figure)


def differences(a, b):
    [compared] = compare(a, b)
    return {one.figure: one for one in compared.differences}


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.97])
def test_intervals_of_equal_servers_hold_one_as_often_as_they_say(correlation, monkeypatch):
    """57 of 60 on average. A binomial of 0.95 is below 52 with a probability of 1 %. Requests that depend on those
    before them must not make the intervals too narrow: with 0.97 a slice
    of 20 requests follows the one before by 0.97^20 = 0.54."""
    monkeypatch.setattr("clients.bench.compare.DRAWS", 300)
    held = 0
    for turn in range(60):
        a, b = (measured(1000 + 2 * turn + side, correlation=correlation, count=400) for side in (0, 1))
        found = difference(a, b, "first token, s: p50")
        held += found.low <= 1 <= found.high
    assert held >= 52


def test_intervals_are_not_wider_than_theory(monkeypatch):
    """The median of n lognormal values has the relative standard deviation 0.5 sqrt(pi/2) / sqrt(n); a ratio of two has
    that times sqrt(2)."""
    monkeypatch.setattr("clients.bench.compare.DRAWS", 300)
    wanted = 2 * 1.96 * 0.5 * (np.pi / 2) ** 0.5 / 600**0.5 * 2**0.5
    widths = []
    for turn in range(8):
        found = difference(measured(2 * turn), measured(2 * turn + 1), "first token, s: p50")
        widths.append(np.log(found.high / found.low))
    assert np.mean(widths) == pytest.approx(wanted, rel=0.25)


def test_a_difference_that_is_there_is_seen():
    slower = difference(measured(1), measured(2, scale=1.5), "first token, s: p90")
    assert slower.verdict == "worse"
    assert slower.low < 1.5 < slower.high
    assert slower.ratio == pytest.approx(slower.b / slower.a)
    assert difference(measured(1, scale=1.5), measured(2), "first token, s: p90").verdict == "better"
    more = difference(measured(1, count=300), measured(2, count=600), "output tokens a second")
    assert (more.verdict, more.a, more.b) == ("better", pytest.approx(10, rel=0.01), pytest.approx(20, rel=0.01))
    assert difference(measured(1), measured(2), "first token, s: p50").verdict == "no difference shown"


def test_each_percentile_has_an_interval_of_its_own():
    """Both medians are 0.1 s; nine tenths of A are below 0.1 e^(1.28 * 0.2), of B below 0.1 e^(1.28 * 0.9)."""
    found = differences(measured(1, sigma=0.2), measured(2, sigma=0.9))
    assert found["first token, s: p50"].verdict == "no difference shown"
    assert found["first token, s: p90"].low < np.exp(1.2816 * 0.7) < found["first token, s: p90"].high


def test_figures_are_those_of_the_reports():
    a, b = measured(1), measured(2)
    found = differences(a, b)
    for test, side in ((a, "a"), (b, "b")):
        report = test.levels[0].report
        for share in ("p50", "p90", "p99"):
            assert getattr(found[f"first token, s: {share}"], side) == pytest.approx(report["first_token_s"][share])
        assert getattr(found["output tokens a second"], side) == pytest.approx(report["output_tokens_per_s"])
        assert getattr(found["answers a second"], side) == pytest.approx(report["requests_per_s"])


def test_few_requests_have_no_interval():
    a, b = measured(1, count=40), measured(2, count=40)
    assert difference(a, b, "first token, s: p99").verdict == "too few requests to tell"
    assert difference(a, b, "first token, s: p50").low is not None


def test_loads_that_were_not_the_same_are_named():
    a, b = measured(1), measured(2)
    b.levels[0].report["load"]["max_tokens"] = "64"
    b.levels[0].report["ended_early"] = "interrupted"
    b.about["model"] = "another"
    [found] = compare(a, b)
    assert found.unlike == ["model: A None, B another", "max_tokens: A 4, B 64", "B ended early: interrupted"]
    with pytest.raises(ConfigError, match="A has the loads 10/s, B has 20/s; measure both with the same"):
        compare(a, measured(2, name="20/s"))


def test_requests_that_have_no_time_are_told():
    """A server that refuses a quarter of the requests is no faster for it."""
    a, b = measured(1), measured(2)
    for record in b.levels[0].records[::4]:
        record.error, record.arrivals = "ServerOverloaded", []
    for record in a.levels[0].records[:30]:
        record.cut = True
    levels = []
    for test in (a, b):
        [level] = test.levels
        run = Run(records=level.records, window_s=60.0, cpu_s=0.0, counting="x")
        report = summarise(run, Load(rate=10.0, duration_s=60.0), works(), 2)
        levels.append(LoadTest(about={}, levels=[Level(name="10/s", report=report, records=level.records)]))
    [found] = compare(*levels)
    assert found.unlike == [
        "failed: A 0 of 600 requests, B 150 of 600; no time of answers has them",
        "unanswered at the end: A 30 of 600 requests, B 0 of 600; no time of answers has them",
    ]
    [same] = compare(a, a)
    assert not same.unlike


def test_loads_of_one_name_are_compared_in_their_order():
    first, second, third = (measured(seed, scale=scale).levels[0] for seed, scale in ((1, 1.0), (2, 2.0), (3, 4.0)))
    a, b = (LoadTest(about={}, levels=levels) for levels in ([first, second, third], [first, second]))
    assert [[one.ratio for one in found.differences] for found in compare(a, b)] == [[1.0] * 11] * 2
    assert unpaired(a, b) == (["10/s"], [])


@pytest.fixture
def two(tmp_path):
    """The files of two tests. The second has first tokens twice as late, and each has one load of its own."""
    load = Load(rate=10.0, duration_s=60.0)
    for name, scale, alone in (("a", 1.0, "20/s"), ("b", 2.0, "<b>")):
        with Keeper(tmp_path / name, {"loads": ["10/s", alone], "model": "phixtral"}) as keeper:
            for load_name in ("10/s", alone):
                keeper.begin(load_name, load, works().describe())
                [level] = measured(ord(name), scale=scale, name=load_name).levels
                for record in level.records:
                    keeper.keep(record)
                keeper.end(Run(records=level.records, window_s=60.0, cpu_s=0.0, counting="x"), level, 2)
    return ["bench", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]


def test_the_command_compares_two_files(two, tmp_path, capsys):
    assert main(two) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "first token, s: p50" in line)
    assert row.split()[-1] == "worse"
    assert "only A has 20/s, which is not compared; only B has <b>, which is not compared" in out
    assert main([*two, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compared"][0]["differences"][2]["ratio"] == pytest.approx(2, rel=0.15)
    assert (found["only_a"], found["only_b"]) == (["20/s"], ["<b>"])
    assert main([*two, "--output", str(tmp_path / "out"), "--slo", "5"]) == 2
    assert "--output, --slo has no meaning beside --compare" in capsys.readouterr().err
    (tmp_path / "mine").write_text("{}\n")
    assert main(["bench", "--compare", str(tmp_path / "a"), str(tmp_path / "mine")]) == 2
    assert "expected a file that `moeship bench --output` wrote" in capsys.readouterr().err


def test_the_page_of_two_tests_draws_both_and_loads_nothing(two, tmp_path, capsys):
    assert main([*two, "--page", str(tmp_path / "page.html")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("10/s")]
    content = (tmp_path / "page.html").read_text()
    page = Page(content)
    assert loads_nothing(content)
    assert "<b>" in page.text  # a name as text, not as a tag
    # A picture of the intervals of the one load that both have; throughput and percentiles over three latencies.
    assert len([attributes for attributes in page.named("svg") if attributes.get("role") == "img"]) == 1 + 3 + 3
    assert len(rows) == 11
    for row in rows:
        assert all(cell in page.text for cell in row)
    # Of each figure the sign of the gain: B's first tokens are twice as late, its tokens as far from one another.
    gains = dict(re.findall(r"<title>([^<]+): ([\d.]+) times as good", content))
    assert float(gains["first token, s: p50"]) == pytest.approx(0.5, rel=0.15)
    assert float(gains["between tokens, mean of an answer, s: p50"]) == pytest.approx(1)
    for one in ("A, p50", "B, p50", "A, p99", "B, p99", "A", "B"):
        assert one in page.texts
    assert main([*two, "--page", str(tmp_path / "page.html")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_page_marks_tests_that_ended_early_or_were_told_otherwise():
    a, b = measured(1), measured(2)
    b.levels[0].report["ended_early"] = "interrupted"
    b.levels[0].report["load"]["rate"] = 11.0
    text = Page(compare_page((a, b), ("a", "b"), compare(a, b))).text
    assert "B ended early: interrupted. It has what was measured until then." in text
    assert "Unlike: rate: A 10.0, B 11.0" in text
    assert "A ended early" not in text


@pytest.mark.parametrize(
    ("gains", "ticks"),
    [
        ([1.02, 0.97], ["0.909", "1", "1.1"]),
        ([0.7, 1.2], ["0.667", "1", "1.5"]),
        ([3.0], ["0.25", "0.5", "1", "2", "4"]),
    ],
)
def test_ratios_have_an_axis_with_one_in_its_middle(gains, ticks):
    axis = ratio_axis(max(abs(math.log2(gain)) for gain in gains))
    assert [text for _, text in axis.ticks] == ticks
    assert axis.share(1.0) == pytest.approx(0.5)
    assert all(axis.low <= gain <= axis.high for gain in gains)
