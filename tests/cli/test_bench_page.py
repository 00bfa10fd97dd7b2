"""The page of a load test: what it shows, that it needs nothing else, and that its charts are of the samples."""

from __future__ import annotations

import re

import pytest
from bench_standin import StandIn, simulate, works
from html_pages import Page, loads_nothing

from cli.bench_charts import around_the_slowest, linear_axis, tail_axis
from cli.bench_page import bench_page
from cli.main import main
from clients.bench.generator import apply
from clients.bench.kept import Keeper, Level, LoadTest, read_test
from clients.bench.load import Load
from clients.bench.objective import read_objective
from clients.bench.records import Record
from clients.bench.report import summarise
from clients.errors import ServerOverloaded

ABOUT = {"urls": ["<server>:1"], "model": "phixtral", "endpoint": "grpc", "objective": "ttft:600", "loads": ["1", "4"]}
METRICS = {
    "samples": [{"at_s": at, "model": "phixtral", "streams": at, "waiting": 2 * at} for at in (0.0, 1.0, 2.0)],
    "engines": [{"model": "phixtral", "first_token_s": {"p50": 0.1, "p99": 0.2}}],
    "readings_failed": 0,
}


async def refused(work):
    raise ServerOverloaded("queue <full>", status="UNAVAILABLE")
    yield


@pytest.fixture
def test():
    """Two loads on a stand-in that answers one at a time; one request of the second is refused."""
    levels = []
    for streams in (1, 4):
        made, server, load = works(), StandIn(one_at_a_time=True), Load(streams=streams, requests=8 * streams)
        if streams == 4:
            server.script[made.work(9).prompt] = refused
        run = simulate(lambda load=load, server=server, made=made: apply(server, load, made))
        report = summarise(run, load, made, 2, read_objective("600", "x"))
        levels.append(Level(name=str(streams), report=report, records=run.records, metrics=METRICS))
    return LoadTest(about=ABOUT, levels=levels)


def test_the_page_shows_the_figures_and_loads_nothing(test):
    content = bench_page(test)
    page = Page(content)
    assert loads_nothing(content)
    assert page.named("meta")[1]["content"].startswith("default-src 'none'")
    for text in ("Throughput over latency", "Percentiles", "Requests in time", "The server's own metrics",
                 "Load test of phixtral at <server>:1", "queue <full>", "first token, s: p99"):  # fmt: skip
        assert text in page.text
    assert "ended early" not in page.text
    # Two charts of three latencies, a timeline a load, the second's latencies over time, metrics of two loads.
    assert len([attributes for attributes in page.named("svg") if attributes.get("role") == "img"]) == 6 + 2 + 1 + 2


def test_every_request_is_a_line_of_the_timeline(test):
    content = bench_page(test)
    said = re.findall(r"<title>(request [^<]+)</title>", content)
    assert len(said) == 8 + 32
    assert said[0] == "request 0: due at 0 s, first token after 500 ms, 4 tokens"
    assert said[1] == "request 1: due at 0.80 s, first token after 500 ms, 4 tokens"
    [failed] = [text for text in said if "Overloaded" in text]
    assert failed.startswith("request 9: due at ")
    assert failed.endswith("ServerOverloaded UNAVAILABLE")


def test_a_test_that_ended_early_is_marked_on_the_page(test):
    test.levels[1].report["ended_early"] = "interrupted"
    assert "This test ended early: interrupted. It has what was measured until then." in Page(bench_page(test)).text


def test_of_many_requests_those_around_the_slowest_are_drawn():
    def record(index, waits, error=None):
        return Record(index=index, stream=0, due_s=float(index), sent_s=0.0, max_tokens=1,
                      arrivals=[] if error else [(index + waits, 1)], end_s=index + waits, error=error)  # fmt: skip

    records = [record(index, 0.1) for index in range(100)]
    records[70] = record(70, 9.0)
    assert [one.index for one in around_the_slowest(records, 10)] == list(range(65, 75))
    records[2] = record(2, 20.0, error="DeadlineExceeded")
    assert [one.index for one in around_the_slowest(records[::-1], 10)] == list(range(10))
    assert len(around_the_slowest(records[:3], 10)) == 3


def test_axes_have_round_ticks_and_stretch_the_tail():
    assert [tick for tick, _ in linear_axis([0.0, 7.3]).ticks] == pytest.approx([0, 2, 4, 6, 8])
    assert [text for _, text in linear_axis([1234.0]).ticks] == ["0", "500", "1000", "1500"]
    assert linear_axis([]).high == 1
    axis = tail_axis(500)
    assert [text for _, text in axis.ticks] == ["0 %", "50 %", "90 %", "99 %", "99.9 %"]
    assert [axis.share(share) for share in (1.0, 0.1, 0.01, 0.001)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_a_kept_test_is_shown_again(test, tmp_path, capsys):
    kept, page, load = tmp_path / "run", tmp_path / "page.html", Load(streams=1, requests=8)
    with Keeper(kept, {**ABOUT, "loads": ["1"]}) as keeper:
        keeper.begin("1", load, works().describe())
        run = simulate(lambda: apply(StandIn(), load, works(), keep=keeper.keep))
        keeper.end(run, test.levels[0], 2)
    assert main(["bench", "--show", str(kept), "--page", str(page), "--slo", "100"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"load 1 +objective ttft:100 \(ms\): 0 met, 8 missed", out)
    assert read_test(kept).levels[0].report["goodput"]["met"] == 8
    assert "objective ttft:100 (ms): 0 met, 8 missed" in Page(page.read_text()).text
    assert main(["bench", "--show", str(kept), "--page", str(page)]) == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "other").write_text("mine")
    assert main(["bench", "--show", str(tmp_path / "other")]) == 2
    assert "expected a file that `moeship bench --output` wrote" in capsys.readouterr().err
