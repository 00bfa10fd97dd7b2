"""Computes the result from the turns: medians, spreads, shares of the bandwidth, ratios; as JSON and as a table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from decode.entrants import Entrant
from decode.rounds import QUIET_CORES, RATES, Record
from decode.worker import Lengths, Turn

FORMAT_VERSION = 1
FIGURES = (*(field.name for field in dataclasses.fields(Turn)), "other_cores")
DECODES = {"decode_short": "short_context", "decode_long": "long_context"}


def assemble(
    about: Mapping[str, Any],
    lengths: Lengths,
    records: Sequence[Record],
    refused: Mapping[str, str],
    bandwidths: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """The result as JSON values. `about` describes the machine and the options; `refused` has the reason of each
    contender that could not run. The bandwidth of a round is the figure of the faster method; the bandwidth of the run
    is the median over rounds."""
    bandwidth = statistics.median(max(methods.values()) for methods in bandwidths)
    return {
        "benchmark": "cpu_decode",
        "format_version": FORMAT_VERSION,
        **about,
        "lengths": dataclasses.asdict(lengths),
        "bandwidth": {"bytes_per_second": bandwidth, "rounds": [dict(methods) for methods in bandwidths]},
        "contenders": {
            record.entrant.name: summarise(record, lengths, bandwidth) for record in records if record.turns
        },
        "not_run": {**refused, **{record.entrant.name: record.failure for record in records if record.failure}},
    }


def summarise(record: Record, lengths: Lengths, bandwidth: float) -> dict[str, Any]:
    """The result of one contender: every turn, median and spread of each figure, and its share of the bandwidth."""
    entrant = record.entrant
    figures = {name: [turn[name] for turn in record.turns] for name in FIGURES}
    median = {name: statistics.median(values) for name, values in figures.items()}
    read = {rate: bytes_per_token(entrant, getattr(lengths, context)) for rate, context in DECODES.items()}
    return {
        "weights": dataclasses.asdict(entrant.weights),
        "weight_bytes": entrant.weight_bytes,
        "notes": dict(entrant.notes),
        "runtime": record.facts,
        "settings": dict(record.settings or {}),
        "trials": record.trials,
        "median": median,
        "spread": {name: [min(values), max(values)] for name, values in figures.items()},
        "bytes_per_token": read,
        "bandwidth_bound": {rate: bandwidth / count for rate, count in read.items()},
        "bandwidth_share": {rate: median[rate] * count / bandwidth for rate, count in read.items()},
        "turns": record.turns,
    }


def bytes_per_token(entrant: Entrant, context: int) -> int:
    """Bytes that decoding one token reads after `context` tokens: active weights, and all earlier keys and values."""
    return entrant.read_per_token + context * entrant.cache_per_position


def ratios(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The ratios of our rates to those of each other contender."""
    contenders = result["contenders"]
    if "ours" not in contenders:
        return {}
    ours = contenders["ours"]["median"]
    return {
        name: {rate: ours[rate] / other["median"][rate] for rate in RATES}
        for name, other in contenders.items()
        if name != "ours"
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as a table of text."""
    lengths = result["lengths"]
    heads = (
        "", f"decode @{lengths['short_context']}", f"@{lengths['long_context']}", f"prefill {lengths['prefill']}",
        "GB/token", "of bandwidth", "weights", "active", "first token", "peak GB", "steady GB",
    )  # fmt: skip
    rows = [heads]
    for name, found in result["contenders"].items():
        median, weights = found["median"], found["weights"]
        rows.append(
            (
                name + (" (scaled)" if "scaled" in found["notes"] else ""),
                f"{median['decode_short']:.2f}",
                f"{median['decode_long']:.2f}",
                f"{median['prefill']:.1f}",
                f"{found['bytes_per_token']['decode_short'] / 1e9:.2f}",
                f"{found['bandwidth_share']['decode_short']:.0%}",
                f"{weights['total'] / 1e9:.2f} B",
                f"{weights['active'] / 1e9:.2f} B",
                f"{median['first_token_s']:.1f} s",
                f"{median['peak_bytes'] / 1e9:.2f}",
                f"{median['steady_bytes'] / 1e9:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [f"over {name}: {_times(found)}" for name, found in ratios(result).items()]
    lines += [f"{name} {found['notes']['scaled']}" for name, found in result["contenders"].items()
              if "scaled" in found["notes"]]  # fmt: skip
    lines += [f"{name} not run: {reason}" for name, reason in result["not_run"].items()]
    lines += [f"{name}: others kept {cores:.2f} cores busy in the worst turn, so its rates are not reliable"
              for name, found in result["contenders"].items()
              if (cores := found["spread"]["other_cores"][1]) > QUIET_CORES]  # fmt: skip
    lines.append(f"read bandwidth {result['bandwidth']['bytes_per_second'] / 1e9:.1f} GB/s; rates in tokens/s, medians")
    return "\n".join(lines)


def _times(found: Mapping[str, float]) -> str:
    return f"decode {found['decode_short']:.2f}x and {found['decode_long']:.2f}x, prefill {found['prefill']:.2f}x"
