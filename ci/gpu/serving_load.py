"""Measures streams under load by moeship's load generator (clients/bench): prompts in, the time of every piece out.

A level keeps a number of streams busy, each with one request after another. Throughput is the number of all tokens
divided by the time from the first request to the last token, including the end of a round, when some streams have no
requests left.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clients.bench import load as bench
from clients.bench.generator import apply
from clients.bench.prompts import Listed
from clients.bench.records import Record
from clients.bench.report import gaps_per_token, spread
from clients.bench.targets.triton import TritonTarget
from clients.errors import ClientError
from clients.generation import AsyncClient, GenerationRequest
from export.errors import ConfigError
from export.tokenizer.loading import Tokenizer

TIMEOUT_S = 600


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
    """One round: all prompts' answers over `concurrency` streams. Raises ClientError with the text of the first request
    that fails, once the others have ended."""
    works = Listed([bench.Work(prompt=prompt, max_tokens=output_tokens) for prompt in prompts])
    load = bench.Load(streams=concurrency, requests=len(prompts), stops_at_error=True)
    run = await apply(TritonTarget(client, model, TIMEOUT_S, _greedy), load, works)
    for record in run.records:
        if record.error:
            raise ClientError(f"{record.error}: {record.message}")
        if not record.num_tokens:
            raise ClientError(f"measuring {model}: an answer without a token")
    tokens = sum(record.num_tokens for record in run.records)
    return {
        "wall_s": run.window_s,
        "tokens": tokens,
        "tokens_per_s": tokens / run.window_s,
        "client_busy": run.cpu_s / run.window_s,
        "samples": run.records,
    }


def _greedy(work: bench.Work, model: str, timeout_s: float | None) -> GenerationRequest:
    """A greedy request whose answer has exactly `max_tokens` tokens."""
    return GenerationRequest(
        model=model, prompt=work.prompt, max_tokens=work.max_tokens, min_length=work.max_tokens, top_k=1,
        exclude_input_in_output=True, timeout_s=timeout_s,
    )  # fmt: skip


def summarise(concurrency: int, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a level over its rounds, and every sample. `client_busy` is the share of one core that the client
    used: if it is near 1, the client limited the result and not the server."""
    samples: list[Record] = [sample for one in rounds for sample in one["samples"]]
    rates = [one["tokens_per_s"] for one in rounds]
    return {
        "concurrency": concurrency,
        "time_to_first_token_s": spread(sample.first_token_s or 0.0 for sample in samples),
        "inter_token_s": spread(gaps_per_token(samples)),
        "tokens_per_s": {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "n": len(rates)},
        "client_busy": max(one["client_busy"] for one in rounds),
        "rounds": [{**one, "samples": [vars(sample) for sample in one["samples"]]} for one in rounds],
    }
