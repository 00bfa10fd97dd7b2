"""The tables of the page: engines, questions with figure, limit and verdict, and what the quantiser cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trt_build.comparison.answers import OF_INT8_CACHE
from trt_build.comparison.cost import QUESTION as OF_COST
from trt_build.comparison.serving_ways import FLOAT32_LIMITS
from trt_build.comparison.weights.comparing import QUESTION as OF_WEIGHTS
from trt_build.report.contents import ReportedEngine
from trt_build.report.visible import change, escaped, number, percent

OF_GRAPH = "Does the graph compute what the codes say?"
OF_SERVING = "Is what is served what was scored?"
_YES_NO, _LIMITS = ("yes", "NO"), ("within its limits", "PAST ITS LIMITS")
COLOURED_DECADES = 4  # costs that are smaller than the largest by more have no colour
# Figures of the first question (trt_build/comparison/limits.py).
_WEIGHT_FIGURES = {
    "factor": "factor off 1", "offset": "offset, steps", "excess": "excess of a row", "row": "error of a row",
    "matrix": "error of a matrix", "code": "past the nearest code, steps", "scale": "scale off the recipe's",
}  # fmt: skip

Json = Mapping[str, Any]


def engine_table(engines: Sequence[ReportedEngine]) -> str:
    """Facts of all engines, a column each, and their verdicts."""
    names = list(dict.fromkeys(name for engine in engines for name, _ in engine.facts))
    rows = [_row(name, [escaped(dict(engine.facts).get(name, "")) for engine in engines]) for name in names]
    rows.insert(0, _row("verdict", [_verdict(engine) for engine in engines]))
    notes = [f"<p><b>{escaped(one.name)}</b>: {escaped(one.note)}</p>" for one in engines if one.note]
    return _table(engines, rows) + "".join(notes)


def question_table(engines: Sequence[ReportedEngine]) -> str:
    """The four questions: of each figure what was found, what is allowed, and whether that is kept."""
    records = [engine.record or {} for engine in engines]
    rows = [_heading(OF_WEIGHTS, [_answer(engine, OF_WEIGHTS) for engine in engines])]
    weights = [_question(record, OF_WEIGHTS) for record in records]
    for recipe in dict.fromkeys(recipe for answer in weights for recipe in answer.get("largest", {})):
        found = {figure for answer in weights for figure in answer.get("largest", {}).get(recipe, {})}
        for figure, name in _WEIGHT_FIGURES.items():
            if figure in found:  # solved codes have two figures
                rows.append(_row(f"{recipe}: {name}", [_weights_cell(answer, recipe, figure) for answer in weights]))
    rows.append(_heading(OF_GRAPH, [_answer(engine, OF_GRAPH) for engine in engines]))
    for name, cell in (("error of the logits", _graph_cell), ("error of router logits", _router_cell)):
        rows.append(_row(name, [cell(_question(record, OF_GRAPH)) for record in records]))
    rows.append(_heading(OF_COST, [_kept(engine, _cost_figures(engine), _LIMITS) for engine in engines]))
    rows += _figure_rows(engines, _cost_figures)
    rows.append(_heading(OF_SERVING, [_kept(engine, _serving_figures(engine)) for engine in engines]))
    rows += _figure_rows(engines, _serving_figures)
    if any(_question(record, OF_INT8_CACHE) for record in records):
        verdicts = [_answer(engine, OF_INT8_CACHE, _LIMITS) if _cache_figures(engine) else "–" for engine in engines]
        rows.append(_heading(OF_INT8_CACHE, verdicts))
        rows += _figure_rows(engines, _cache_figures)
    said = (
        "Each row has the engine's figure, its limit if there is one, and whether the limit is kept. Figures of "
        "stored weights are the largest of all rows and matrices. Factor: the number by which the weights would have "
        "to be multiplied to come closest to the checkpoint's, less that of a sound engine. Offset: the mean error, "
        "in steps of the grid. Error: a part of the norm of a row or a matrix. Excess: how much larger the error of a "
        "row is than a sound engine's. The error of logits, and the differences in serving, are parts of the largest "
        "logit. Near ties are tokens for which the reference's two best logits are so close that another choice of "
        "the engine says little."
    )
    return f"<p>{said}</p>{_table(engines, rows)}{''.join(map(_failures, engines))}"


def cost_tables(engines: Sequence[ReportedEngine]) -> str:
    """For each engine a table of the costs of its parts, in thousandths of a nat, coloured by one scale for all."""
    means = [part["mean_kl"] for engine in engines for part in cost_parts(engine)]
    largest = max(means, default=0.0)
    tables = "".join(f"<div>{_cost_table(engine, largest)}</div>" for engine in engines)
    return f'<div class="costs">{tables}</div>'


def cost_parts(engine: ReportedEngine) -> Sequence[Json]:
    """The costs of an engine's parts; none if they were not measured."""
    parts: Sequence[Json] = ((engine.record or {}).get("cost") or {}).get("parts", ())
    return parts


