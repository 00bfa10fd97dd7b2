"""What a load came to: rates, latencies, errors and fairness, as JSON values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from clients.bench.load import Load
from clients.bench.objective import Objective, goodput
from clients.bench.records import Record, Run

# Share of the window. A server that answers one request at a time may send the tokens of several answers in one burst,
# which looks for a moment as if they ran at the same time.
LEAST_FULL = 0.05


class Described(Protocol):
    """What is sent, as the report repeats it."""

    def describe(self) -> dict[str, Any]:
        """What is sent, as JSON values."""


def summarise(run: Run, load: Load, works: Described, cores: int, objective: Objective | None = None) -> dict[str, Any]:
    """The figures of one run on a machine of `cores` cores. Times are in seconds. Tokens that arrived after the
    window do not count in rates. With an objective there are figures of goodput."""
    records, window = run.records, run.window_s
    tokens = sum(count for record in records for at, count in record.arrivals if at <= window)
    begun = [record for record in records if record.arrivals and record.arrivals[0][0] <= window]
    ended = [record for record in records if record.is_answered and (record.end_s or 0.0) <= window]
    found: dict[str, Any] = {
        "load": {**describe(load), **works.describe()},
        "window_s": window,
        "ended_early": run.ended,
        "requests": {
            "sent": len(records),
            "answered": sum(record.is_answered for record in records),
            "ended_early": sum(record.ended_early for record in records),
            "cut_at_the_end": sum(record.cut for record in records),
            "failed": sum(record.error is not None for record in records),
            "without_a_token": sum(not record.arrivals for record in records),
        },
        "output_tokens": tokens,
        "input_tokens": sum(record.num_input_tokens or 0 for record in begun),
        "output_tokens_per_s": _ratio(tokens, window) or 0.0,
        "total_tokens_per_s": _ratio(tokens + sum(record.num_input_tokens or 0 for record in begun), window) or 0.0,
        "requests_per_s": _ratio(len(ended), window) or 0.0,
        "first_token_s": spread(_known(record.first_token_s for record in records)),
        "between_tokens_s": spread(gaps_per_token(records)),
        "between_tokens_of_an_answer_s": spread(_known(record.between_tokens_s for record in records)),
        "longest_pause_s": max((gap for record in records for gap, _ in record.gaps_s()), default=None),
        "answer_s": spread(_known(record.answer_s for record in records)),
        "tokens_per_message": _ratio(
            sum(record.num_tokens for record in records), sum(len(record.arrivals) for record in records)
        ),
        "errors": dict(Counter(f"{record.error} {record.status or ''}".strip() for record in records if record.error)),
        "fairness": fairness(records, load, window),
        "counting": run.counting,
        "miscounted": sum(_is_miscounted(record) for record in records),
        "generator": {
            "cores": _ratio(run.cpu_s, window) or 0.0,
            "share_of_machine": _ratio(run.cpu_s, window * cores) or 0.0,
            "late_s": spread(record.sent_s - record.due_s for record in records) if load.is_open else None,
        },
        "goodput": goodput(records, objective, window) if objective else None,
    }
    if load.streams is not None:
        found["all_streams_running"] = full_load(records, load.streams, window)
    return found


def describe(load: Load) -> dict[str, Any]:
    """The load as JSON values. The times of a trace are in the records."""
    left_out = ("schedule",)
    values = {name: value for name, value in vars(load).items() if value is not None and name not in left_out}
    return {"kind": load.kind, **values}


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of sorted values lies, interpolated linearly between the two nearest ranks
    (definition 7 of Hyndman and Fan, Sample Quantiles in Statistical Packages, 1996; numpy's default)."""
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Percentiles, maximum and number of values; None if there are no values."""
    ordered = sorted(values)
    names = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        **{name: percentile(ordered, share) if ordered else None for name, share in names.items()},
        "n": len(ordered),
    }


def gaps_per_token(records: Iterable[Record]) -> list[float]:
    """Seconds between two tokens of an answer, one for each token after the first message with tokens. The time before
    a message of several tokens is shared among its tokens."""
    return [gap / tokens for record in records for gap, tokens in record.gaps_s() for _ in range(tokens)]


def fairness(records: Sequence[Record], load: Load, window_s: float) -> dict[str, Any]:
    """Jain's index, (sum x)^2 / (n sum x^2): 1 if all got as much, 1/n if one got all (Jain, Chiu and Hawe, A
    Quantitative Measure of Fairness, DEC TR-301, 1984). x is the number of tokens of a stream in the window; in an open
    loop the tokens a second of an answer, from when its request was due to its last token."""
    if load.streams is not None:
        shares = [0.0] * load.streams
        for record in records:
            shares[record.stream] += sum(tokens for at, tokens in record.arrivals if at <= window_s)
        return {"jain": jain(shares), "over": "tokens of each stream"}
    answered = [record for record in records if record.is_answered and record.arrivals]
    rates = [_ratio(record.num_tokens, record.arrivals[-1][0] - record.due_s) or 0.0 for record in answered]
    return {"jain": jain(rates), "over": "tokens a second of each answer"}


def jain(shares: Sequence[float]) -> float | None:
    """Jain's index; None if nobody got anything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else None


def full_load(records: Sequence[Record], streams: int, window_s: float) -> dict[str, Any]:
    """The seconds in which every stream was between an answer's first and last token, and the tokens a second that
    arrived in them; None if they are less than LEAST_FULL of the window. Prefill of further prompts and the end of a
    load, when some streams have nothing left to do, are left out by this."""
    edges = sorted(
        edge
        for record in records
        if len(record.arrivals) > 1
        for edge in ((record.arrivals[0][0], 1), (record.arrivals[-1][0], -1))
    )
    spans, running, since = [], 0, 0.0
    for at, change in edges:
        if running == streams and change < 0:
            spans.append((since, at))
        running += change
        if running == streams and change > 0:
            since = at
    seconds = sum(end - begin for begin, end in spans)
    times = [(at, tokens) for record in records for at, tokens in record.arrivals]
    tokens = sum(count for begin, end in spans for at, count in times if begin < at <= end)
    return {"seconds": seconds, "tokens_per_s": tokens / seconds if seconds > LEAST_FULL * window_s else None}


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _is_miscounted(record: Record) -> bool:
    """Whether the server says that a whole answer has another number of tokens than arrived."""
    return record.is_answered and record.num_output_tokens not in (None, record.num_tokens)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
