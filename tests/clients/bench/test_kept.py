"""The file of a load test: what is in it at any time, and that its figures are those of its samples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from bench_standin import StandIn, simulate, works

from clients.bench.generator import apply
from clients.bench.kept import BROKEN_OFF, Keeper, Level, read_test
from clients.bench.load import Lengths, Load
from clients.bench.objective import read_objective
from clients.bench.report import summarise
from export.errors import ConfigError, OutputError

ABOUT = {"loads": ["4/s", "2"], "objective": "ttft:60", "urls": ["x:1"]}


LOADS = (Load(rate=4.0, requests=60, seed=2), Load(streams=2, requests=9))


def written(path, *, ends=True):
    """Write the file of a test of two loads on a stand-in; returns the reports."""
    made = works(max_tokens=Lengths(low=2, high=9))
    reports = []
    with Keeper(path, ABOUT) as keeper:
        for name, load in zip(ABOUT["loads"], LOADS, strict=True):
            keeper.begin(name, load, made.describe())
            server = StandIn(one_at_a_time=load.rate is not None, prefill_s=0.05, step_s=0.02)
            run = simulate(lambda load=load, server=server: apply(server, load, made, keep=keeper.keep))
            reports.append(summarise(run, load, made, 2, read_objective("60", "x")))
            if ends:
                keeper.end(run, Level(name=name, report=reports[-1], records=run.records), 2)
    return reports


def test_a_test_is_read_as_it_was_measured(tmp_path):
    reports = written(tmp_path / "run")
    test = read_test(tmp_path / "run")
    assert test.ended is None
    assert test.about == ABOUT
    assert [level.name for level in test.levels] == ["4/s", "2"]
    assert [level.report for level in test.levels] == reports


def test_percentiles_are_those_that_numpy_computes_from_the_samples_of_the_file(tmp_path):
    written(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run").read_text().splitlines()]
    report = next(line["report"] for line in lines if line["kind"] == "end")
    requests = [line for line in lines if line["kind"] == "request" and line["load"] == "4/s"]
    assert len(requests) == 60
    first = [request["arrivals"][0][0] - request["due_s"] for request in requests]
    whole = [request["end_s"] - request["due_s"] for request in requests]
    gaps = [
        (after - before) / tokens
        for request in requests
        for (before, _), (after, tokens) in zip(request["arrivals"], request["arrivals"][1:], strict=False)
        for _ in range(tokens)
    ]
    means = [
        (request["arrivals"][-1][0] - request["arrivals"][0][0]) / sum(tokens for _, tokens in request["arrivals"][1:])
        for request in requests
    ]
    for name, values in (
        ("first_token_s", first), ("answer_s", whole), ("between_tokens_s", gaps),
        ("between_tokens_of_an_answer_s", means),
    ):  # fmt: skip
        wanted = np.percentile(values, [50, 90, 99])
        assert [report[name][share] for share in ("p50", "p90", "p99")] == pytest.approx(wanted, rel=1e-12)
        assert (report[name]["max"], report[name]["n"]) == (max(values), len(values))
    tokens = sum(tokens for request in requests for _, tokens in request["arrivals"])
    assert report["output_tokens_per_s"] == pytest.approx(tokens / report["window_s"])
    assert report["window_s"] == pytest.approx(max(request["end_s"] for request in requests))
    assert report["goodput"]["met"] == sum(value <= 0.06 for value in first)
    assert 0 < report["goodput"]["met"] < 60


def test_a_file_that_breaks_off_has_what_was_measured_until_then(tmp_path):
    path = tmp_path / "run"
    written(path, ends=False)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:30]) + lines[30][:40])  # killed while it wrote
    test = read_test(path)
    assert test.ended == BROKEN_OFF
    [level] = test.levels
    assert level.report["ended_early"] == BROKEN_OFF
    assert level.report["requests"]["sent"] == 28
    assert level.report["window_s"] == max(record.end_s for record in level.records)


def test_a_test_that_was_killed_between_two_loads_is_marked(tmp_path):
    path = tmp_path / "run"
    written(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:63]))
    assert json.loads(lines[62])["kind"] == "end"
    assert read_test(path).ended == BROKEN_OFF


def test_an_ended_request_is_on_the_disk_while_the_test_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("clients.bench.kept._FLUSH_S", 0.0)
    load, made = Load(streams=1, requests=3), works()
    sizes = []
    with Keeper(tmp_path / "run", ABOUT) as keeper:
        keeper.begin("1", load, made.describe())

        def keep(record):
            keeper.keep(record)
            sizes.append(len((tmp_path / "run").read_text().splitlines()))

        simulate(lambda: apply(StandIn(), load, made, keep=keep))
    assert sizes == [3, 4, 5]


def test_the_figures_of_another_objective_are_computed_of_the_same_samples(tmp_path):
    written(tmp_path / "run")
    strict, lax = (read_test(tmp_path / "run", read_objective(bound, "x")) for bound in ("1", "60000"))
    assert strict.levels[0].report["goodput"]["met"] == 0
    assert lax.levels[0].report["goodput"]["met"] == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "it has no request that ended"),
        (lambda lines: ["hello\n"], "line 1: .*expected a file that `moeship bench --output` wrote"),
        (lambda lines: ['{"prompt": "a"}\n'], "line 1: found something else"),
        (lambda lines: [lines[0].replace('"version": 1', '"version": 9')], "its version is 9, expected 1"),
        (lambda lines: lines[:2], "it has no request that ended"),
        (lambda lines: [*lines[:5], "{\n", *lines[5:]], "line 6: "),
        (lambda lines: [*lines[:5], '{"kind": "request"}\n', *lines[5:]], "line 6: .*it is damaged"),
        (lambda lines: [*lines[:5], "[]\n", *lines[5:]], "line 6: found something else"),
        *(
            (
                lambda lines, name=name: [*lines[:5], re.sub(rf'"{name}": [^,]+', f'"{name}": "x"', lines[5])],
                "line 6: .*it is damaged",
            )
            for name in ("index", "due_s", "end_s")
        ),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused(tmp_path, change, message):
    path = tmp_path / "run"
    written(path)
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    with pytest.raises(ConfigError, match=f"reading the load test .*{message}"):
        read_test(path)


def test_files_that_cannot_be_read_or_must_not_be_written_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="none does not exist"):
        read_test(tmp_path / "none")
    with pytest.raises(ConfigError, match="/dev/zero is a folder, a pipe or a device, expected a regular file"):
        read_test(Path("/dev/zero"))  # which has no end
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="it is no UTF-8 text"):
        read_test(tmp_path / "bytes")
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        Keeper(tmp_path / "mine", ABOUT)
    assert (tmp_path / "mine").read_text() == "mine"
