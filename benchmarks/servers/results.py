"""What the turns came to: medians over rounds, and ratios of two contenders within a round."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from export.errors import ConfigError

FORMAT_VERSION = 1
BUSY_CORES = 0.1  # if other programs use more cores than this, the figures suffer
# One round: contender -> scenario -> the answer; the scenario `load` has one for each number of streams.
Round = Mapping[str, Mapping[str, Any]]
Value = Callable[[Mapping[str, Any]], float | None]


def load_name(streams: int) -> str:
    """The name of the scenario `load` with a number of streams."""
    return f"load {streams}"


def tokens_per_s(answer: Mapping[str, Any]) -> float | None:
    """All tokens of a load, divided by the time from the first request to the last token."""
    return answer["output_tokens_per_s"]


def decode_per_s(answer: Mapping[str, Any]) -> float | None:
    """Tokens a second while every stream was between its first and its last token."""
    return answer["all_streams_running"]["tokens_per_s"]


def first_token(answer: Mapping[str, Any]) -> float | None:
    return answer["first_token_s"]["p50"]


def resident(answer: Mapping[str, Any]) -> float | None:
    return answer["memory"]["resident_bytes"]


def median(values: Sequence[float | None]) -> float | None:
    """The median of the values that are there; None if there are none."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def assemble(about: Mapping[str, Any], rounds: Sequence[Round], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """The whole result. `before` is an earlier result of the same machine, model and loads."""
    names = list(dict.fromkeys(name for one in rounds for name in one))
    result = {
        "benchmark": "serving",
        "format_version": FORMAT_VERSION,
        **json.loads(json.dumps(about)),  # as an earlier result is read
        "medians": {name: _medians([one[name] for one in rounds if name in one]) for name in names},
        "answers_to_bars": bars(rounds, names),
        "rounds": list(rounds),
    }
    if before is not None:
        result["over_before"] = over_before(result, before)
    return result


def _medians(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for scenario in dict.fromkeys(name for turn in turns for name in turn):
        answers = [turn[scenario] for turn in turns if scenario in turn]
        if scenario.startswith("load"):
            found[scenario] = {
                "tokens_per_s": median([tokens_per_s(answer) for answer in answers]),
                "decode_tokens_per_s": median([decode_per_s(answer) for answer in answers]),
                "first_token_s": {share: _share(answers, "first_token_s", share) for share in ("p50", "p99")},
                "between_tokens_s": {share: _share(answers, "between_tokens_s", share) for share in ("p50", "p99")},
                "longest_pause_s": median([answer["longest_pause_s"] for answer in answers]),
                "fairness": median([answer["fairness"]["jain"] for answer in answers]),
                "generator_cores": median([answer["generator"]["cores"] for answer in answers]),
            }
        elif scenario == "first":
            found[scenario] = {
                "first_token_s": median([time for answer in answers for time in answer["first_token_s"]])
            }
        else:
            found[scenario] = {
                name: median([answer[name] for answer in answers])
                for name in ("alone_s", "first_s", "longest_pause_s", "streams_running_when_it_arrived")
            } | {"step_s": median([step for answer in answers for step in answer["steps_s"]])}
        found[scenario]["others_cores"] = median([answer["others_cores"] for answer in answers])
        found[scenario]["resident_bytes"] = median([resident(answer) for answer in answers])
        found[scenario]["anonymous_bytes"] = median([answer["memory"]["anonymous_bytes"] for answer in answers])
    return found


def _share(answers: Sequence[Mapping[str, Any]], name: str, share: str) -> float | None:
    return median([answer[name][share] for answer in answers])


def bars(rounds: Sequence[Round], names: Sequence[str]) -> dict[str, Any]:
    """Our figures over others'; each is the median over rounds of a ratio or difference within a round."""
    levels = sorted({int(name.split()[1]) for one in rounds for turn in one.values() for name in turn if " " in name})
    found: dict[str, Any] = {}
    if "ours" in names:
        for streams in levels:
            if streams != 1 and 1 in levels:
                found[f"tokens/s at {streams} streams over 1"] = _ratio(
                    rounds, tokens_per_s, ("ours", load_name(streams)), ("ours", load_name(1))
                )
        for other in names:
            for streams in levels if other != "ours" else ():
                scenario = load_name(streams)
                found[f"tokens/s over {other} at {streams}"] = _ratio(
                    rounds, tokens_per_s, ("ours", scenario), (other, scenario)
                )
        added = [
            median(one["ours"]["first"]["first_token_s"]) - median(one["in-process"]["first"]["first_token_s"])  # type: ignore[operator]
            for one in rounds
            if "first" in one.get("ours", {}) and "first" in one.get("in-process", {})
        ]
        found["seconds that the server adds to the first token"] = median(added)
    for name in names:
        longs = [one[name]["long"] for one in rounds if "long" in one.get(name, {})]
        if longs:
            found[f"{name}: first token of a long prompt among streams over alone"] = median(
                [answer["first_s"] / answer["alone_s"] for answer in longs]
            )
            found[f"{name}: longest pause of streams meanwhile, s"] = median(
                [answer["longest_pause_s"] for answer in longs]
            )
    return found


