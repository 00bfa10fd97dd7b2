"""Charts: points lie where their values say, ticks are round, and nothing leaves the picture."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from trt_build.report.charts import (
    HEIGHT,
    WIDTH,
    Cell,
    Series,
    count_axis,
    heat_map,
    legend,
    line_chart,
    log_axis,
    share_axis,
)


def texts(axis):
    return [text for _, text in axis.ticks]


def test_log_axes_end_at_decades():
    axis = log_axis([0.004, 5e-6, 0.0, math.nan])
    assert (axis.low, axis.high) == (pytest.approx(1e-6), pytest.approx(0.01))
    assert texts(axis) == ["0.01", "0.001", "1e−4", "1e−5", "1e−6"]
    assert axis.share(1e-4) == pytest.approx(0.5)
    assert (axis.share(1e-9), axis.share(1.0)) == (0.0, 1.0)
    assert texts(log_axis([0.15, 0.3])) == ["0.1", "0.2", "0.5", "1"]
    assert len(log_axis([1e-13, 1.0], 16).ticks) <= 7
    assert log_axis([1e-13, 1.0]).low == pytest.approx(1e-6)
    assert log_axis([]).low < log_axis([]).high
    assert texts(log_axis([1.0, 0.005], shares=True)) == ["100 %", "10 %", "1 %", "0.1 %"]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.94, 0.996], ["94 %", "96 %", "98 %", "100 %"]),
        ([0.9991], ["99.9 %", "100.0 %"]),
        ([1.0], ["99.9 %", "100.0 %"]),
        ([0.1], ["0 %", "25 %", "50 %", "75 %", "100 %"]),
        ([], ["90 %", "92 %", "94 %", "96 %", "98 %", "100 %"]),
    ],
)
def test_axes_of_shares_end_at_all(values, ticks):
    axis = share_axis(values)
    assert texts(axis) == ticks
    assert axis.share(1.0) == 1.0
    assert all(0 <= axis.share(value) <= 1 for value in values)


@pytest.mark.parametrize(("layers", "ticks"), [(4, 4), (32, 4), (1, 1), (61, 4), (7, 7)])
def test_layers_have_few_ticks(layers, ticks):
    assert len(count_axis(range(layers)).ticks) == pytest.approx(ticks, abs=3)
    assert len(count_axis(range(layers)).ticks) <= 8


def test_points_lie_where_their_values_say():
    series = [
        Series(name="<a>", style=0, points=[(0, 1.0), (1, 0.1), (2, math.nan), (math.nan, 1.0), (3, 0.01)]),
        Series(name="b", style=7, points=[(number, 0.1) for number in range(50)]),
    ]
    picture = line_chart(series, count_axis([0, 3]), log_axis([1.0, 0.01]), "layer", "KL & more")
    root = ElementTree.fromstring(picture)
    assert root.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"
    first, second = (group for group in root.iter("g"))
    assert (first.get("class"), second.get("class")) == ("s0", "s1")
    assert first.find("title").text == "<a>"
    places = [tuple(map(float, pair.split(","))) for pair in first.find("polyline").get("points").split()]
    assert len(places) == 3  # NaN has no place
    (x0, y0), (x1, y1), (x3, y3) = places
    assert y1 - y0 == pytest.approx(y3 - y1, abs=0.2)
    assert y0 < y1
    assert x3 - x0 == pytest.approx(3 * (x1 - x0), abs=0.3)
    assert len(first.findall("circle")) == 3
    assert len(second.findall("polygon")) == 2  # too many points for markers but at its ends
    for place in re.findall(r'(?:x1|x2|cx|x)="([\d.]+)"', picture):
        assert 0 <= float(place) <= WIDTH
    for place in re.findall(r'(?:y1|y2|cy|y)="([\d.]+)"', picture):
        assert 0 <= float(place) <= HEIGHT


def test_a_legend_names_each_line_once_with_its_stroke():
    lines = [Series(name=name, style=style, points=[]) for style, name in enumerate("abcdefg")]
    found = legend([*lines, *lines])
    assert found.count("<li>") == 7
    assert re.findall(r"swatch (s\d)", found) == ["s0", "s1", "s2", "s3", "s4", "s5", "s0"]


def test_cells_of_a_heat_map_lie_in_their_rows_and_columns():
    cells = [
        [Cell(text="1.5", said="<one>", shade=0.5), None],
        [Cell(text="2", said="two", shade=-2.0), Cell(text="3", said="three", shade=0.0)],
    ]
    root = ElementTree.fromstring(heat_map(cells, ["r0", "r1"], ["c0", "c1"], "rows", "columns"))
    groups = root.findall("g")
    rects = [group.find("rect") for group in groups]
    assert [group.find("title").text for group in groups] == ["<one>", "two", "three"]
    assert [group.get("class") for group in groups] == ["more", "less", "more"]
    assert [rect.get("fill-opacity") for rect in rects] == ["0.35", "0.70", "0.00"]
    assert float(rects[0].get("x")) == float(rects[1].get("x")) < float(rects[2].get("x"))
    assert float(rects[1].get("y")) == float(rects[2].get("y")) > float(rects[0].get("y"))
    assert all(float(rect.get("x")) + float(rect.get("width")) <= WIDTH for rect in rects)
    assert float(rects[2].get("y")) + float(rects[2].get("height")) <= float(root.get("viewBox").split()[3])
    assert [group.findtext("text") for group in groups] == ["1.5", "2", "3"]


def test_a_heat_map_of_many_columns_has_no_texts_in_its_cells():
    cells = [[Cell(text="99.9", said="x", shade=1.0)] * 64] * 2
    root = ElementTree.fromstring(heat_map(cells, ["0", "1"], list(map(str, range(64))), "layer", "expert"))
    assert all(group.find("text") is None for group in root.findall("g"))
    assert len(root.findall("text")) < 64