# What was found, what is allowed in words, and whether it is kept; None for a figure that has no limit.
_Figure = tuple[str, str, bool | None]


def _cost_figures(engine: ReportedEngine) -> dict[str, _Figure]:
    record, limits = engine.record or {}, engine.limits
    if "mean_kl" not in record:
        return {}
    increase, routing = record.get("perplexity_increase", math.nan), record.get("routing_agreement")
    few, failures = record.get("num_tokens", 0) < limits.judged_tokens, tuple(record.get("failures", ()))

    def kept(within: bool, words: str) -> bool | None:
        """Whether a figure keeps its limit; None for one that is past it over too few tokens to judge. `words` begin
        the sentence on its failure."""
        return within if within or not few else None if not any(text.startswith(words) for text in failures) else False

    found: dict[str, _Figure] = {}
    for name, key, words in (
        ("mean KL, nats", "mean_kl", "mean KL "),
        ("mean KL, nats, decoded", "mean_decoded_kl", "mean KL of decoded"),
    ):
        value = record.get(key, math.nan)
        found[name] = (number(value), f"≤ {number(limits.mean_kl)}", kept(value <= limits.mean_kl, words))
    found["KL, nats: 99 % are below"] = (number(record.get("p99_kl")), "", None)
    found["KL, nats: the largest"] = (number(record.get("max_kl")), "", None)
    top1 = record.get("top1_agreement", math.nan)
    found["same most likely token"] = (
        percent(top1), f"≥ {percent(limits.top1_agreement)}", kept(top1 >= limits.top1_agreement, "top-1 agreement")
    )  # fmt: skip
    found["the same without near ties"] = (percent(record.get("clear_top1_agreement")), "", None)
    found["perplexity (reference)"] = (
        f"{record.get('engine_perplexity', math.nan):,.1f} ({record.get('reference_perplexity', math.nan):,.1f})", "",
        None,
    )  # fmt: skip
    found["perplexity, increase"] = (
        change(increase), f"≤ {change(limits.perplexity_increase)}",
        kept(increase <= limits.perplexity_increase, "perplexity "),
    )  # fmt: skip
    if routing is not None:
        found["same experts chosen"] = (
            percent(routing), f"≥ {percent(limits.routing_agreement)}",
            kept(routing >= limits.routing_agreement, "routing agreement"),
        )  # fmt: skip
    if limits.max_logit_difference is not None:
        largest = max(record.get(key, math.nan) for key in ("max_logit_difference", "max_decoded_difference"))
        allowed = limits.max_logit_difference
        found["largest difference of a logit"] = (number(largest), f"≤ {number(allowed)}", largest <= allowed)
    return found


def _serving_figures(engine: ReportedEngine) -> dict[str, _Figure]:
    found: dict[str, _Figure] = {}
    for name, way in ((engine.record or {}).get("serving") or {}).items():
        limits = FLOAT32_LIMITS if way.get("exact") else engine.serving
        for kind in ("largest", "mean"):
            value, limit = way[kind], getattr(limits, kind, None)
            allowed = "" if limit is None else f"≤ {number(limit)}"
            found[f"in {name}: {kind} difference"] = (
                number(value), allowed, None if limit is None else value <= limit
            )  # fmt: skip
    return found


