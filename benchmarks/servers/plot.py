"""Draws the result: tokens a second, first tokens and time between tokens, by the number of streams."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decode.plot import COLOURS
from export.optional import optional_package

_OTHERS = ("#e08e45", "#9aa5b1", "#7a9e7e", "#a77bbf")


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture; the suffix of `path` chooses its format. Raises MissingPackageError without matplotlib."""
    with optional_package("matplotlib", "drawing the benchmark", "bench"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    rates, first, between = figure.subplots(1, 3)
    others = iter(_OTHERS)
    for name, scenarios in result["medians"].items():
        found = {int(key.split()[1]): value for key, value in scenarios.items() if key.startswith("load")}
        style = {"color": COLOURS.get(name) or next(others, "black"), "label": name, "marker": "o"}
        _line(rates, {streams: value["tokens_per_s"] for streams, value in found.items()}, style)
        _line(first, {streams: value["first_token_s"]["p50"] for streams, value in found.items()}, style)
        _line(between, _scaled({streams: value["between_tokens_s"]["p50"] for streams, value in found.items()}), style)
        _line(
            between, _scaled({streams: value["between_tokens_s"]["p99"] for streams, value in found.items()}),
            {**style, "linestyle": ":"},
        )  # fmt: skip
    for axis, title, unit in (
        (rates, "output tokens per second, prefill included", "tokens/s"),
        (first, "time to first token, median", "seconds"),
        (between, "time between tokens: median (line), p99 (dots)", "milliseconds"),
    ):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("streams")
        axis.set_ylabel(unit)
        axis.set_xticks(result["load"]["streams"])
        if axis is between:  # from a step to the wait beside others' prompts: three powers of ten
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines and axis is not between:  # the same colours
            axis.legend(fontsize=8, frameon=False)
    load, machine = result["load"], result["machine"]
    figure.suptitle(
        f"{result['model']['name']}, {load['prompt_tokens']} tokens in, {load['max_tokens']} out: "
        f"{machine['processor']}, {result['threads']} threads",
        fontsize=11,
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def _line(axis: Any, values: Mapping[int, float | None], style: Mapping[str, Any]) -> None:  # noqa: ANN401 - matplotlib's
    there = {streams: value for streams, value in values.items() if value is not None}
    if there:
        axis.plot(list(there), list(there.values()), **style)


def _scaled(values: Mapping[int, float | None]) -> dict[int, float | None]:
    return {streams: None if value is None else value * 1e3 for streams, value in values.items()}
