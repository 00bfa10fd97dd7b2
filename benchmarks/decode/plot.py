"""Draws the result: bars of decode and prefill rates, with the limit that bandwidth sets over each decode bar."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decode.results import DECODES
from export.optional import optional_package

COLOURS = {"ours": "#1b6ca8"}
_OTHERS = "#9aa5b1"
_BOUND = "#c0392b"
_HEIGHT = 0.46  # height of a bar; its figure stands above it


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture; the suffix of `path` chooses its format. Raises MissingPackageError without matplotlib."""
    with optional_package("matplotlib", "drawing the benchmark", "bench"):
        from matplotlib.figure import Figure
    names = list(result["contenders"])
    lengths = result["lengths"]
    figure = Figure(figsize=(11, 1.9 + 0.55 * len(names)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (rate, context) in zip(axes, DECODES.items(), strict=False):
        _bars(axis, result, rate, f"decode, context {lengths[context]}")
    _bars(axes[2], result, "prefill", f"prefill, {lengths['prefill']} tokens")
    axes[0].set_yticks(range(len(names)), [_label(name, result["contenders"][name]) for name in names])
    axes[0].invert_yaxis()
    machine = result["machine"]
    figure.suptitle(
        f"{result['model']['name']}, batch 1: {machine['processor']}, {result['threads']} threads, "
        f"{result['bandwidth']['bytes_per_second'] / 1e9:.1f} GB/s read (bound in red)",
        fontsize=11,
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def _bars(axis: Any, result: Mapping[str, Any], rate: str, title: str) -> None:  # noqa: ANN401 - matplotlib's
    contenders = result["contenders"]
    for place, (name, found) in enumerate(contenders.items()):
        value, (low, high) = found["median"][rate], found["spread"][rate]
        hatch = "//" if "scaled" in found["notes"] else None
        axis.barh(place, value, color=COLOURS.get(name, _OTHERS), height=_HEIGHT, hatch=hatch, edgecolor="white")
        axis.plot([low, high], [place, place], color="black", linewidth=1)
        bound = found["bandwidth_bound"].get(rate)
        if bound is not None:
            axis.plot([bound, bound], [place - _HEIGHT / 2, place + _HEIGHT / 2], color=_BOUND, linewidth=2)
        share = f"  {found['bandwidth_share'][rate]:.0%} of the bound" if bound is not None else ""
        axis.annotate(f"{value:.3g}{share}", (0, place - _HEIGHT / 2), xytext=(3, 2), textcoords="offset points",
                      fontsize=8)  # fmt: skip
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("tokens/s")
    axis.spines[["top", "right"]].set_visible(False)


def _label(name: str, found: Mapping[str, Any]) -> str:
    weights = f"{found['weights']['active'] / 1e9:.2f} B active"
    scaled = ", scaled" if "scaled" in found["notes"] else ""
    return f"{name}\n{weights}, {found['bytes_per_token']['decode_short'] / 1e9:.2f} GB/token{scaled}"