def _cache_figures(engine: ReportedEngine) -> dict[str, _Figure]:
    """Of keys and values in int8: the KL divergence from the same engine with floats. Activations that are rounded to 8
    bits make more of it, so it is judged with float32 activations where there is such a figure."""
    answer = _question(engine.record or {}, OF_INT8_CACHE)
    record = answer.get("int8_cache")
    if record is None:
        return {}
    found = {
        "mean KL from floats, nats": (number(record["kl"]), "", None),
        "same most likely token as with floats": (percent(record["top1"]), "", None),
    }
    name, value = "the KL with float32 activations", record.get("kl_float32_activations")
    if value is None:
        name, value = "mean KL from floats, nats", record["kl"]
    # One that is past its limit by less than its error fails no engine, and has no mark.
    kept = True if value <= record["allowed"] else None if answer.get("passed") else False
    return {**found, name: (number(value), f"≤ {number(record['allowed'])}", kept)}


def _figure_rows(
    engines: Sequence[ReportedEngine], figures: Callable[[ReportedEngine], dict[str, _Figure]]
) -> Iterator[str]:
    found = [figures(engine) for engine in engines]
    for name in dict.fromkeys(name for one in found for name in one):
        yield _row(name, [_cell(one[name]) if name in one else "–" for one in found])


def _cell(figure: _Figure) -> str:
    found, allowed, kept = figure
    limit = f' <span class="limit">{escaped(allowed)}{_mark(kept)}</span>' if allowed else ""
    return f"{escaped(found)}{limit}"


def _mark(kept: bool | None) -> str:
    if kept is None:
        return ""
    return ' <span class="ok">✓</span>' if kept else ' <span class="no">✗</span>'


def _question(record: Json, question: str) -> Json:
    found: Json = next((one for one in record.get("questions", ()) if one.get("question") == question), {})
    return found


def _answer(engine: ReportedEngine, question: str, words: tuple[str, str] = _YES_NO) -> str:
    """The first of `words` if a question was passed, the second if not, or why it was not asked."""
    found = _question(engine.record or {}, question)
    if "unasked" in found:
        return f"not asked: {escaped(str(found['unasked']))}"
    return _said(found.get("passed"), engine, words)


def _kept(engine: ReportedEngine, figures: Mapping[str, _Figure], words: tuple[str, str] = _YES_NO) -> str:
    """The first of `words` if all limits of a question are kept, else the second."""
    judged = [kept for _, _, kept in figures.values() if kept is not None]
    return _said(all(judged) if judged else None, engine, words)


def _said(passed: bool | None, engine: ReportedEngine, words: tuple[str, str] = _YES_NO) -> str:
    if passed is None:
        return "not verified" if engine.record is None else "not asked: nothing was measured"
    return f'<span class="ok">{words[0]} ✓</span>' if passed else f'<span class="no">{words[1]} ✗</span>'


def _weights_cell(answer: Json, recipe: str, figure: str) -> str:
    """A figure of a recipe with its limit. A band of few values may exceed it within its scatter, so a figure above the
    limit is marked only where the question failed."""
    value = answer.get("largest", {}).get(recipe, {}).get(figure)
    if value is None:
        return "–"
    limit = answer.get("limits", {}).get(recipe, {}).get(figure)
    if limit is None:
        return _cell((number(value), "", None))
    kept = True if value <= limit else None if answer.get("passed") else False
    return _cell((number(value), f"≤ {number(limit)}", kept))


def _graph_cell(answer: Json) -> str:
    if "logits" not in answer:
        return "–"
    return _cell((number(answer["logits"]), f"≤ {number(answer['allowed'])}", answer["logits"] <= answer["allowed"]))


def _router_cell(answer: Json) -> str:
    if not answer.get("routers"):
        return "–"
    largest = max(answer["routers"].values())
    return _cell((number(largest), f"≤ {number(answer['allowed'])}", largest <= answer["allowed"]))


