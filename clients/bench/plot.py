"""Draws the loads of one target: tokens a second, and how long first tokens and further tokens took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clients.bench.kept import Level
from clients.bench.records import Record
from clients.bench.report import gaps_per_token
from export.optional import optional_package

BAR = "#1b6ca8"


def draw(levels: Sequence[Level], title: str, path: Path) -> None:
    """Write the picture of loads: the name, report and records of each. The suffix of `path` chooses the format.
    Raises MissingPackageError without matplotlib."""
    with optional_package("matplotlib", "drawing a load", "load"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 4), layout="constrained")
    rates, first, between = figure.subplots(1, 3)
    names = [level.name for level in levels]
    heights = [level.report["output_tokens_per_s"] for level in levels]
    bars = rates.bar(range(len(names)), heights, color=BAR, width=0.6, tick_label=names)
    rates.bar_label(bars, [f"{height:.0f}" if height >= 100 else f"{height:.3g}" for height in heights], fontsize=8)
    rates.set_title("output tokens per second", fontsize=10)
    what = "streams" if levels[0].report["load"]["kind"] == "closed loop" else "requests per second"
    rates.set_xlabel(what)
    _shares(
        first, [(level.name, _firsts(level.records), 1.0) for level in levels], "time to first token", "seconds", what
    )
    _shares(
        between, [(level.name, gaps_per_token(level.records), 1e3) for level in levels], "time between tokens",
        "milliseconds", what,
    )  # fmt: skip
    for axis in (rates, first, between):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def _firsts(records: Sequence[Record]) -> list[float]:
    return [record.first_token_s for record in records if record.first_token_s is not None]


def _shares(axis: Any, series: Sequence[tuple[str, list[float], float]], title: str, unit: str, what: str) -> None:  # noqa: ANN401 - matplotlib's
    """Draw what share of the values lies below each value."""
    drawn = [(name, [value * scale for value in values]) for name, values, scale in series if values]
    for name, values in drawn:
        axis.ecdf(values, label=name)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(unit)
    axis.set_ylabel("share of values below")
    if drawn:
        axis.set_xscale("log")
        axis.legend(fontsize=8, frameon=False, loc="lower right", title=what, title_fontsize=8)
