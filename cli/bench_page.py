"""The page of a load test: one HTML file that needs nothing else, with charts as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cli.bench_charts import linear_axis, tail_axis, timeline
from cli.bench_text import cells, heads, notes
from trt_build.report.charts import Series, legend, line_chart, log_axis
from trt_build.report.page import document, facts, pictures, section
from trt_build.report.visible import escaped

if TYPE_CHECKING:
    from clients.bench.kept import Level, LoadTest
    from clients.bench.records import Record

_MOST_CURVES = 6  # styles of lines that can be told apart
_CURVE_POINTS = 60
_MOST_SAMPLES = 300  # of a line over time
_LEAST_THROUGH = 20  # requests of a load for a line over its time
TIMES: tuple[tuple[str, str, Callable[[Record], float | None]], ...] = (
    ("first token, ms", "first_token_s", lambda record: record.first_token_s),
    ("between tokens, mean of an answer, ms", "between_tokens_of_an_answer_s", lambda record: record.between_tokens_s),
    ("whole answer, ms", "answer_s", lambda record: record.answer_s),
)  # fmt: skip


def bench_page(test: LoadTest) -> str:
    """The text of the HTML file."""
    about, levels = test.about, test.levels
    title = f"Load test of {about.get('model') or 'a model'} at {', '.join(about.get('urls') or ['?'])}"
    marked = ""
    if test.ended:
        marked = f'<p class="no">This test ended early: {escaped(test.ended)}. It has what was measured until then.</p>'
    return document(
        title,
        [
            marked + section("Figures", _facts(about) + _table(levels)),
            section("Throughput over latency", _throughput(levels)),
            section("Percentiles", _percentiles(levels)),
            section("Requests in time", _timelines(levels)),
            section("The server's own metrics", _metrics(levels)),
            section("Notes", facts(tuple(notes(levels))) + _explained(levels)),
        ],
    )


def _facts(about: Mapping[str, Any]) -> str:
    names = ("date", "endpoint", "objective", "command", "moeship")
    return facts(tuple((name, str(about[name])) for name in names if about.get(name)))


def _table(levels: Sequence[Level]) -> str:
    """A column a load, a row a figure."""
    columns = [cells(level, levels) for level in levels]
    names = heads(levels)
    head = "".join(f'<th scope="col">{escaped(column[0])}</th>' for column in columns)
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in row)}</tr>'
        for name, row in zip(names[1:], zip(*(column[1:] for column in columns), strict=True), strict=True)
    )
    head = f'<thead><tr><th scope="col">{escaped(names[0])}</th>{head}</tr></thead>'
    return f'<div class="wide"><table class="figures">{head}<tbody>{rows}</tbody></table></div>'


def _throughput(levels: Sequence[Level]) -> str:
    """Output tokens a second over each latency: a point a load, joined in their order."""
    charts: list[str] = []
    lines: list[Series] = []
    rates = linear_axis([level.report["output_tokens_per_s"] for level in levels])
    for name, key, _ in TIMES:
        series = [
            Series(
                name=f"latency {share}",
                style=style,
                points=[
                    (1e3 * level.report[key][share], level.report["output_tokens_per_s"])
                    for level in levels
                    if level.report[key][share] is not None
                ],
            )
            for style, share in enumerate(("p50", "p90", "p99"))
        ]
        values = [x for one in series for x, _ in one.points]
        if values:
            lines += series
            charts.append(line_chart(series, log_axis(values), rates, name, "output tokens a second"))
    if not charts:
        return ""
    loads = f"{', '.join(level.name for level in levels)} ({heads(levels)[0]})"
    said = (
        f"A point is a load; the line joins the loads in their order: {loads}. Up is more throughput, left is faster."
    )
    return f"<p>{escaped(said)}</p>{legend(lines)}{pictures(charts)}"


def _percentiles(levels: Sequence[Level]) -> str:
    shown = levels[-_MOST_CURVES:]
    charts, lines = [], []
    for name, _, value_of in TIMES:
        values = [sorted(v for v in map(value_of, level.records) if v is not None) for level in shown]
        series = [
            Series(name=f"{heads(levels)[0]} {level.name}", style=style, points=curve(found))
            for style, (level, found) in enumerate(zip(shown, values, strict=True))
            if found
        ]
        if not series:
            continue
        lines += series
        latencies = log_axis([y for one in series for _, y in one.points])
        charts.append(line_chart(series, tail_axis(max(map(len, values))), latencies, "share of requests", name))
    if not charts:
        return ""
    left_out = f" The last {_MOST_CURVES} loads are shown." if len(levels) > _MOST_CURVES else ""
    return (
        "<p>The latency that a share of the requests does not exceed, the tail stretched: 90 % to 99 % is as "
        f"wide as 99 % to 99.9 %.{left_out}</p>{legend(lines)}{pictures(charts)}"
    )


def curve(ordered: Sequence[float]) -> list[tuple[float, float]]:
    """(share of the values above, milliseconds), evenly by the logarithm of the share, down to one value."""
    from clients.bench.report import percentile

    ends = math.log10(len(ordered)) if len(ordered) > 1 else 1e-9
    shares = [10.0 ** (-ends * turn / (_CURVE_POINTS - 1)) for turn in range(_CURVE_POINTS)]
    return [(share, 1e3 * percentile(ordered, 1 - share)) for share in shares]


def _timelines(levels: Sequence[Level]) -> str:
    drawn = [
        f"<figcaption>{escaped(heads(levels)[0])} {escaped(level.name)}</figcaption>{timeline(level.records)}"
        for level in levels
        if level.records
    ]
    said = (
        "A line is a request, the first to be due at the top. Thin: waiting for the first token, from when the request "
        "was due. Thick: tokens arrive. A cross is an error. Of many requests those around the slowest are shown."
    )
    return f"<p>{escaped(said)}</p>{pictures(drawn)}{_through(levels)}"


def _through(levels: Sequence[Level]) -> str:
    """The first token's latency of every request over the time of the load."""
    charts = []
    for level in levels:
        found = [(record.due_s, 1e3 * record.first_token_s) for record in level.records if record.first_token_s]
        if len(found) < _LEAST_THROUGH:
            continue
        step = math.ceil(len(found) / _MOST_SAMPLES)
        # Of neighbours the slowest is drawn, so that no pause of the server is left out.
        slowest = [max(found[at : at + step], key=lambda point: point[1]) for at in range(0, len(found), step)]
        series = [Series(name=level.name, style=0, points=slowest)]
        across = linear_axis([x for x, _ in slowest])
        what = f"seconds; {heads(levels)[0]} {level.name}"
        charts.append(line_chart(series, across, log_axis([y for _, y in slowest]), what, "first token, ms"))
    if not charts:
        return ""
    return f"<p>When each request was due, and how long its first token took.</p>{pictures(charts)}"


