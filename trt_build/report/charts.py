"""Line charts and heat maps as inline SVG. Colours and strokes are classes of page.css, so that they follow the colour
scheme; series differ in stroke and marker too, for print in grey."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trt_build.report.visible import escaped, number, percent

WIDTH, HEIGHT = 360, 230  # in units of about one pixel on a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 12, 40
NUM_STYLES = 6
_MOST_TICKS = 7
_MOST_MARKERS = 12  # of a line; with more points every second has one, or fewer
_LEAST_ROOM = 18  # of a column's name in a heat map
_CURVE = 40  # a line of more points than that has none, but for its ends


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A scale from `low` to `high`, linear or logarithmic, with its ticks and their texts."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1; values outside lie on the end."""
        low, high, value = (math.log10(one) if self.log else one for one in (self.low, self.high, self.inside(value)))
        return (value - low) / (high - low)

    def inside(self, value: float) -> float:
        return min(max(value, self.low), self.high)


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one engine; `style` is its place among the engines."""

    name: str
    style: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a heat map: the text in it, the text that a pointer shows, and its shade. The shade lies between -1 and
    1; above zero it has the first colour, below the second."""

    text: str
    said: str
    shade: float


def log_axis(values: Sequence[float], most_decades: int = 6, shares: bool = False) -> Axis:
    """An axis from the decade below the smallest positive value to the one above the largest, of at most `most_decades`
    decades; its ticks are percentages if the values are `shares`."""
    found = [value for value in values if value > 0 and math.isfinite(value)] or [1.0]
    high = math.ceil(math.log10(max(found)) - 1e-9)
    low = min(max(math.floor(math.log10(min(found)) + 1e-9), high - most_decades), high - 1)
    ticks = [10.0**power for power in range(high, low - 1, -math.ceil((high - low) / 6))]
    if high - low == 1:
        ticks = [factor * 10.0**low for factor in (1, 2, 5)] + [10.0**high]
    texts = [f"{100 * tick:g} %" if shares else _tick(tick) for tick in ticks]
    return Axis(low=10.0**low, high=10.0**high, log=True, ticks=tuple(zip(ticks, texts, strict=True)))


def share_axis(values: Sequence[float]) -> Axis:
    """A linear axis of shares from below the smallest value to 100 %."""
    least = min(values, default=0.9)
    step = next(size for size in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25) if (1 - least) / size <= 5)
    low = max(0.0, math.floor(least / step + 1e-9) * step)
    low = low if low < 1 else 1 - step
    count = round((1 - low) / step)
    ticks = [low + turn * step for turn in range(count + 1)]
    digits = 1 if step < 0.01 else 0
    return Axis(low=low, high=1.0, log=False, ticks=tuple((tick, percent(tick, digits)) for tick in ticks))


def count_axis(numbers: Sequence[int]) -> Axis:
    """A linear axis of layer numbers."""
    low, high = min(numbers, default=0), max(numbers, default=0)
    step = next(step for step in map((2).__pow__, range(16)) if (high - low) / step < _MOST_TICKS)
    ticks = tuple((float(tick), str(tick)) for tick in range(low, high + 1, step))
    return Axis(low=low - 0.5, high=high + 0.5, log=False, ticks=ticks)


