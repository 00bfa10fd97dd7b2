"""The figures of a load test as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from export.rows import Rows

if TYPE_CHECKING:
    from clients.bench.compare import Compared, Difference
    from clients.bench.kept import Level, LoadTest
    from clients.bench.records import Record

CHANCE = "Intervals cover the chance within the two tests, not what differs from run to run."
BUSY_CORES = 0.7  # above this share of a core the generator itself may limit what it measures


_TIMES = (("first_token_s", "first token, s", 1.0), ("between_tokens_s", "between tokens, ms", 1e3),
          ("answer_s", "answer, s", 1.0))  # fmt: skip
_SHARES = ("p50", "p90", "p99")
_LEAST = 6  # columns of a time in the terminal, so that three are as wide as the name above them


def heads(levels: Sequence[Level]) -> tuple[str, ...]:
    """The names of the columns of `cells`."""
    kinds = {"closed loop": "streams", "open loop, Poisson arrivals": "rate"}
    has_goodput = any(level.report["goodput"] for level in levels)
    return (
        kinds.get(levels[0].report["load"]["kind"], "trace"), "tokens/s", "requests/s",
        *(("goodput/s", "met, %") * has_goodput),
        *(f"{name}: {share}" for _, name, _ in _TIMES for share in _SHARES),
        "longest pause, s", "fairness", "failed",
    )  # fmt: skip


def cells(level: Level, levels: Sequence[Level]) -> tuple[str, ...]:
    """The row of one load."""
    report, goodput = level.report, level.report["goodput"] or {}
    has_goodput = any(one.report["goodput"] for one in levels)
    return (
        level.name,
        number_text(report["output_tokens_per_s"]),
        number_text(report["requests_per_s"]),
        *((number_text(goodput.get("requests_per_s")), number_text(goodput.get("share_met"), 100.0)) * has_goodput),
        *(number_text(report[name][share], unit) for name, _, unit in _TIMES for share in _SHARES),
        number_text(report["longest_pause_s"]),
        number_text(report["fairness"]["jain"]),
        f"{report['requests']['failed']} of {report['requests']['sent']}",
    )


def table(levels: Sequence[Level]) -> str:
    """The rates of each load in one row and below, as a terminal has 100 columns or less, its times in another one."""
    rows = [heads(levels), *(cells(level, levels) for level in levels)]
    begin = next(place for place, name in enumerate(rows[0]) if name.startswith(_TIMES[0][1]))
    end = begin + len(_TIMES) * len(_SHARES)
    rates = [(*row[:begin], *row[end:]) for row in rows]
    times = [(row[0], *(f"{cell:>{_LEAST}}" for cell in row[begin:end])) for row in rows[1:]]
    widths = [max(map(len, column)) for column in zip(*times, strict=True)][1:]
    kinds = [rows[0][0]]
    for place, (_, name, _) in enumerate(_TIMES):
        own = widths[place * len(_SHARES) : (place + 1) * len(_SHARES)]
        kinds.append(f"{name:>{sum(own) + 2 * (len(own) - 1)}}")
    shares = (" " * len(rows[0][0]), *_SHARES * len(_TIMES))
    first = max(len(row[0]) for row in rows)
    head = "  ".join((f"{kinds[0]:>{first}}", *kinds[1:]))
    return "\n".join((_aligned(rates), "", head, _aligned([shares, *times])))


def comparison(found: Sequence[Compared]) -> str:
    """A row a figure of each load that two tests have."""
    rows: list[tuple[str, ...]] = [("load", "figure", "A", "B", "B/A", "interval", "B is")]
    for one in found:
        rows += [(one.name, *compared_cells(difference)) for difference in one.differences]
        rows += [(one.name, f"unlike: {said}", *[""] * 5) for said in one.unlike]
    return _aligned(rows, left=(1, 6))


def compared_cells(difference: Difference) -> tuple[str, ...]:
    """The figure, its value in A and B, B over A, the interval, and what it says of B."""
    low, high = number_text(difference.low), number_text(difference.high)
    interval = "-" if difference.low is None else f"{low} to {high}"
    numbers = (number_text(value) for value in (difference.a, difference.b, difference.ratio))
    return difference.figure, *numbers, interval, difference.verdict


def unpaired_text(a: LoadTest, b: LoadTest) -> str:
    """Which loads only one of two tests has; "" where both have the same."""
    from clients.bench.compare import unpaired

    alone = zip(("A", "B"), unpaired(a, b), strict=True)
    return "; ".join(f"only {side} has {', '.join(names)}, which is not compared" for side, names in alone if names)


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Rows of cells as lines, flush right but for the columns of `left`."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if column in left else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def notes(levels: Sequence[Level]) -> Rows:
    """How the figures were come by, and what puts them in doubt."""
    rows = [("tokens", f"counted by {levels[0].report['counting']}")]
    for level in levels:
        name, report, records = level.name, level.report, level.records
        if report["ended_early"]:
            until = f"the figures are of the {report['window_s']:.1f} s until then"
            rows.append((f"load {name}", f"ended early: {report['ended_early']}; {until}"))
        if report["goodput"]:
            rows.append((f"load {name}", _goodput(report["goodput"])))
        if level.metrics:
            rows += [(f"load {name}", said) for said in _metrics(level.metrics)]
        generator, requests = report["generator"], report["requests"]
        busy = f"{generator['cores']:.2f} cores"
        if generator["cores"] > BUSY_CORES:
            busy += "; the generator itself may limit the figures"
        rows.append((f"load {name}", f"{_sizes(records)}; the generator took {busy}"))
        if requests["without_a_token"] > requests["failed"]:
            count = requests["without_a_token"] - requests["failed"]
            rows.append(
                (f"load {name}", f"{_requests(count)} got no token before the end, and counted in no percentile")
            )
        if report["miscounted"]:
            rows.append((f"load {name}", f"{report['miscounted']} answers have another number of tokens by the server"))
        if (late := generator["late_s"]) and (late["p99"] or 0) > 0.05:
            rows.append((f"load {name}", f"requests were sent late: {late['p99']:.3f} s (p99)"))
        if 0 < report["first_token_s"]["n"] < 100:
            rows.append((f"load {name}", f"p99 of {report['first_token_s']['n']} requests is near their maximum"))
        rows += [(f"{kind}: {number}", _example(records, kind)) for kind, number in report["errors"].items()]
    return rows


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def _goodput(found: Mapping[str, Any]) -> str:
    unknown = f", {found['unknown']} ended before that was known" if found["unknown"] else ""
    return f"objective {found['objective']} (ms): {found['met']} met, {found['missed']} missed{unknown}"


def _metrics(found: Mapping[str, Any]) -> list[str]:
    """What the server said of itself, a line an engine."""
    said = []
    for engine in found["engines"]:
        samples = [sample for sample in found["samples"] if sample["model"] == engine["model"]]
        most = {name: max((s[name] for s in samples if name in s), default=None) for name in ("streams", "waiting")}
        first = engine["first_token_s"] or {}
        said.append(
            f"the server's metrics, {engine['model']}: at most {number_text(most['streams'])} streams and "
            f"{number_text(most['waiting'])} waiting; first token p50 {number_text(first.get('p50'))} s, p99 "
            f"{number_text(first.get('p99'))} s"
        )
    if found["readings_failed"]:
        said.append(f"{found['readings_failed']} readings of the server's metrics failed: {found['fault']}")
    return said


def _sizes(records: Sequence[Record]) -> str:
    """The mean tokens of prompts, where the server said how many there are, and of answers."""
    prompts = [record.num_input_tokens for record in records if record.num_input_tokens is not None]
    answers = [record.num_tokens for record in records if record.arrivals]
    means = (f"{sum(counts) / len(counts):.0f}" if counts else "?" for counts in (prompts, answers))
    return "{} tokens a prompt, {} an answer".format(*means)


def _example(records: Sequence[Record], kind: str) -> str:
    """The message of the first request that failed so."""
    return next(r.message or "" for r in records if r.error and f"{r.error} {r.status or ''}".strip() == kind)


def number_text(value: float | None, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.3g}" if abs(value * scale) < 1000 else f"{value * scale:.0f}"
