"""Axes and pictures of a load test, over those of trt_build/report/charts.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trt_build.report.charts import WIDTH, Axis
from trt_build.report.visible import escaped, number

if TYPE_CHECKING:
    from clients.bench.compare import Difference
    from clients.bench.records import Record

_MOST_LINES = 60  # requests of a timeline
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 10, 6, 22
_TICKS = 5
_NAMES_END = 128  # where the rows of intervals begin, behind their names
_LEAST_HALVED = 4  # end of an axis of ratios from which it has ticks between 1 and its ends


def linear_axis(values: Sequence[float]) -> Axis:
    """A linear axis from 0 to above the largest value, with round ticks."""
    most = max((value for value in values if math.isfinite(value)), default=1.0) or 1.0
    power = 10.0 ** math.floor(math.log10(most / _TICKS))
    step = next(factor * power for factor in (1, 2, 5, 10) if most / (factor * power) <= _TICKS + 1)
    ticks = [turn * step for turn in range(math.ceil(most / step - 1e-9) + 1)]
    return Axis(low=0.0, high=ticks[-1], log=False, ticks=tuple((tick, f"{tick:g}") for tick in ticks))


@dataclass(frozen=True, kw_only=True)
class TailAxis(Axis):
    """A logarithmic axis of the share above, the smallest at the right."""

    def share(self, value: float) -> float:
        return 1.0 - super().share(value)


def tail_axis(count: int) -> TailAxis:
    """An axis from the smallest to the largest of `count` values, by the share of values above."""
    decades = max(1, math.ceil(math.log10(max(count, 2)) - 1e-9))
    shares = [1.0, 0.5, *(10.0**-power for power in range(1, decades + 1))]
    texts = [f"{100 * (1 - share):.10g} %" for share in shares]
    return TailAxis(low=10.0**-decades, high=1.0, log=True, ticks=tuple(zip(shares, texts, strict=True)))


def interval_chart(differences: Sequence[Difference]) -> str:
    """An SVG picture of B over A: a row a figure, a dot for the ratio and a line for its interval, on a logarithmic
    axis that has 1 in its middle. What is better points to the same side for all: figures of which less is better are
    drawn as A over B."""
    rows = [(one.figure, *_gains(one)) for one in differences if one.ratio]
    if not rows:
        return ""
    ends = [abs(math.log2(value)) for _, *found in rows for value in found if value]
    axis = ratio_axis(max(ends))
    left, right, row = _NAMES_END, WIDTH - _RIGHT, 17
    bottom = _TOP + row * len(rows)
    height = bottom + _BOTTOM + 14

    def across(value: float) -> float:
        return round(left + axis.share(value) * (right - left), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="how much better B is than A">']
    for value, text in axis.ticks:
        kind = "axis" if value == 1 else "grid"
        parts.append(f'<line class="{kind}" x1="{across(value)}" x2="{across(value)}" y1="{_TOP - 4}" y2="{bottom}"/>')
        parts.append(f'<text class="middle" x="{across(value)}" y="{bottom + 12}">{escaped(text)}</text>')
    parts.append(f'<text class="name" x="{left}" y="{bottom + 28}">B is worse</text>')
    parts.append(f'<text class="name end" x="{right}" y="{bottom + 28}">B is better</text>')
    for turn, (figure, ratio, low, high) in enumerate(rows):
        y = _TOP + (turn + 0.5) * row
        parts.append(f'<text class="end" x="{left - 6}" y="{y + 4:g}">{escaped(_short(figure))}</text>')
        said = f"{figure}: {number(ratio)} times as good"
        if low and high:
            said += f", {number(low)} to {number(high)}"
        parts.append(f'<g class="s0"><title>{escaped(said)}</title>')
        if low and high:
            parts.append(f'<polyline points="{across(low):g},{y:g} {across(high):g},{y:g}"/>')
        parts.append(f'<circle cx="{across(ratio):g}" cy="{y:g}" r="3"/></g>')
    return "".join([*parts, "</svg>"])


def ratio_axis(most_log2: float) -> Axis:
    """A logarithmic axis of ratios with 1 in its middle, to the power of two above `most_log2` or one of the ends below
    that."""
    end = next((end for end in (1.1, 1.25, 1.5) if math.log2(end) >= most_log2), 2.0 ** max(1, math.ceil(most_log2)))
    half = math.sqrt(end)
    ticks = (1 / end, 1 / half, 1.0, half, end) if end >= _LEAST_HALVED else (1 / end, 1.0, end)
    return Axis(low=1 / end, high=end, log=True, ticks=tuple((tick, f"{tick:.3g}") for tick in ticks))


def _gains(one: Difference) -> tuple[float, float | None, float | None]:
    """The ratio and its interval, turned so that more is better."""
    ratio, low, high = one.ratio or 1.0, one.low, one.high
    if one.better > 0:
        return ratio, low, high
    return 1 / ratio, 1 / high if high else None, 1 / low if low else None


def _short(figure: str) -> str:
    """A figure's name as it fits beside its row."""
    return (
        figure.replace("output tokens a second", "tokens/s").replace("answers a second", "answers/s")
        .replace(", mean of an answer", "").replace(", s:", "")
    )  # fmt: skip


