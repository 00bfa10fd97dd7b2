"""What the gateway costs: the same requests to one server, straight over gRPC and through its gateway, by turns.

    moeship package ENGINE --name NAME --no-prefix-cache --output REPOSITORY
    moeship serve REPOSITORY --openai-port 8080 --json
    python benchmarks/gateway.py --grpc 127.0.0.1:PORT --openai http://127.0.0.1:8080 --model NAME --output RESULT.json

- throughput: `--streams` streams at once, each of which asks again as soon as it is answered, a turn of seconds on each
  road and the same prompts on both; tokens/s of a turn are those of its whole answers over the time from its first
  request to its last answer, and the ratio is taken turn by turn;
- first token: one request at a time, alternately on each road, with prompts that share no beginning; the difference of
  the two is taken pair by pair.

The cache of prompts is off in the repository, so that the road that comes second finds nothing of the first one's. Both
clients run in this process: on few cores what they cost is taken from the server, on either road. Answers have all
the tokens that were asked for. Needs the extras `client` and `load`. Exit status 0 done, 1 a failed request, 2
wrong input.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.errors import ServerFailed
from clients.generation import AsyncClient, GenerationRequest
from decode import machine
from export.command import run_command
from export.files.output import replace_file
from export.optional import optional_package

if TYPE_CHECKING:
    from aiohttp import ClientSession

NO_END = -1
# Letters and digits are one token each at most, so that prompts have about as many tokens as they have words.
WORDS = ("def", "the", "return", "of", "import", "and", "class", "in", "self", "to", "print", "is", "for", "with")
Ask = Callable[[str, int], Awaitable[float]]  # prompt, tokens -> seconds to the first piece; returns once it is whole


def prompt_of(source: random.Random, num_words: int) -> str:
    """A prompt whose beginning no other one has."""
    return f"{source.getrandbits(64):x} " + " ".join(source.choices(WORDS, k=num_words))


def direct(client: AsyncClient, model: str) -> Ask:
    """Asks over gRPC."""

    async def ask(prompt: str, num_tokens: int) -> float:
        request = GenerationRequest(model=model, prompt=prompt, max_tokens=num_tokens, end_id=NO_END)
        begun, first, count = time.perf_counter(), None, 0
        async with aclosing(client.stream(request)) as pieces:
            async for piece in pieces:
                first = first or time.perf_counter()
                count += len(piece.token_ids)
        if count != num_tokens or first is None:
            raise ServerFailed(f"measuring over gRPC: found an answer of {count} tokens, expected {num_tokens}")
        return first - begun

    return ask


def through(session: ClientSession, url: str, model: str) -> Ask:
    """Asks the gateway for a completion, as events."""

    async def ask(prompt: str, num_tokens: int) -> float:
        body = {
            "model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "stream": True,
            "ignore_eos": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        begun, first, usage = time.perf_counter(), None, None
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise ServerFailed(f"measuring the gateway: found {response.status}: {(await response.text())[:400]}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter()
                    if b'"usage":{' in line.replace(b" ", b""):
                        usage = json.loads(line[6:])["usage"] or usage
        if first is None or usage is None or usage["completion_tokens"] != num_tokens:
            raise ServerFailed(f"measuring the gateway: found the usage {usage}, expected {num_tokens} tokens")
        return first - begun

    return ask


async def throughput(ask: Ask, number: int, options: argparse.Namespace) -> float:
    """Tokens/s of turn `number`: streams end their last request after `--turn` seconds.

    A stream's prompts follow from the seed, the turn and the stream, so that both roads ask for the same work.
    """
    begun, answers = time.perf_counter(), 0

    async def stream(name: int) -> None:
        nonlocal answers
        source = random.Random(f"{options.seed} {number} {name}")
        while True:
            await ask(prompt_of(source, options.prompt_words), options.tokens)
            answers += 1
            if time.perf_counter() - begun >= options.turn:
                return

    await asyncio.gather(*(stream(name) for name in range(options.streams)))
    return answers * options.tokens / (time.perf_counter() - begun)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All turns of both scenarios."""
    with optional_package("aiohttp", "measuring a gateway", "load"):
        import aiohttp
    source = random.Random(options.seed)
    rounds, pairs = [], []
    timeout = aiohttp.ClientTimeout(total=None)
    async with AsyncClient(options.grpc) as client, aiohttp.ClientSession(timeout=timeout) as session:
        roads = {"grpc": direct(client, options.model), "gateway": through(session, options.openai, options.model)}
        for ask in roads.values():  # connections, tokenizers
            await ask(prompt_of(source, options.prompt_words), options.tokens)
        for number in range(options.pairs):
            order = sorted(roads, reverse=bool(number % 2))
            pairs.append({name: await roads[name](prompt_of(source, options.prompt_words), 1) for name in order})
        for number in range(options.rounds):
            order = sorted(roads, reverse=bool(number % 2))
            rounds.append({name: await throughput(roads[name], number, options) for name in order})
            print(f"round {number + 1}: {_words(rounds[-1])}", file=sys.stderr, flush=True)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "tokens_per_s": rounds,
        "first_token_s": pairs,
    }


def _words(turn: dict[str, float]) -> str:
    return f"{turn['grpc']:.1f} tokens/s over gRPC, {turn['gateway']:.1f} through the gateway"


def summary(result: dict[str, Any]) -> str:
    """Medians of ratios and differences, with their quartiles."""
    ratios = [turn["gateway"] / turn["grpc"] for turn in result["tokens_per_s"]]
    added = [1e3 * (pair["gateway"] - pair["grpc"]) for pair in result["first_token_s"]]
    direct_ms = statistics.median(1e3 * pair["grpc"] for pair in result["first_token_s"])
    lines = []
    for values, form in ((ratios, "throughput, gateway over gRPC: {:.3f}"), (added, "first token, added: {:.1f} ms")):
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        digits = 3 if values is ratios else 1
        lines.append(
            f"{form.format(statistics.median(values))} (quartiles {quartiles[0]:.{digits}f}, "
            f"{quartiles[2]:.{digits}f}; {len(values)} turns)"
        )
    return "\n".join([*lines, f"first token over gRPC: {direct_ms:.1f} ms"])


def benchmark(options: argparse.Namespace) -> int:
    """Measure, write the result, print the summary."""
    result = asyncio.run(measure(options))
    if options.output:
        replace_file(options.output, json.dumps(result, indent=1) + "\n")
    print(summary(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grpc", required=True, metavar="HOST:PORT", help="the server")
    parser.add_argument("--openai", required=True, metavar="URL", help="its gateway, without /v1")
    parser.add_argument("--model", required=True, help="its name")
    parser.add_argument("--output", type=Path, help="file for the result")
    parser.add_argument("--streams", type=int, default=8, metavar="N", help="at once (default 8)")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="turns on each road (default 6)")
    parser.add_argument("--turn", type=float, default=15, metavar="S", help="seconds of a turn at least (default 15)")
    parser.add_argument("--pairs", type=int, default=60, metavar="N", help="first tokens on each road (default 60)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of an answer (default 64)")
    parser.add_argument("--prompt-words", type=int, default=16, metavar="N", help="of a prompt (default 16)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    return run_command(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
