"""The page of `moeship verify --report`: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import numpy as np
import numpy.typing as npt

from trt_build.report.charts import Series, count_axis, legend, line_chart, log_axis, share_axis
from trt_build.report.contents import Choice, GreedyText, Place, Report, ReportedEngine, Rows, Token
from trt_build.report.tables import cost_parts, cost_tables, engine_table, question_table
from trt_build.report.visible import escaped, number, percent, shown_text, token_text

_CURVE_POINTS = 90
_KL_DECADES = 16
# The page loads nothing; a browser that obeys this could not if it tried.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Report) -> str:
    """The text of the HTML file."""
    title = f"Verification of {len(report.engines)} engine{'s' * (len(report.engines) > 1)} of {report.model}"
    sections = [
        section("Engines", facts(report.facts) + engine_table(report.engines)),
        section("Four questions", question_table(report.engines)),
        section("What the quantiser cost, part by part", _costs(report)),
        section("The same experts, layer by layer", _routing(report)),
        section("How far apart, token by token", _distribution(report)),
        section("Where they differ most", _places(report)),
        section("What they write", _texts(report)),
        section("How this was measured", _measured(report)),
    ]
    return document(title, sections)


def document(title: str, sections: Sequence[str]) -> str:
    """An HTML file that needs nothing else, of sections in HTML. `title` is plain text."""
    title = escaped(title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escaped(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n'
        f"<style>\n{style()}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{title}</h1>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def style() -> str:
    """The page's style sheet."""
    return (resources.files("trt_build.report") / "page.css").read_text(encoding="utf-8")


def section(title: str, content: str) -> str:
    """A heading and its content in HTML; nothing without content. `title` is plain text."""
    return f"<section>\n<h2>{escaped(title)}</h2>\n{content}\n</section>\n" if content else ""


def facts(rows: Rows) -> str:
    """Names and values as an HTML list."""
    items = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in rows)
    return f"<dl>{items}</dl>"


def _costs(report: Report) -> str:
    """A chart a role, with the layers across, then the numbers."""
    parts = [part for engine in report.engines for part in cost_parts(engine)]
    roles = list(dict.fromkeys(part["role"] for part in parts if "layer" in part))
    layers = sorted({part["layer"] for part in parts if "layer" in part})
    charts: list[str] = []
    lines: list[Series] = []
    axis = log_axis([part["mean_kl"] for part in parts if "layer" in part and "expert" not in part])
    for role in roles:
        series = [
            Series(
                name=engine.name,
                style=style,
                points=[
                    (part["layer"], part["mean_kl"])
                    for part in cost_parts(engine)
                    if part["role"] == role and "layer" in part and "expert" not in part
                ],
            )
            for style, engine in enumerate(report.engines)
            if cost_parts(engine)
        ]
        lines += series
        name = {"expert": "experts", "ffn": "MLP"}.get(role, role)
        charts.append(line_chart(series, count_axis(layers), axis, "layer", f"mean KL, nats: {name}"))
    said = (
        "The mean KL divergence from the reference of a model in which one part alone has the engine's codes and all "
        "else is the checkpoint's, computed in float32. Parts do not add up to the whole: errors of one layer meet "
        "those of another. The engines' own figures, above, hold what their kernels round, too. In italics: few tokens "
        "carry the figure, and its standard error is more than half of it; such are tokens for which two experts' "
        "router logits are nearly equal, so that any error changes the choice."
    )
    shown = legend(lines) + pictures(charts) if charts else ""
    return f"<p>{escaped(said)}</p>{shown}{cost_tables(report.engines)}"


def _routing(report: Report) -> str:
    found = [(engine.record or {}).get("routing_by_layer") for engine in report.engines]
    if not report.mixture_layers or not any(found):
        return ""
    series = [
        Series(name=engine.name, style=style, points=list(zip(report.mixture_layers, shares, strict=False)))
        for style, (engine, shares) in enumerate(zip(report.engines, found, strict=True))
        if shares
    ]
    values = [share for one in series for _, share in one.points]
    chart = line_chart(
        series, count_axis(report.mixture_layers), share_axis(values), "layer", "tokens with the reference's experts"
    )
    return (
        "<p>The share of scored tokens for which the engine chose the same set of experts as the reference.</p>"
        f"{legend(series)}{pictures([chart])}"
    )


def _distribution(report: Report) -> str:
    own = [(style, engine) for style, engine in enumerate(report.engines) if engine.kl is not None and len(engine.kl)]
    if not own:
        return ""
    series = [Series(name=one.name, style=style, points=_curve(one.kl)) for style, one in own if one.kl is not None]
    most = max(len(engine.kl) for _, engine in own if engine.kl is not None)
    # The smallest values are noise of the arithmetic, so they do not stretch the axis.
    low = [float(np.quantile(engine.kl, 0.02)) for _, engine in own if engine.kl is not None]
    across = log_axis([*low, *(one.points[0][0] for one in series)], _KL_DECADES)
    down = log_axis([1.0, 1.0 / most], shares=True)
    chart = line_chart(series, across, down, "KL, nats", "share of tokens with at least that KL")
    return (
        "<p>Where a curve crosses 1 %, one token in a hundred is at least that far from the "
        f"reference.</p>{legend(series)}{pictures([chart])}"
    )


