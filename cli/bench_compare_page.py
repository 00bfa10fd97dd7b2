"""The page of `moeship bench --compare`: two load tests side by side, one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cli.bench_charts import interval_chart, linear_axis, tail_axis
from cli.bench_page import TIMES, curve
from cli.bench_text import CHANCE, compared_cells, heads, unpaired_text
from trt_build.report.charts import Series, legend, line_chart, log_axis
from trt_build.report.page import document, pictures, section
from trt_build.report.visible import escaped

if TYPE_CHECKING:
    from clients.bench.compare import Compared
    from clients.bench.kept import Level, LoadTest

_SIDES = ("A", "B")
_SHARES = ("p50", "p99")  # of the lines over throughput: two tests have no more lines that can be told apart
_MOST_LOADS = 8  # with percentile curves of their own
_VERDICTS = {"better": "ok", "worse": "no"}


def compare_page(tests: tuple[LoadTest, LoadTest], files: tuple[str, str], found: Sequence[Compared]) -> str:
    """The text of the HTML file: the two tests, their differences with intervals, throughput over latency, and
    percentile curves. `files` are the tests' names."""
    models = [str(test.about.get("model") or "a model") for test in tests]
    title = f"Two load tests of {models[0]}" if models[0] == models[1] else f"Load tests of {models[0]} and {models[1]}"
    return document(
        title,
        [
            section("The two tests", _tests(tests, files)),
            section("Differences", _differences(tests, found)),
            section("Throughput over latency", _throughput(tests)),
            section("Percentiles", _percentiles(tests, found)),
        ],
    )


def _tests(tests: Sequence[LoadTest], files: Sequence[str]) -> str:
    """A column a test, a row a fact of either."""
    names = ("date", "endpoint", "urls", "model", "loads", "objective", "command", "moeship")
    told = [{"file": file, **_told(test.about)} for test, file in zip(tests, files, strict=True)]
    shown = [name for name in ("file", *names) if any(name in one for one in told)]
    cells = {name: "".join(f"<td>{escaped(one.get(name, '–'))}</td>" for one in told) for name in shown}
    rows = "".join(f'<tr><th scope="row">{escaped(name)}</th>{cells[name]}</tr>' for name in shown)
    head = "".join(f'<th scope="col">{side}</th>' for side in _SIDES)
    marks = "".join(
        f'<p class="no">{side} ended early: {escaped(test.ended)}. It has what was measured until then.</p>'
        for side, test in zip(_SIDES, tests, strict=True)
        if test.ended
    )
    table = f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'{marks}<div class="wide">{table}</div>'


def _told(about: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in about.items()
        if value not in (None, [], "")
    }


def _differences(tests: Sequence[LoadTest], found: Sequence[Compared]) -> str:
    """Of each load a picture of the ratios with their intervals, and the figures."""
    said = (
        "A dot is how many times as good B is: its throughput over A's, A's latency over that of B. The line is the "
        "interval of 95 %: where it crosses 1, no difference is shown. "
    )
    parts = [f"<p>{escaped(said + CHANCE)}</p>"]
    kind = heads(tests[0].levels)[0]
    for one in found:
        parts.append(f"<h3>{escaped(f'{kind} {one.name}')}</h3>")
        parts += [f'<p class="no">Unlike: {escaped(said)}</p>' for said in one.unlike]
        parts.append(pictures([interval_chart(one.differences)]) + _figures(one))
    if left_out := unpaired_text(*tests):
        parts.append(f"<p>{escaped(left_out[0].upper() + left_out[1:])}.</p>")
    return "".join(parts)


def _figures(compared: Compared) -> str:
    names = ("figure", "A", "B", "B/A", "interval", "B is")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = []
    for difference in compared.differences:
        name, *cells, verdict = compared_cells(difference)
        mark = f'<td class="{_VERDICTS.get(verdict, "plain")}">{escaped(verdict)}</td>'
        inner = "".join(f"<td>{escaped(cell)}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{escaped(name)}</th>{inner}{mark}</tr>')
    table = f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _throughput(tests: Sequence[LoadTest]) -> str:
    charts: list[str] = []
    lines: list[Series] = []
    rates = linear_axis([level.report["output_tokens_per_s"] for test in tests for level in test.levels])
    for name, key, _ in TIMES:
        series = [
            Series(
                name=f"{side}, {share}",
                style=style + 2 * turn,
                points=[
                    (1e3 * level.report[key][share], level.report["output_tokens_per_s"])
                    for level in test.levels
                    if level.report[key][share] is not None
                ],
            )
            for turn, share in enumerate(_SHARES)
            for style, (side, test) in enumerate(zip(_SIDES, tests, strict=True))
        ]
        series = [one for one in series if one.points]
        if series:
            lines += series
            values = [x for one in series for x, _ in one.points]
            charts.append(line_chart(series, log_axis(values), rates, name, "output tokens a second"))
    if not charts:
        return ""
    loads = "; ".join(
        f"{side} {', '.join(level.name for level in test.levels)}" for side, test in zip(_SIDES, tests, strict=True)
    )
    said = f"A point is a load, a line joins the loads of a test in their order ({loads}). Up is more throughput, left "
    return f"<p>{escaped(said + 'is faster.')}</p>{legend(lines)}{pictures(charts)}"


def _percentiles(tests: Sequence[LoadTest], found: Sequence[Compared]) -> str:
    """Of each load that both tests have, a chart a latency with a curve a test."""
    by_name = [{level.name: level for level in test.levels} for test in tests]
    parts, lines, kind = [], [], heads(tests[0].levels)[0]
    for one in found[-_MOST_LOADS:]:
        charts, drawn = _curves([levels[one.name] for levels in by_name])
        if charts:
            lines += drawn
            parts.append(f"<h3>{escaped(f'{kind} {one.name}')}</h3>{pictures(charts)}")
    if not parts:
        return ""
    left_out = f" The last {_MOST_LOADS} loads are shown." if len(found) > _MOST_LOADS else ""
    said = (
        "The latency that a share of the requests does not exceed, the tail stretched: 90 % to 99 % is as wide as "
        f"99 % to 99.9 %.{left_out}"
    )
    return f"<p>{escaped(said)}</p>{legend(lines)}{''.join(parts)}"


def _curves(levels: Sequence[Level]) -> tuple[list[str], list[Series]]:
    charts: list[str] = []
    lines: list[Series] = []
    for name, _, value_of in TIMES:
        values = [sorted(v for v in map(value_of, level.records) if v is not None) for level in levels]
        series = [
            Series(name=side, style=style, points=curve(ordered))
            for style, (side, ordered) in enumerate(zip(_SIDES, values, strict=True))
            if ordered
        ]
        if series:
            lines += series
            latencies = log_axis([y for one in series for _, y in one.points])
            charts.append(line_chart(series, tail_axis(max(map(len, values))), latencies, "share of requests", name))
    return charts, lines
