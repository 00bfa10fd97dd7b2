"""How far the plan of capacity is off: measure one server at six rates, predict each inner rate from the others.

    moeship serve REPOSITORY --json > server.json &
    python ci/capacity_check.py --url 127.0.0.1:8001 --tokenizer ENGINE --output FOLDER [--rounds 3] [--duration 60]

First a closed loop of --streams streams finds how many answers a second the server can give. Rates are parts of that,
or those of --rates. A round is one `moeship bench` of all rates in an order of its own, so that what changes on the
machine meets each rate at another time. Every request has --prompt-tokens and --max-tokens tokens. The files stay in
FOLDER for `moeship plan --curves`; rounds that FOLDER has are not measured again.

It prints a line for each rate and latency: measured, predicted from the other rates, the difference, and how far apart
chance alone puts the two (95 %). Exit status 0: every prediction for which chance is at most 15 % is within 15 %; 1:
one is not, chance is larger for all of them, or a load failed; 2 wrong input. Use a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from export.command import run_command  # noqa: E402 - found through the path above
from export.errors import ConfigError, MoeshipError  # noqa: E402

if TYPE_CHECKING:
    from clients.bench.capacity import Checked

PARTS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.85)  # of what the server can
BOUND = 0.15


class LoadFailed(MoeshipError):  # noqa: N818 - it is an event
    """A load test did not end well."""

    exit_status = 1


def bench(options: argparse.Namespace, *more: str) -> None:
    """Run `moeship bench` with the requests of the options. Raises LoadFailed."""
    words = [sys.executable, "-m", "cli.main", "bench", "--url", options.url, "--ignore-end", "--json"]
    words += ["--prompt-tokens", options.prompt_tokens, "--max-tokens", options.max_tokens]
    words += ["--tokenizer", str(options.tokenizer.resolve())] if options.tokenizer else []
    done = subprocess.run([*words, *more], cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise LoadFailed(f"measuring {options.url}: moeship bench {' '.join(more)} ended with {done.returncode}")


def highest_rate(options: argparse.Namespace) -> float:
    """The answers a second of a closed loop."""
    from clients.bench.kept import read_test

    path = options.output / "closed.jsonl"
    if not path.exists():
        bench(options, "--streams", str(options.streams), "--duration", f"{options.duration:g}", "--output", str(path))
    return float(read_test(path).levels[0].report["requests_per_s"])


def measure(options: argparse.Namespace) -> list[Path]:
    """Measure the rounds that are not there; returns their files."""
    path = options.output / "rates.json"
    if not path.exists():
        rates = options.rates or [float(f"{part * highest_rate(options):.3g}") for part in PARTS]
        path.write_text(json.dumps(rates))
    rates = json.loads(path.read_text())
    files = []
    for turn in range(options.rounds):
        files.append(options.output / f"round-{turn + 1}.jsonl")
        if files[-1].exists():
            continue
        print(f"round {turn + 1} of {options.rounds}: {', '.join(f'{rate:g}' for rate in rates)} requests/s",
              file=sys.stderr)  # fmt: skip
        order = random.Random(turn).sample(rates, len(rates))
        bench(options, "--rate", ",".join(f"{rate:g}" for rate in order), "--duration", f"{options.duration:g}",
              "--seed", str(turn + 1), "--output", str(files[-1]))  # fmt: skip
    return files


def lines(checked: Sequence[Checked]) -> list[str]:
    """A line for each rate and latency."""
    found = []
    for one in checked:
        for name, predicted in one.predicted.items():
            measured, chance, error = one.point.latencies[name], one.chance[name], one.error(name)
            verdict = ("met" if abs(error) <= BOUND else "MISSED") if chance <= BOUND else "too uncertain to say"
            found.append(
                f"{one.point.rate:6.3g}/s  {name:16}  measured {1e3 * measured:8.1f} ms  predicted "
                f"{1e3 * predicted:8.1f} ms  {error:+5.0%}  chance ±{chance:.0%}  {verdict}"
            )
    return found


def counts(checked: Sequence[Checked]) -> tuple[int, int, int]:
    """Predictions that are certain, those of them within the bound, and all."""
    every = [(abs(one.error(name)), one.chance[name]) for one in checked for name in one.predicted]
    certain = [error for error, chance in every if chance <= BOUND]
    return len(certain), sum(error <= BOUND for error in certain), len(every)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="127.0.0.1:8001", help="HOST:PORT of gRPC (default: %(default)s)")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="for the files of the load tests")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of all rates (default: %(default)s)")
    parser.add_argument("--duration", type=float, default=60.0, metavar="SECONDS", help="of a rate in a round (60)")
    parser.add_argument("--rates", type=float, nargs="+", metavar="R", help="requests a second, in place of parts")
    parser.add_argument("--streams", type=int, default=8, metavar="N", help="of the closed loop (default: %(default)s)")
    parser.add_argument("--prompt-tokens", default="64", metavar="LENGTHS")
    parser.add_argument("--max-tokens", default="32", metavar="LENGTHS")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="as of moeship bench")
    parser.add_argument("--percentile", type=float, default=90.0, metavar="P", help="(default: %(default)g)")
    options = parser.parse_args()
    options.output = options.output.resolve()

    def run() -> int:
        from clients.bench.capacity import check, usable_points
        from clients.bench.kept import read_test
        from clients.bench.points import points_of

        if options.rounds < 1 or not 0 < options.percentile < 100:
            raise ConfigError("measuring a plan of capacity: expected 1 round or more, and a percentile of 0 to 100")
        options.output.mkdir(parents=True, exist_ok=True)
        tests = [read_test(path) for path in measure(options)]
        points = points_of(tests, options.percentile / 100)
        for point in points:
            print(f"{point.rate:6.3g}/s  {point.num_requests} requests in {point.rounds} rounds"
                  f"{'' if point.keeps_up else ', the server falls behind'}")  # fmt: skip
        checked = check(usable_points(points))
        print("\n".join(lines(checked)))
        certain, met, every = counts(checked)
        print(f"{met} of {certain} certain predictions are within {BOUND:.0%}; {every - certain} are too uncertain")
        return int(met < certain or not certain)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