def _curve(kl: npt.NDArray[np.float64]) -> list[tuple[float, float]]:
    """(KL, share of positions with at least that KL) at some of the positions, evenly by the share's logarithm."""
    ordered = np.sort(kl)[::-1]
    ranks = np.unique(np.geomspace(1, len(kl), _CURVE_POINTS).round().astype(int))
    return [(float(ordered[rank - 1]), rank / len(kl)) for rank in ranks.tolist()]


def pictures(charts: Sequence[str]) -> str:
    """SVG pictures side by side, as far as there is room."""
    return f'<div class="pictures">{"".join(f"<figure>{chart}</figure>" for chart in charts)}</div>'


def _places(report: Report) -> str:
    if not report.places:
        return ""
    cards = "".join(_place(place, report.engines) for place in report.places)
    return (
        "<p>The next token that the reference and each engine find most likely, with its probability, at the positions "
        f'where one of the engines is furthest from the reference.</p><div class="cards">{cards}</div>'
    )


def _place(place: Place, engines: Sequence[ReportedEngine]) -> str:
    rows = [_choice("reference", place.reference, None)]
    for engine, choice, kl in zip(engines, place.engines, place.kl, strict=True):
        if choice is not None:
            rows.append(_choice(engine.name, choice, kl, choice.text != place.reference.text))
    follows = f"In the text: {token_text(place.following)}" if place.following else "The window ends here"
    return (
        f'<article><p class="context">{shown_text(place.before)}<b class="gap">?</b></p><table><thead><tr><td></td>'
        f'<th scope="col">token</th><th scope="col">prob.</th><th scope="col">KL, nats</th></tr></thead><tbody>'
        f'{"".join(rows)}</tbody></table><p class="small">{follows} · position {place.number}</p></article>'
    )


def _choice(name: str, choice: Choice, kl: float | None, other: bool = False) -> str:
    mark = ' class="other"' if other else ""
    return (
        f'<tr><th scope="row">{escaped(name)}</th><td{mark}>{token_text(choice.text)}</td>'
        f"<td>{percent(choice.probability)}</td><td>{'' if kl is None else number(kl)}</td></tr>"
    )


def _texts(report: Report) -> str:
    if not report.texts:
        return ""
    said = (
        "Greedy text behind the same beginnings. Underlined tokens are those for which the reference, having read the "
        "same text, would have chosen another one."
    )
    return f"<p>{escaped(said)}</p>{''.join(_greedy(text, report.engines) for text in report.texts)}"


def _greedy(text: GreedyText, engines: Sequence[ReportedEngine]) -> str:
    columns = "".join(
        f"<article><h4>{escaped(engine.name)}</h4>{_answer(tokens)}</article>"
        for engine, tokens in zip(engines, text.engines, strict=True)
    )
    return f'<h3 class="prompt">{shown_text(text.prompt)}</h3><div class="sides">{columns}</div>'


def _answer(tokens: Sequence[Token] | None) -> str:
    if tokens is None:
        return "<p>Its text is not shown.</p>"
    shown = [(token, shown_text(token.text, breaks=True)) for token in tokens]
    parts = [text if token.instead is None else f"<u>{text}</u>" for token, text in shown]
    other = [(number, token) for number, token in enumerate(tokens, start=1) if token.instead is not None]
    said = "The reference would have written the same."
    if other:
        first, token = other[0]
        said = (
            f"{len(other)} of {len(tokens)} tokens are not the reference's; at the first, token {first}, it would have "
            f"said {token_text(token.instead or '')}."
        )
    return f'<p class="text">{"".join(parts)}</p><p class="small">{said}</p>'


def _measured(report: Report) -> str:
    names = ", ".join(report.text.names)
    findings = dict.fromkeys(str(one) for engine in report.engines for one in (engine.record or {}).get("findings", ()))
    rows: Rows = (
        ("text", f"{report.num_tokens} tokens of {names}"),
        ("digest of the text", f"SHA-256 {report.text.sha256}"),
        *((f"version of {name}", version) for name, version in report.versions.items()),
        ("command", report.command),
        *(("finding", finding) for finding in findings),
    )
    said = (
        "KL is the Kullback-Leibler divergence of the engine's distribution over the next token from the reference's, "
        "in nats: 0 for equal ones. The reference is the checkpoint, computed in float32."
    )
    return f"<p>{escaped(said)}</p>{facts(rows)}"