def line_chart(series: Sequence[Series], x: Axis, y: Axis, x_name: str, y_name: str) -> str:
    """An SVG picture of lines over two axes, with the names of both."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(y_name)}, over {escaped(x_name)}">',
        f'<text class="name" x="2" y="9">{escaped(y_name)}</text>',
        f'<text class="name end" x="{WIDTH - _RIGHT}" y="{HEIGHT - 5}">{escaped(x_name)}</text>',
    ]
    left, right, top, bottom = _LEFT, WIDTH - _RIGHT, _TOP + 8, HEIGHT - _BOTTOM

    def across(value: float) -> float:
        return round(left + x.share(value) * (right - left), 1)

    def down(value: float) -> float:
        return round(bottom - y.share(value) * (bottom - top), 1)

    for value, text in y.ticks:
        place = down(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{place}" y2="{place}"/>')
        parts.append(f'<text class="end" x="{left - 5}" y="{place + 4}">{escaped(text)}</text>')
    for value, text in x.ticks:
        place = across(value)
        parts.append(f'<line class="grid" x1="{place}" x2="{place}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="middle" x="{place}" y="{bottom + 16}">{escaped(text)}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for one in series:
        places = [(across(a), down(b)) for a, b in one.points if not math.isnan(a + b)]
        style = one.style % NUM_STYLES
        path = " ".join(f"{a:g},{b:g}" for a, b in places)
        parts.append(f'<g class="s{style}"><title>{escaped(one.name)}</title><polyline points="{path}"/>')
        step = max(1, math.ceil(len(places) / _MOST_MARKERS)) if len(places) <= _CURVE else len(places) - 1
        parts += [_marker(style, a, b) for a, b in places[::step]]
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def heat_map(
    cells: Sequence[Sequence[Cell | None]], rows: Sequence[str], columns: Sequence[str], row_name: str, column_name: str
) -> str:
    """An SVG picture of rows of cells, with the names of rows and columns; None leaves a cell empty. The cells have
    their texts where there is room for them."""
    left, top = _LEFT, 30
    width = (WIDTH - _RIGHT - left) / len(columns)
    height = min(26.0, max(9.0, width))
    total = round(top + height * len(rows) + 4)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {total}" role="img" aria-label="{escaped(row_name)} by {escaped(column_name)}">',
        f'<text class="name" x="2" y="9">{escaped(row_name)}</text>',
        f'<text class="name end" x="{WIDTH - _RIGHT}" y="9">{escaped(column_name)}</text>',
    ]
    for at in range(0, len(columns), max(1, math.ceil(_LEAST_ROOM / width))):
        parts.append(
            f'<text class="middle" x="{left + (at + 0.5) * width:.1f}" y="{top - 6}">{escaped(columns[at])}</text>'
        )
    for at in range(0, len(rows), max(1, math.ceil(12 / height))):
        place = top + (at + 0.5) * height + 4
        parts.append(f'<text class="end" x="{left - 5}" y="{place:.1f}">{escaped(rows[at])}</text>')
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            if cell is None:
                continue
            x, y, kind = left + column * width, top + row * height, "more" if cell.shade >= 0 else "less"
            parts.append(
                f'<g class="{kind}"><title>{escaped(cell.said)}</title><rect x="{x:.1f}" y="{y:.1f}" '
                f'width="{width:.1f}" height="{height:.1f}" fill-opacity="{0.7 * min(1.0, abs(cell.shade)):.2f}"/>'
            )
            if width >= 6.5 * len(cell.text) and height >= 12:
                parts.append(
                    f'<text class="middle cell" x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}">'
                    f"{escaped(cell.text)}</text>"
                )
            parts.append("</g>")
    return "".join([*parts, "</svg>"])


def legend(series: Sequence[Series]) -> str:
    """The names of lines with their strokes and markers, as an HTML list."""
    items = []
    for style, name in dict.fromkeys((one.style % NUM_STYLES, one.name) for one in series):
        swatch = f'<svg viewBox="0 0 34 12" class="swatch s{style}" aria-hidden="true"><polyline points="1,6 33,6"/>'
        items.append(f"<li>{swatch}{_marker(style, 17, 6)}</svg>{escaped(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _marker(style: int, x: float, y: float) -> str:
    if style == 0:
        return f'<circle cx="{x:g}" cy="{y:g}" r="3"/>'
    shapes = {
        1: ((-3, -3), (3, -3), (3, 3), (-3, 3)),
        2: ((0, -4), (3.6, 3), (-3.6, 3)),
        3: ((0, -4), (4, 0), (0, 4), (-4, 0)),
        4: ((0, 4), (3.6, -3), (-3.6, -3)),
        5: ((-4, -1.2), (4, -1.2), (4, 1.2), (-4, 1.2)),
    }
    return f'<polygon points="{" ".join(f"{x + a:g},{y + b:g}" for a, b in shapes[style])}"/>'


def _tick(value: float) -> str:
    """1e-5, 0.001, 0.02, 1: as `number`, without zeros that say nothing."""
    text = number(value)
    return text.replace(".0e", "e") if "e" in text else f"{value:g}"
