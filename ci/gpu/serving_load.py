"""Measures streams under load with moeship's client: prompts in, the time of every piece out, and medians.

A level keeps a number of streams busy, each with one request after another. Time to first token is the time from
sending to the first piece. Inter-token latency is the time between two pieces divided by the number of tokens in the
second. Throughput is the number of all tokens divided by the time from the first request to the last token, including
the end of a round, when some streams have no requests left.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clients.errors import ClientError
from clients.generation import AsyncClient, GenerationRequest
from export.errors import ConfigError
from export.tokenizer.loading import Tokenizer

TIMEOUT_S = 600
MICROSECONDS = 6  # number of decimals to which seconds are rounded


@dataclass(frozen=True, kw_only=True)
class Load:
    """The load to apply: tokens of a prompt and of an answer, the number of concurrent streams of each level, requests
    of each stream in a round (at least `fewest_requests` over all streams), and rounds of a level."""

    prompt_tokens: int = 128
    output_tokens: int = 128
    concurrency: tuple[int, ...] = (1, 4, 16, 32)
    requests_per_stream: int = 4
    fewest_requests: int = 8
    rounds: int = 3

    def requests(self, concurrency: int) -> int:
        """Number of requests in a round."""
        return max(self.fewest_requests, self.requests_per_stream * concurrency)

    @property
    def num_prompts(self) -> int:
        """Number of prompts in all rounds and in the warm-up round of each level."""
        return sum((self.rounds + 1) * self.requests(concurrency) for concurrency in self.concurrency)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The times of one answer, in seconds from the start of its round: when the request was sent and when each piece
    came, with the number of tokens so far beside each piece."""

    sent_s: float
    arrivals_s: tuple[float, ...]
    num_tokens: tuple[int, ...]
    num_input_tokens: int | None
    finish_reason: str | None

    @property
    def first_token_s(self) -> float:
        return self.arrivals_s[0] - self.sent_s

    def gaps_s(self) -> Iterator[float]:
        """Seconds per token for every piece after the first that has tokens."""
        pieces = list(zip(self.arrivals_s, self.num_tokens, strict=True))
        for (before_s, before), (after_s, after) in itertools.pairwise(pieces):
            if after > before:
                yield (after_s - before_s) / (after - before)


def different_prompts(tokenizer: Tokenizer, text: str, num_prompts: int, num_tokens: int) -> list[str]:
    """Prompts cut from a text at different tokens, so that a cache of earlier prompts does not speed up later ones.

    Raises ConfigError if the text is too short.
    """
    ids = tokenizer.encode(text)
    places = len(ids) - num_tokens
    if places < num_prompts:
        raise ConfigError(
            f"choosing {num_prompts} prompts of {num_tokens} tokens: the text has {len(ids)} tokens; ask for fewer"
        )
    starts = [index * places // num_prompts for index in range(num_prompts)]
    return [tokenizer.decode(ids[start : start + num_tokens]) for start in starts]


async def measure_level(
    client: AsyncClient, model: str, prompts: Sequence[str], concurrency: int, output_tokens: int
) -> dict[str, Any]:
    """One round: all prompts' answers over `concurrency` streams. Raises ClientError of the first request that fails,
    once the others have ended."""
    waiting, samples, errors = list(reversed(prompts)), list[Sample](), list[ClientError]()
    started, busy = time.perf_counter(), time.process_time()

    async def stream() -> None:
        while waiting and not errors:
            request = GenerationRequest(
                model=model, prompt=waiting.pop(), max_tokens=output_tokens, min_length=output_tokens, top_k=1,
                exclude_input_in_output=True, timeout_s=TIMEOUT_S,
            )  # fmt: skip
            try:
                samples.append(await _answer(client, request, started))
            except ClientError as error:
                errors.append(error)

    await asyncio.gather(*(stream() for _ in range(concurrency)))
    wall = time.perf_counter() - started
    if errors:
        raise errors[0]
    tokens = sum(sample.num_tokens[-1] for sample in samples)
    return {
        "wall_s": round(wall, MICROSECONDS),
        "tokens": tokens,
        "tokens_per_s": tokens / wall,
        "client_busy": (time.process_time() - busy) / wall,
        "samples": samples,
    }


async def _answer(client: AsyncClient, request: GenerationRequest, started: float) -> Sample:
    """Raises ClientError, also where the server does not count tokens."""
    sent, arrivals, counts = time.perf_counter() - started, list[float](), list[int]()
    num_input, reason = None, None
    async for piece in client.stream(request):
        arrivals.append(round(time.perf_counter() - started, MICROSECONDS))
        if piece.num_output_tokens is None:
            raise ClientError(
                f"measuring {request.model}: found a piece without num_output_tokens, which every piece of moeship has"
            )
        counts.append(piece.num_output_tokens)
        num_input, reason = piece.num_input_tokens or num_input, piece.finish_reason or reason
    if not counts or not counts[-1]:
        raise ClientError(f"measuring {request.model}: found an answer without a token")
    return Sample(
        sent_s=round(sent, MICROSECONDS), arrivals_s=tuple(arrivals), num_tokens=tuple(counts),
        num_input_tokens=num_input, finish_reason=reason,
    )  # fmt: skip


def summarise(concurrency: int, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a level over its rounds, and every sample. `client_busy` is the share of one core that the client
    used: if it is near 1, the client limited the result and not the server."""
    samples, rates = [sample for one in rounds for sample in one["samples"]], [one["tokens_per_s"] for one in rounds]
    return {
        "concurrency": concurrency,
        "time_to_first_token_s": spread([sample.first_token_s for sample in samples]),
        "inter_token_s": spread([gap for sample in samples for gap in sample.gaps_s()]),
        "tokens_per_s": {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "n": len(rates)},
        "client_busy": max(one["client_busy"] for one in rounds),
        "rounds": [{**one, "samples": [vars(sample) for sample in one["samples"]]} for one in rounds],
    }


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Median, 95th percentile and number of values; the first two are None if there are no values."""
    if not values:
        return {"median": None, "p95": None, "n": 0}
    p95 = statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
    return {"median": statistics.median(values), "p95": p95, "n": len(values)}