def _ratio(rounds: Sequence[Round], value: Value, over: tuple[str, str], under: tuple[str, str]) -> float | None:
    ratios = []
    for one in rounds:
        try:
            upper, lower = value(one[over[0]][over[1]]), value(one[under[0]][under[1]])
        except KeyError:
            continue
        if upper is not None and lower:
            ratios.append(upper / lower)
    return median(ratios)


def over_before(result: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Our medians over those of an earlier result. Raises ConfigError if the two measured different things."""
    check_kind(before)
    for name in ("model", "load"):
        if result[name] != before[name]:
            raise ConfigError(
                f"comparing with an earlier result: found {name} {before[name]}, expected {result[name]}; measure both "
                "with the same options"
            )
    found = {}
    for scenario, figures in result["medians"].get("ours", {}).items():
        earlier = before["medians"].get("ours", {}).get(scenario)
        if earlier is None:
            continue
        pairs = {
            "tokens_per_s": (figures.get("tokens_per_s"), earlier.get("tokens_per_s")),
            "first_token_s": (_first(figures), _first(earlier)),
            "resident_bytes": (figures["resident_bytes"], earlier["resident_bytes"]),
        }
        found[scenario] = {name: upper / lower for name, (upper, lower) in pairs.items() if upper and lower}
    return found


def _first(figures: Mapping[str, Any]) -> float | None:
    found = figures.get("first_token_s")
    return found["p50"] if isinstance(found, dict) else found


def check_kind(result: Mapping[str, Any]) -> None:
    """Raise ConfigError if a JSON object is no result of this benchmark."""
    kind = (result.get("benchmark"), result.get("format_version"))
    if kind != ("serving", FORMAT_VERSION):
        raise ConfigError(
            f"reading a result: found benchmark {kind[0]!r} of format {kind[1]!r}, expected 'serving' of format "
            f"{FORMAT_VERSION}; name a result that this version wrote"
        )


def table(result: Mapping[str, Any]) -> str:
    """The figures as text."""
    heads = ("", "tokens/s", "decode", "first p50, s", "p99", "between p50, ms", "p99", "pause, s", "resident, GB")
    rows = [heads]
    for name, scenarios in result["medians"].items():
        for scenario, found in scenarios.items():
            if scenario.startswith("load"):
                values = (
                    found["tokens_per_s"], found["decode_tokens_per_s"], found["first_token_s"]["p50"],
                    found["first_token_s"]["p99"], _times(found["between_tokens_s"]["p50"], 1e3),
                    _times(found["between_tokens_s"]["p99"], 1e3), found["longest_pause_s"],
                    _times(found["resident_bytes"], 1e-9),
                )  # fmt: skip
                rows.append((f"{name}, {scenario.split()[1]} streams", *map(_text, values)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [f"{name}: {_text(value)}" for name, value in result["answers_to_bars"].items()]
    for scenario, ratios in result.get("over_before", {}).items():
        lines += [f"over before, {scenario}: {', '.join(f'{name} {_text(ratio)}' for name, ratio in ratios.items())}"]
    busy = [
        f"{name} {scenario}: {found['others_cores']:.2f}"
        for name, scenarios in result["medians"].items()
        for scenario, found in scenarios.items()
        if found["others_cores"] > BUSY_CORES
    ]
    if busy:
        lines.append(f"in doubt, as other programs kept cores busy: {', '.join(busy)}")
    lines += [f"not run: {name}: {reason}" for name, reason in result["not_run"].items()]
    return "\n".join(lines)


def _times(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
