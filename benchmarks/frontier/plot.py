"""Draws the frontier: KL divergence against bits a weight and against bytes a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export.optional import optional_package

# Method -> label, colour, marker, and whether its points are named.
_STYLES = {
    "llama.cpp": ("llama.cpp, importance matrix", "#c0392b", "s", True),
    "nearest": ("moeship, rounding to the nearest", "#b8c2cc", "v", False),
    "search": ("moeship, without text (search)", "#6fa8d6", "o", False),
    "gptq": ("moeship, over calibration text (gptq)", "#1b4f72", "o", True),
}
Points = Sequence[Mapping[str, Any]]
_LADDER = "q"  # names of the presets that a line joins begin so
_UNNAMED = ("int8",)  # which lies on q8
# Names of llama.cpp's points stand above them and ours below, but for those that would lie on a neighbour.
_BELOW, _ABOVE = ("Q4_0",), ("int4",)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture; the suffix of `path` chooses its format. Raises MissingPackageError without matplotlib."""
    with optional_package("matplotlib", "drawing the frontier", "bench"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, key, factor in ((left, "bits", 1.0), (right, "bytes_per_token", 1e-6)):
        for method in _STYLES:
            _points(axis, [point for point in result["points"] if point["method"] == method], method, key, factor)
        axis.set_yscale("log")
        axis.grid(visible=True, which="major", color="#e5e8eb", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("mean KL divergence from float32, nats")
    left.set_xlabel("bits a weight, all stored bytes")
    right.set_xlabel("MB of weights that decoding a token reads")
    right.legend(frameon=False, fontsize=9)
    held_out = result["model"]["held_out"]
    figure.suptitle(
        f"A Mixtral of 8 experts, 15 M weights, {held_out['bits_per_byte']:.2f} bits a byte on held-out text; "
        f"{result['tokens']:,} tokens of it",
        fontsize=11,
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def _points(axis: Any, points: Points, method: str, key: str, factor: float) -> None:  # noqa: ANN401 - matplotlib's
    label, colour, marker, named = _STYLES[method]
    own = sorted(points, key=lambda point: point[key])
    axis.scatter([p[key] * factor for p in own], [p["kl"] for p in own], color=colour, marker=marker, s=28, label=label)
    line = [p for p in own if method == "llama.cpp" or p["name"].startswith(_LADDER)]
    axis.plot([p[key] * factor for p in line], [p["kl"] for p in line], color=colour, linewidth=1)
    axis.margins(x=0.09)
    for p in own if named else ():
        is_above = (method == "llama.cpp" and p["name"] not in _BELOW) or p["name"] in _ABOVE
        side = (5, 4) if is_above else (-4, -11)
        if p["name"] in _UNNAMED:
            continue
        axis.annotate(p["name"], (p[key] * factor, p["kl"]), xytext=side, textcoords="offset points", fontsize=8,
                      color=colour, ha="left" if side[0] > 0 else "right")  # fmt: skip
