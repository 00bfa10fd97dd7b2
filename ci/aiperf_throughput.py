"""Throughput of one server by `moeship bench` and by aiperf, in turns: the ratio of the two, round by round.

    python -m venv aiperf && aiperf/bin/pip install aiperf==0.13.0
    moeship serve REPOSITORY --openai-port 8080 --chat-template TEMPLATE --json > server.json &
    python ci/aiperf_throughput.py --url http://127.0.0.1:8080 --model NAME --checkpoint CHECKPOINT \\
        --aiperf aiperf/bin/aiperf [--rounds 6] [--streams 4] [--requests 200] [--cores 1]

Both ask OpenAI's completions for streams: --streams at once, --requests in all, prompts of --prompt-tokens tokens by
the checkpoint's tokenizer, answers of exactly --max-tokens tokens, as many requests to warm up as there are streams. A
round is one load by each; which is first changes from round to round. --cores pins both generators to these cores:
start the server on the others (taskset), or the generators take its processor time, and aiperf, which is a dozen
processes, takes more of it. Each connects anew for each request (aiperf's --connection-reuse-strategy never), as
`moeship bench` does.

What is compared is counted alike: tokens of requests that ended, over the time from the first request's beginning to
the last one's end, warm-up left out. `moeship bench` counts the token ids that the gateway sends (return_token_ids).
aiperf is told to take the server's usage (--use-server-token-count); by its own count it re-tokenises the text, which
gives other numbers where text is cut within a character. "Streams under way" is the sum of all answers' times over the
length of the load: a generator that is late with its next request has less than --streams.

Exit status 0: the median ratio is within 5 %; 1: it is not, or a load failed; 2 wrong input.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from export.command import run_command  # noqa: E402 - found through the path above
from export.errors import ConfigError, MoeshipError  # noqa: E402

BOUND = 0.05
LONGEST_S = 1800.0  # of one load


class LoadFailed(MoeshipError):  # noqa: N818 - it is an event
    """A load did not end well, or had other requests than it should."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One load by one generator. `under_way` is the mean number of requests in flight."""

    tokens_per_s: float
    tokens: int
    requests: int
    seconds: float
    first_token_ms: float  # median
    answer_ms: float  # median
    under_way: float