def _failures(engine: ReportedEngine) -> str:
    if not engine.failures:
        return ""
    items = "".join(f"<li>{escaped(failure)}</li>" for failure in engine.failures)
    return f'<p class="no"><b>{escaped(engine.name)} failed:</b></p><ul class="failures">{items}</ul>'


def _verdict(engine: ReportedEngine) -> str:
    kind = {"passed": "ok", "FAILED": "no"}.get(engine.verdict, "")
    return f'<span class="{kind}">{escaped(engine.verdict)}</span>'


def _cost_table(engine: ReportedEngine, largest: float) -> str:
    """Layers by roles and experts; embedding, head and the whole before them."""
    title = f"<h3>{escaped(engine.name)}</h3>"
    cost = (engine.record or {}).get("cost")
    if not cost or "unasked" in cost:
        reason = cost["unasked"] if cost else engine.note or "it was not measured"
        return f"{title}<p>No figures: {escaped(str(reason))}.</p>"
    parts = cost["parts"]
    lines = [("all parts together", cost["whole"])] if cost.get("whole") else []
    lines += [(part["role"], part) for part in parts if "layer" not in part]
    ends = "".join(
        f'<tr><th scope="row">{escaped(name)}</th>{_heat(part, largest, part is not cost.get("whole"))}'
        f"<td>± {number(part['standard_error'] * 1e3)}</td></tr>"
        for name, part in lines
    )
    columns = list(dict.fromkeys((part["role"], part.get("expert")) for part in parts if "layer" in part))
    columns.sort(key=lambda column: (column[1] is not None, column[1] or 0))
    by_place = {(part["layer"], part["role"], part.get("expert")): part for part in parts if "layer" in part}
    single = [column for column in columns if column[1] is not None]
    rows = ' rowspan="2"' if single else ""
    head = f"<tr><td{rows}></td>"
    head += "".join(f"<th{rows}>{escaped(_role(role))}</th>" for role, expert in columns if expert is None)
    if single:
        numbers = "".join(f"<th>{expert}</th>" for _, expert in single)
        head += f'<th class="over" colspan="{len(single)}">single experts</th></tr><tr>{numbers}'
    body = "".join(
        f'<tr><th scope="row">layer {layer}</th>'
        + "".join(_heat(by_place.get((layer, *column)), largest) for column in columns)
        + "</tr>"
        for layer in sorted({layer for layer, _, _ in by_place})
    )
    said = f"{cost['tokens']} tokens in {cost['windows']} windows; thousandths of a nat, ± standard error."
    return (
        f'{title}<p>{said}</p><div class="wide"><table class="heat ends"><tbody>{ends}</tbody></table>'
        f'<table class="heat"><thead>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _role(role: str) -> str:
    return {"expert": "all experts", "ffn": "MLP"}.get(role, role)


def _heat(part: Json | None, largest: float, coloured: bool = True) -> str:
    """A cell with a cost in thousandths of a nat, the darker the larger, by its logarithm; in italics if few positions
    carry it."""
    if part is None:
        return "<td>–</td>"
    value = part["mean_kl"]
    shade = 0.0
    if coloured and value > 0 and largest > 0:
        shade = max(0.0, 1 + math.log10(min(value / largest, 1.0)) / COLOURED_DECADES)
    kind = ' class="few"' if part["standard_error"] > 0.5 * value else ""
    said = f"± {number(part['standard_error'] * 1e3)}, the largest of a token {number(part['max_kl'] * 1e3)}"
    return f'<td style="--a:{0.7 * shade:.2f}" title="{said}"{kind}>{number(value * 1e3)}</td>'


def _table(engines: Sequence[ReportedEngine], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escaped(engine.name)}</th>' for engine in engines)
    return (
        f'<div class="wide"><table><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _row(name: str, cells: Sequence[str]) -> str:
    return f'<tr><th scope="row">{escaped(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _heading(name: str, cells: Sequence[str]) -> str:
    return f'<tr class="question"><th scope="row">{escaped(name)}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>'
