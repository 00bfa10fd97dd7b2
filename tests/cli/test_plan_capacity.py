"""`moeship plan --target-rps`: what it prints, and what it refuses."""

from __future__ import annotations

import json

import pytest
from bench_standin import StandIn, simulate, works

from cli.main import main
from clients.bench.generator import apply
from clients.bench.kept import Keeper, Level
from clients.bench.load import Load
from clients.bench.report import summarise

RATES = (0.2, 0.6, 1.0)


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """A kept test of a stand-in that takes 0.8 s for an answer and answers one at a time."""
    path = tmp_path_factory.mktemp("capacity") / "curves"
    with Keeper(path, {"loads": [f"{rate:g}/s" for rate in RATES]}) as keeper:
        for rate in RATES:
            load, made = Load(rate=rate, requests=400, seed=1), works()
            keeper.begin(f"{rate:g}/s", load, made.describe())
            run = simulate(
                lambda load=load, made=made: apply(StandIn(one_at_a_time=True), load, made, keep=keeper.keep)
            )
            report = summarise(run, load, made, 2)
            keeper.end(run, Level(name=f"{rate:g}/s", report=report, records=run.records), 2)
    return path


def test_the_plan_says_how_many_servers_and_how_well_it_predicts(curves, capsys):
    words = ["plan", "--target-rps", "5", "--slo", "ttft:2000,e2e:9000", "--curves", str(curves)]
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert 0.5 < plan["most_rate"] < 0.85
    assert plan["servers"] == -(-5 // plan["most_rate"])
    assert plan["rate_of_each"] == pytest.approx(5 / plan["servers"])
    assert plan["predicted"]["first_token_s"] <= 2.0
    assert [one["load"] for one in plan["checked"]] == ["0.6/s"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"{plan['servers']:.0f}, each {plan['rate_of_each']:.3g} requests/s" in out
    assert "check: each rate predicted from the others" in out
    low, high = plan["servers_within"]
    assert (f"{low} servers, whatever" if low == high else f"{low} to {high} servers") in out
    assert low <= plan["servers"] <= high
    low, high = plan["predicted_within"]["first_token_s"]
    assert f"({1e3 * low:.3g} ms to {1e3 * high:.3g} ms)" in out
    assert f"chance ±{plan['checked'][0]['chance']['first_token_s']:.0%})" in out


def test_chance_that_explains_any_difference_has_no_figure(curves, monkeypatch, capsys):
    monkeypatch.setattr("clients.bench.capacity._chance", lambda others, point, name: 8.13)
    assert main(["plan", "--target-rps", "5", "--slo", "ttft:2000,e2e:9000", "--curves", str(curves)]) == 0
    out = capsys.readouterr().out
    assert "chance over ±100%)" in out
    assert "813" not in out


def test_tests_of_several_addresses_are_told(curves, tmp_path, capsys):
    head, *lines = curves.read_text().splitlines(keepends=True)
    files = [tmp_path / name for name in ("one", "other")]
    for path in files:
        told = json.loads(head)
        told["about"]["urls"] = [f"{path.name}:8001"]
        path.write_text(json.dumps(told) + "\n" + "".join(lines))
    words = ["plan", "--target-rps", "5", "--slo", "2000", "--curves"]
    assert main([*words, *map(str, files)]) == 0
    said = capsys.readouterr().err
    assert "note: the load tests are of 2 addresses (one:8001, other:8001); the plan takes them for one server" in said
    assert main([*words, str(files[0]), str(files[0])]) == 0
    assert "addresses" not in capsys.readouterr().err


def test_nothing_is_said_of_rates_that_were_not_measured(curves, capsys):
    assert main(["plan", "--target-rps", "5", "--slo", "60000", "--curves", str(curves)]) == 0
    out = capsys.readouterr().out
    assert "it still holds there, so measure higher rates" in out
    assert "requests/s each: more than was measured" in out


def test_a_bound_that_an_idle_server_misses_ends_with_1(curves, capsys):
    assert main(["plan", "--target-rps", "5", "--slo", "400", "--curves", str(curves)]) == 1
    assert "no number is enough: at 0.2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target-rps", "5"], "found no --slo, --curves; give --target-rps, --slo and --curves"),
        (["--target-rps", "0", "--slo", "5", "--curves", "CURVES"], "found no --target-rps"),
        (["--target-rps", "-1", "--slo", "5", "--curves", "CURVES"], "--target-rps is -1.0, expected a number above 0"),
        (["--target-rps", "5", "--slo", "x", "--curves", "CURVES"], "reading --slo: found 'x'"),
        (["--target-rps", "5", "--slo", "5", "--curves", "CURVES", "--percentile", "100"], "--percentile is 100.0"),
        (
            ["--target-rps", "5", "--slo", "5", "--curves", "/nowhere"],
            "reading the load test /nowhere: /nowhere does not",
        ),
        (["folder", "--target-rps", "5", "--slo", "5", "--curves", "CURVES"], "it has no CHECKPOINT, which plan an"),
        (["--provider", "cuda", "--slo", "5"], "it has no --provider"),
    ],
)
def test_wrong_input(curves, capsys, words, message):
    assert main(["plan", *(str(curves) if word == "CURVES" else word for word in words)]) == 2
    assert message in capsys.readouterr().err