def run_program(words: Sequence[str], cores: Sequence[int], folder: Path) -> None:
    """Run a generator on some cores. Raises LoadFailed."""
    pin = ["taskset", "--cpu-list", ",".join(map(str, cores))] if cores else []
    try:
        done = subprocess.run(
            [*pin, *words], cwd=folder, capture_output=True, text=True, timeout=LONGEST_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LoadFailed(f"running {words[0]}: it did not end within {LONGEST_S:g} s") from error
    if done.returncode:
        raise LoadFailed(f"running {' '.join(words)}: status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")


def by_moeship(options: argparse.Namespace, seed: int, folder: Path) -> Measured:
    """A load of `moeship bench`."""
    from clients.bench.kept import read_test

    path = folder / "bench.jsonl"
    run_program(
        [sys.executable, "-m", "cli.main", "bench", "--url", options.url, "--endpoint", "completions",
         "--model", options.model, "--streams", str(options.streams), "--requests", str(options.requests),
         "--warm-up", str(options.streams), "--prompt-tokens", str(options.prompt_tokens),
         "--max-tokens", str(options.max_tokens), "--ignore-end", "--tokenizer",
         str(options.checkpoint / "tokenizer.json"), "--body", '{"return_token_ids": true}', "--seed", str(seed),
         "--json", "--output", str(path)],
        options.cores, ROOT,
    )  # fmt: skip
    [level] = read_test(path).levels
    return of_bench(level.report, [(one.end_s or 0.0) - one.sent_s for one in level.records])


def of_bench(report: dict, answers_s: Sequence[float]) -> Measured:  # type: ignore[type-arg]
    """The figures of a load of `moeship bench`."""
    return Measured(
        tokens_per_s=report["output_tokens_per_s"],
        tokens=report["output_tokens"],
        requests=report["requests"]["answered"],
        seconds=report["window_s"],
        first_token_ms=1e3 * report["first_token_s"]["p50"],
        answer_ms=1e3 * report["answer_s"]["p50"],
        under_way=sum(answers_s) / report["window_s"],
    )


def by_aiperf(options: argparse.Namespace, seed: int, folder: Path) -> Measured:
    """A load of aiperf."""
    run_program(
        [str(options.aiperf), "profile", "--model", options.model, "--url", options.url,
         "--endpoint-type", "completions", "--streaming", "--concurrency", str(options.streams),
         "--request-count", str(options.requests), "--warmup-request-count", str(options.streams),
         "--synthetic-input-tokens-mean", str(options.prompt_tokens), "--synthetic-input-tokens-stddev", "0",
         "--output-tokens-mean", str(options.max_tokens), "--output-tokens-stddev", "0",
         "--extra-inputs", "ignore_eos:true", "--use-server-token-count", "--connection-reuse-strategy", "never",
         "--tokenizer", str(options.checkpoint), "--random-seed", str(seed), "--ui", "none",
         "--output-artifact-dir", str(folder / "aiperf")],
        options.cores, folder,
    )  # fmt: skip
    lines = (folder / "aiperf" / "profile_export.jsonl").read_text().splitlines()
    return of_aiperf([json.loads(line) for line in lines])


def of_aiperf(records: Sequence[dict]) -> Measured:  # type: ignore[type-arg]
    """The figures of a load of aiperf, from its records: one a request, warm-up included. Its own
    output_token_throughput is lower: it divides by more than the time from the first request to the last end, by
    0.07 s of 10."""
    found = [one for one in records if one["metadata"]["benchmark_phase"] == "profiling"]
    times = [(one["metadata"]["request_start_ns"], one["metadata"]["request_end_ns"]) for one in found]
    seconds = 1e-9 * (max(end for _, end in times) - min(begin for begin, _ in times))
    tokens = sum(one["metrics"]["usage_completion_tokens"]["value"] for one in found)
    answers_ms = [one["metrics"]["request_latency"]["value"] for one in found]
    return Measured(
        tokens_per_s=tokens / seconds,
        tokens=round(tokens),
        requests=len(found),
        seconds=seconds,
        first_token_ms=statistics.median(one["metrics"]["time_to_first_token"]["value"] for one in found),
        answer_ms=statistics.median(answers_ms),
        under_way=sum(answers_ms) / 1e3 / seconds,
    )


def check(measured: Measured, options: argparse.Namespace, name: str) -> Measured:
    """Raise LoadFailed where a load had other requests or tokens than it was told to."""
    expected = (options.requests, options.requests * options.max_tokens)
    if (found := (measured.requests, measured.tokens)) != expected:
        raise LoadFailed(f"a load of {name} had {found[0]} answers of {found[1]} tokens, expected {expected[0]} of "
                         f"{expected[1]}")  # fmt: skip
    return measured


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The quartiles of some values, of one value three times that."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="http://HOST:PORT of the gateway")
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="with the model's tokenizer")
    parser.add_argument("--aiperf", type=Path, default=Path("aiperf"), help="the program (default: that of the PATH)")
    parser.add_argument("--rounds", type=int, default=6, metavar="N")
    parser.add_argument("--streams", type=int, default=4, metavar="N")
    parser.add_argument("--requests", type=int, default=200, metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--cores", type=int, nargs="+", default=[], metavar="CORE", help="for the generators")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write every load as JSON")
    options = parser.parse_args()
    options.checkpoint = options.checkpoint.resolve()

    def run() -> int:
        program = shutil.which(str(options.aiperf))
        if options.rounds < 1:
            raise ConfigError(f"comparing with aiperf: --rounds is {options.rounds}, expected 1 or more")
        if program is None:
            raise ConfigError(f"comparing with aiperf: {options.aiperf} is no program; name it with --aiperf")
        options.aiperf = Path(program).resolve()
        generators = {"moeship": by_moeship, "aiperf": by_aiperf}
        rounds: list[dict[str, Measured]] = []
        for turn in range(options.rounds):
            order = list(generators) if turn % 2 == 0 else list(generators)[::-1]
            found = {}
            for name in order:
                with tempfile.TemporaryDirectory(prefix="moeship-aiperf-") as folder:
                    found[name] = check(generators[name](options, turn + 1, Path(folder)), options, name)
            rounds.append(found)
            print(f"round {turn + 1}: " + "; ".join(
                f"{name} {one.tokens_per_s:.1f} tokens/s, first token {one.first_token_ms:.1f} ms, answer "
                f"{one.answer_ms:.1f} ms, {one.under_way:.2f} of {options.streams} streams under way"
                for name, one in sorted(found.items())), flush=True)  # fmt: skip
        low, middle, high = quartiles([one["moeship"].tokens_per_s / one["aiperf"].tokens_per_s for one in rounds])
        print(f"moeship over aiperf: {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {len(rounds)} rounds)")
        if options.output:
            facts = {"cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()}
            every = [{name: asdict(one) for name, one in found.items()} for found in rounds]
            options.output.write_text(json.dumps({**facts, "ratio": [low, middle, high], "rounds": every}, indent=2))
        return int(abs(middle - 1) > BOUND)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
