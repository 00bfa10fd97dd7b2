"""The page of `moeship inspect --text --report`: how the tokens of a text use the experts, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.reference.usage import NEAR_TIE, LayerUsage, Usage
from trt_build.comparison.evaluation_text import EvaluationText
from trt_build.report.charts import Axis, Cell, Series, count_axis, heat_map, line_chart, log_axis
from trt_build.report.contents import Rows
from trt_build.report.page import document, facts, pictures, section
from trt_build.report.visible import escaped, number, percent

MOST_CELLS = 20_000  # of all pictures of pairs: with more, the page would take seconds to draw
_FULL_SHADE = 3.0  # a load of that many times the equal share has the darkest colour
_FULL_LIFT = 4.0  # so has a pair that is that many times as frequent as by chance, or as rare


@dataclass(frozen=True, kw_only=True)
class UsageReport:
    """All that the page shows."""

    model: str
    computed: str  # a sentence on what computed the routers' logits
    facts: Rows
    usage: Usage
    text: EvaluationText
    versions: Mapping[str, str]
    command: str


def usage_page(report: UsageReport) -> str:
    """The text of the HTML file."""
    usage = report.usage
    sections = [
        section("Model and text", facts(report.facts)),
        section("Load", _loads(usage)),
        section("How sure the routers are", _sureness(usage)),
        section("Which experts go together", _pairs(usage)),
        section("How this was measured", _measured(report)),
    ]
    return document(f"How a text uses the experts of {report.model}", sections)


def _loads(usage: Usage) -> str:
    equal = 1 / usage.num_experts
    said = (
        f"Each token takes {usage.experts_per_token} of the {usage.num_experts} experts of a layer. The first picture "
        "has each expert's share of these places in percent, the second its share of the weights that multiply the "
        f"experts' outputs. Equal shares are {percent(equal)}; blue is above, orange below."
    )
    maps = [
        _by_layer(usage, "places, %", lambda layer: layer.load.tolist()),
        _by_layer(usage, "weight, %", lambda layer: layer.weight_shares.tolist()),
    ]
    return f"<p>{escaped(said)}</p>{pictures(maps)}"


def _by_layer(usage: Usage, name: str, shares: Callable[[LayerUsage], Sequence[float]]) -> str:
    equal = 1 / usage.num_experts
    cells = [
        [
            Cell(
                text=f"{100 * share:.1f}",
                said=f"layer {layer.layer}, expert {expert}: {100 * share:.2f} %",
                shade=(share / equal - 1) / (_FULL_SHADE - 1) if share >= equal else share / equal - 1,
            )
            for expert, share in enumerate(shares(layer))
        ]
        for layer in usage.layers
    ]
    rows = [str(layer.layer) for layer in usage.layers]
    return heat_map(cells, rows, list(map(str, range(usage.num_experts))), f"layer: {name}", "expert")


def _sureness(usage: Usage) -> str:
    layers = [layer.layer for layer in usage.layers]
    shares = [layer.near_ties / layer.num_tokens for layer in usage.layers]
    ticks = tuple((share, percent(share, 0)) for share in (0.0, 0.25, 0.5, 0.75, 1.0))
    whole = Axis(low=0.0, high=1.0, log=False, ticks=ticks)
    entropy = Series(name="entropy", style=0, points=[(layer.layer, layer.relative_entropy) for layer in usage.layers])
    charts = [line_chart([entropy], count_axis(layers), whole, "layer", "entropy, share of ln E")]
    said = (
        "The entropy of a router's distribution over all experts, as a share of that of equal chances "
        f"({number(math.log(usage.num_experts))} nats): 0 for a router that is sure, 100 % for one that does not care. "
    )
    if usage.experts_per_token < usage.num_experts:
        ties = Series(name="near ties", style=1, points=list(zip(layers, shares, strict=True)))
        axis = log_axis(shares, shares=True) if any(shares) else whole
        charts.append(line_chart([ties], count_axis(layers), axis, "layer", "tokens with a near tie"))
        equal = sum(layer.equal for layer in usage.layers)
        said += (
            "In a near tie the last expert that is chosen and the first that is not have logits that differ by at most "
            f"{NEAR_TIE:g}, so their weights differ by at most 1 %: an error of quantisation can exchange them. "
            + (f"In {equal} cases both were equal." if equal else "No two were equal.")
        )
    return f"<p>{escaped(said)}</p>{pictures(charts)}"


def _pairs(usage: Usage) -> str:
    if usage.experts_per_token < 2:
        return "<p>Each token takes one expert, so there are no pairs.</p>"
    shown = max(1, min(len(usage.layers), MOST_CELLS // usage.num_experts**2))
    apart = sorted(usage.layers, key=_departure, reverse=True)[:shown]
    said = (
        "How often two experts are chosen by the same token, over what their loads alone would give "
        "(quasi-independence: no token takes an expert twice). Blue pairs are more frequent, orange ones rarer; pairs "
        "that chance would give less than once are left empty."
    )
    if shown < len(usage.layers):
        said += f" The {shown} of {len(usage.layers)} layers that are furthest from independence."
    maps = [_pair_map(layer) for layer in sorted(apart, key=lambda layer: layer.layer)]
    return f"<p>{escaped(said)}</p>{pictures(maps)}"


def _departure(layer: LayerUsage) -> float:
    """Half the sum of |counted - independent| over the pairs: tokens times pairs that chance would place otherwise."""
    return float(np.abs(layer.together - layer.independent).sum())


def _pair_map(layer: LayerUsage) -> str:
    names = list(map(str, range(len(layer.chosen))))
    cells = [
        [_pair_cell(layer, first, second) for second in range(len(layer.chosen))] for first in range(len(layer.chosen))
    ]
    return heat_map(cells, names, names, f"expert, layer {layer.layer}", "expert")


def _pair_cell(layer: LayerUsage, first: int, second: int) -> Cell | None:
    found, expected = int(layer.together[first, second]), float(layer.independent[first, second])
    if first == second or expected < 1:
        return None
    lift = found / expected
    shade = math.log(lift) / math.log(_FULL_LIFT) if lift > 0 else -1.0
    return Cell(
        text=number(lift),
        said=f"experts {first} and {second}: {found} tokens, by chance {expected:.0f}",
        shade=max(-1.0, min(1.0, shade)),
    )


def _measured(report: UsageReport) -> str:
    rows: Rows = (
        ("text", f"{report.usage.num_tokens} tokens of {', '.join(report.text.names)}"),
        ("windows", f"{report.usage.num_windows}, each by itself"),
        ("digest of the text", f"SHA-256 {report.text.sha256}"),
        *((f"version of {name}", version) for name, version in report.versions.items()),
        ("command", report.command),
    )
    said = f"{report.computed} Among equal logits the lowest expert index is chosen."
    return f"<p>{escaped(said)}</p>{facts(rows)}"