def timeline(records: Sequence[Record]) -> str:
    """An SVG picture of the requests of a load: each a line from when it was due to its end. Of many requests those
    around the slowest are drawn."""
    shown = around_the_slowest(records, _MOST_LINES)
    row = max(3.0, min(8.0, 240 / len(shown)))
    height = round(_TOP + row * len(shown) + _BOTTOM)
    low, high = shown[0].due_s, max(record.end_s or record.due_s for record in shown)
    whole = linear_axis([max(high - low, 1e-3)])
    right, bottom = WIDTH - _RIGHT, height - _BOTTOM + 4

    def across(value: float) -> float:
        return round(_LEFT + whole.share(value - low) * (right - _LEFT), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{len(shown)} requests in time">']
    for value, text in whole.ticks:
        place = across(low + value)
        parts.append(f'<line class="grid" x1="{place}" x2="{place}" y1="{_TOP - 4}" y2="{bottom}"/>')
        parts.append(f'<text class="middle" x="{place}" y="{bottom + 12}">{escaped(text)} s</text>')
    for turn, record in enumerate(shown):
        parts.append(_request(record, across, _TOP + (turn + 0.5) * row, row))
    of = f"{len(shown)} of {len(records)} requests, from {low:.1f} s of the load on"
    return "".join([*parts, "</svg>", f'<p class="small">{of}</p>'])


def around_the_slowest(records: Sequence[Record], most: int) -> Sequence[Record]:
    """At most so many successive requests, by when they were due, with the one of the slowest first token among them;
    a request without a token waited until its end."""
    ordered = sorted(records, key=lambda record: (record.due_s, record.index))

    def waited(at: int) -> float:
        record = ordered[at]
        until = record.arrivals[0][0] if record.arrivals else record.end_s or record.due_s
        return until - record.due_s

    slowest = max(range(len(ordered)), key=waited)
    begin = max(0, min(slowest - most // 2, len(ordered) - most))
    return ordered[begin : begin + most]


def _request(record: Record, across: Callable[[float], float], y: float, row: float) -> str:
    """One request of a timeline."""
    begin, end = across(record.due_s), across(record.end_s if record.end_s is not None else record.due_s)
    first = across(record.arrivals[0][0]) if record.arrivals else end
    last = across(record.arrivals[-1][0]) if record.arrivals else end
    said = f"request {record.index}: due at {number(record.due_s)} s"
    if record.first_token_s is not None:
        said += f", first token after {number(1e3 * record.first_token_s)} ms, {record.num_tokens} tokens"
    if record.error:
        said += f", {record.error} {record.status or ''}".rstrip()
    if record.cut:
        said += ", cut at the end"
    y = round(y, 1)
    style = "s1 whole" if record.error else "s0"
    parts = [
        f'<g class="{style}"><title>{escaped(said)}</title>',
        f'<polyline points="{begin:g},{y:g} {first:g},{y:g}" style="stroke-width:{0.3 * min(row, 3):.1f}"/>',
    ]
    if record.arrivals:
        width = f"{0.75 * row:.1f}"
        parts.append(
            f'<polyline points="{first:g},{y:g} {max(last, first + 0.5):g},{y:g}" style="stroke-width:{width}"/>'
        )
    if record.error:
        a = 2.5
        parts.append(
            f'<polyline points="{end - a:g},{y - a:g} {end + a:g},{y + a:g}"/>'
            f'<polyline points="{end - a:g},{y + a:g} {end + a:g},{y - a:g}"/>'
        )
    return "".join([*parts, "</g>"])
