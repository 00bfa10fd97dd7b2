"""Drives a served model past its limits, and looks whether it stays right, healthy and free.

    moeship serve REPOSITORY --json --request-log requests.jsonl > server.json &
    python ci/overload.py --server server.json --model phixtral
    python ci/overload.py --server server.json --model phixtral --only echo --checkpoint CHECKPOINT

- burst: 500 requests at once. What the queue does not hold is refused within a second, as UNAVAILABLE with what waits
  and when to send it again; the others are answered right. A short request beside long ones gets its first token in
  two seconds more than alone. `client_late_s` is the longest time for which this process got no turn: where that is
  much of the slowest refusal, the machine was busy with other work.
- mixed: 2,000 requests of every kind from many clients. Clients end a fifth of them early, a twentieth are wrong; then
  200 connections are torn. Every answer is what the same request got alone, nothing is held afterwards, and the
  process that computes has not grown by 2 %. The kinds use all that a server has: prompts that begin alike (the prefix
  cache), prompts that repeat themselves (drafts), and schemas, expressions and grammars, which whole answers must meet.
  Triton before 2.57 may die of torn connections; then `moeship serve` must serve again, which is counted.
- ends: streams that are stopped or torn one by one; from the request log, how many tokens were computed for nobody.
- unread: clients that never read what they asked for. Their answers end, others are answered right, and the memory that
  is kept for them is measured.
- echo: the log-likelihoods of 200 continuations are the reference's (needs --checkpoint and torch).

The server needs all slots to itself. With `--rounds` texts may differ from those alone, as they do for int8 and int4
where two tokens are all but equally likely; they are counted. Progress goes to stderr, one JSON object to stdout. The
exit status is 1 where a bar is broken; `faults` says which.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "ci")]

from soak.burst import burst  # noqa: E402 - found through the path above
from soak.echo import echo  # noqa: E402
from soak.ends import ends  # noqa: E402
from soak.mixed import Amounts, mixed  # noqa: E402
from soak.served import Report, Served  # noqa: E402
from soak.unread import unread  # noqa: E402

from cli.tls_flags import add_tls_arguments, read_client_tls  # noqa: E402


def scenarios(served: Served, options: argparse.Namespace) -> dict[str, Callable[[], Awaitable[Report]]]:
    seed, rounds = options.seed, options.rounds
    amounts = Amounts(
        requests=options.requests, different=options.different, clients=options.clients, torn=options.torn
    )
    return {
        "burst": lambda: burst(served, options.burst, options.different, seed, rounds=rounds),
        "mixed": lambda: mixed(served, amounts, seed, rounds=rounds),
        "ends": lambda: ends(served, options.ends, seed),
        "unread": lambda: unread(served, options.unread, seed, rounds=rounds),
        "echo": lambda: echo(served, options.checkpoint, options.continuations, seed),
    }


async def run(options: argparse.Namespace) -> int:
    served = Served(options.server, options.model, options.request_log, read_client_tls(options))
    found: dict[str, object] = {}
    broken = False
    for name, scenario in scenarios(served, options).items():
        if (options.only and name not in options.only) or (name == "echo" and options.checkpoint is None):
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        begun = time.monotonic()
        report = await scenario()
        took = f"{time.monotonic() - begun:.0f} s"
        print(f"{name}: {'; '.join(report.faults[:3]) or 'all bars hold'} ({took})", file=sys.stderr, flush=True)
        found[name] = report.as_json()
        broken = broken or bool(report.faults)
    print(json.dumps(found))
    return 1 if broken else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", type=Path, required=True, help="what `moeship serve --json` printed")
    parser.add_argument("--model", required=True)
    parser.add_argument("--request-log", type=Path, help="the file of `moeship serve --request-log`, for `ends`")
    add_tls_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, help="what the engine was built from, for `echo`")
    parser.add_argument("--only", action="append", choices=("burst", "mixed", "ends", "unread", "echo"))
    parser.add_argument("--rounds", action="store_true", help="the engine computes in int8: texts may differ")
    parser.add_argument("--seed", type=int, default=1)
    for name, default, what in (
        ("burst", 500, "requests at once"),
        ("requests", 2000, "mixed requests"),
        ("different", 120, "different requests among all of these; each is asked alone first"),
        ("clients", 24, "mixed requests at a time"),
        ("torn", 200, "torn connections"),
        ("ends", 60, "streams that are ended one by one"),
        ("unread", 64, "answers that nobody reads"),
        ("continuations", 200, "continuations that are scored"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