def _metrics(levels: Sequence[Level]) -> str:
    charts, lines = [], []
    names = {"streams": "sequences computed", "waiting": "requests waiting"}
    for level in levels:
        samples = (level.metrics or {}).get("samples") or []
        models = list(dict.fromkeys(sample["model"] for sample in samples))
        series = []
        for style, (key, text) in enumerate(names.items()):
            for model in models[: _MOST_CURVES // len(names)]:
                found = [(s["at_s"], s[key]) for s in samples if s["model"] == model and key in s]
                step = math.ceil(len(found) / _MOST_SAMPLES) or 1
                series.append(Series(name=f"{model}: {text}", style=style, points=found[::step]))
        series = [one for one in series if one.points]
        if series:
            lines += series
            across = linear_axis([x for one in series for x, _ in one.points])
            down = linear_axis([y for one in series for _, y in one.points])
            charts.append(line_chart(series, across, down, f"seconds; {heads(levels)[0]} {level.name}", "requests"))
    if not charts:
        return ""
    return f"<p>What the server published meanwhile, once a second.</p>{legend(lines)}{pictures(charts)}"


def _explained(levels: Sequence[Level]) -> str:
    said = (
        "Latencies of an open loop count from when a request was due, also where it was sent later. In a closed loop a "
        "slow server gets fewer requests, and its latencies look better than what independent users would see."
    )
    if levels[0].report["load"]["kind"] == "closed loop":
        said += " These loads are closed loops; measure with --rate, too."
    return f"<p>{escaped(said)}</p>"
