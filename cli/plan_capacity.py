"""`moeship plan --target-rps`: how many servers a rate needs, from load tests of one server."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cli.rows import print_rows
from export.errors import ConfigError, names
from export.rows import Rows

if TYPE_CHECKING:
    from clients.bench.capacity import Plan
    from clients.bench.objective import Objective

DEFAULT_PERCENTILE = 90.0
_NAMES = {"first_token_s": "first token", "between_tokens_s": "between tokens", "answer_s": "whole answer"}


def add_capacity_arguments(parser: argparse.ArgumentParser) -> None:
    capacity = parser.add_argument_group("capacity", "how many servers a rate needs, in place of an engine's plan")
    capacity.add_argument("--target-rps", type=float, metavar="R", help="requests a second that arrive at random")
    capacity.add_argument(
        "--slo", metavar="BOUNDS", help="milliseconds that requests may take: 500 for the first token, or some of "
        "ttft:500,itl:50,e2e:8000 (first token, mean time between tokens, whole answer)",
    )  # fmt: skip
    capacity.add_argument(
        "--curves", type=Path, nargs="+", metavar="FILE",
        help="load tests of one server at several rates: files of `moeship bench --rate R,R,R --output FILE`",
    )  # fmt: skip
    capacity.add_argument(
        "--percentile", type=float, metavar="P",
        help=f"percent of the requests that must be within each bound (default: {DEFAULT_PERCENTILE:g})",
    )  # fmt: skip


def is_capacity(arguments: argparse.Namespace) -> bool:
    """Whether a plan of capacity is asked for."""
    return any(getattr(arguments, name) is not None for name in ("target_rps", "slo", "curves", "percentile"))


def plan_servers(arguments: argparse.Namespace) -> int:
    """Print the plan; returns 1 where no number of servers meets the objective. Raises ConfigError."""
    from clients.bench.capacity import as_json, plan_capacity
    from clients.bench.kept import read_test
    from clients.bench.objective import read_objective
    from clients.bench.points import points_of

    absent = [f"--{name.replace('_', '-')}" for name in ("target_rps", "slo", "curves") if not getattr(arguments, name)]
    if absent:
        raise ConfigError(f"planning capacity: found no {', '.join(absent)}; give --target-rps, --slo and --curves")
    if not 0 < arguments.target_rps < float("inf"):
        raise ConfigError(f"planning capacity: --target-rps is {arguments.target_rps}, expected a number above 0")
    percent = DEFAULT_PERCENTILE if arguments.percentile is None else arguments.percentile
    if not 0 < percent < 100:
        raise ConfigError(f"planning capacity: --percentile is {percent}, expected a number between 0 and 100")
    objective = read_objective(arguments.slo, "--slo")
    tests = [read_test(path) for path in arguments.curves]
    points = points_of(tests, percent / 100)
    if len(urls := sorted({url for test in tests for url in test.about.get("urls") or ()})) > 1:
        said = f"note: the load tests are of {len(urls)} addresses ({names(urls)}); the plan takes them for one server"
        print(said, file=sys.stderr)
    plan = plan_capacity(points, arguments.target_rps, objective, percent / 100)
    if arguments.json:
        print(json.dumps(as_json(plan), indent=2))
    else:
        for heading, rows in tables(plan, objective):
            print_rows(heading, rows)
    return int(plan.servers is None)


def tables(plan: Plan, objective: Objective) -> list[tuple[str, Rows]]:
    """The plan as rows of text."""
    percent = f"p{100 * plan.share:g}"
    wanted = f"{plan.target_rate:g} requests/s with {objective} (ms, {percent})"
    if plan.most_rate is None or plan.servers is None:
        lowest = plan.points[0]
        measured = ", ".join(f"{_NAMES[name]} {_ms(value)}" for name, value in lowest.latencies.items())
        found: list[tuple[str, str]] = [
            ("asked for", wanted),
            ("servers", f"no number is enough: at {lowest.rate:.3g}/s one server has {percent}: {measured}"),
        ]
    else:
        each = plan.target_rate / plan.servers
        end = "; it still holds there, so measure higher rates for fewer servers" if plan.is_measured_end else ""
        found = [
            ("asked for", wanted),
            ("one server", f"holds the objective up to {plan.most_rate:.3g} requests/s{end}"),
            ("servers", f"{plan.servers}, each {each:.3g} requests/s ({each / plan.most_rate:.0%} of that)"),
            *_interval(plan),
            *((f"{_NAMES[name]}, {percent}", _predicted(plan, name)) for name in plan.predicted),
            ("output", f"{plan.tokens_per_s * plan.servers:.4g} tokens/s of all servers"),
        ]
        if plan.servers > 1:
            one_less = plan.target_rate / (plan.servers - 1)
            said = "more than was measured" if plan.is_measured_end else "the objective is missed"
            found.append(("one server less", f"{one_less:.3g} requests/s each: {said}"))
    points = [
        (
            f"{point.rate:.3g}/s",
            f"{point.num_requests} requests{f' in {point.rounds} rounds' * (point.rounds > 1)}; {percent}: "
            + ", ".join(f"{_NAMES[name]} {_ms(value)}" for name, value in point.latencies.items())
            + ("" if point.keeps_up else "; the server falls behind"),
        )
        for point in plan.points
    ]
    checked = [
        (
            f"{one.point.rate:.3g}/s",
            ", ".join(
                f"{_NAMES[name]} {_ms(one.predicted[name])} "
                f"({one.error(name):+.0%}, chance {_chance(one.chance[name])})"
                for name in one.predicted
            ),
        )
        for one in plan.checked
    ] or [("none", "three rates at which the server keeps up are needed for a check")]
    return [
        ("capacity", found),
        ("measured, one server", points),
        (
            "check: each rate predicted from the others (how far that is from what was measured, and how far chance "
            "alone puts the two apart)",
            checked,
        ),
    ]


def _chance(part: float) -> str:
    return f"±{part:.0%}" if part <= 1 else "over ±100%"


def _interval(plan: Plan) -> Rows:
    """The interval of the number of servers, and what would narrow it."""
    from clients.bench.capacity import CERTAIN

    if plan.servers_within is None:
        return []
    low, high = plan.servers_within
    said = f"{low} to {high} servers" if high else f"{low} servers or more; perhaps no number is enough"
    rows = [("by chance", said if low != high else f"{low} servers, whatever chance did to the latencies (95 %)")]
    rows += [
        (
            "uncertain",
            f"{_NAMES[name]}: {plan.times_longer(name)} times as many requests at each rate give ±{CERTAIN:.0%}",
        )
        for name in plan.predicted
        if not plan.is_certain(name)
    ]
    return rows


def _predicted(plan: Plan, name: str) -> str:
    low, high = plan.predicted_within[name]
    return f"{_ms(plan.predicted[name])} ({_ms(low)} to {_ms(high)})"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < float("inf") else "failed"
