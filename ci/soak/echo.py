"""Log-likelihoods of continuations through the server, against the reference."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clients.generation import AsyncClient, GenerationRequest
from clients.messages import Generation, collect
from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.reference.model import Reference
from export.tokenizer.loading import load_tokenizer
from soak.served import Report, Served
from soak.wishes import PATIENCE_S
from trt_build.comparison.evaluation_text import own_text
from trt_build.comparison.parity import log_softmax

BAR = 1e-3  # nats, of one continuation
AT_ONCE = 12
CONTEXT_CHARACTERS, CONTINUATION_TOKENS = (20, 300), (1, 24)


async def echo(served: Served, checkpoint: Path, number: int, seed: int) -> Report:
    """Score so many continuations, several at a time. The engine must be of fp32."""
    source, text, report = random.Random(f"echo {seed}"), own_text().content, Report()
    prompts = []
    for _ in range(number):
        size = source.randint(*CONTEXT_CHARACTERS)
        start = source.randrange(len(text) - size)
        prompts.append(text[start : start + size])
    places = asyncio.Semaphore(AT_ONCE)
    async with served.client() as client:
        found = await asyncio.gather(*(_score(client, served.model, prompt, places) for prompt in prompts))
    expected = await asyncio.to_thread(_reference, checkpoint, [answer.prompt_token_ids for answer in found])
    gaps = []
    for answer, reference in zip(found, expected, strict=True):
        report.require(len(answer.prompt_log_probs) == len(reference), "a prompt's token has no log-probability")
        count = min(source.randint(*CONTINUATION_TOKENS), len(reference))
        gaps.append(abs(float(np.sum(answer.prompt_log_probs[-count:])) - float(reference[-count:].sum())))
    report.counts["continuations"] = len(gaps)
    report.numbers.update(largest_gap=float(f"{max(gaps):.3g}"), median_gap=float(f"{np.median(gaps):.3g}"))
    report.require(max(gaps) <= BAR, f"a log-likelihood is {max(gaps):.2g} from the reference's, allowed are {BAR:g}")
    return report


async def _score(client: AsyncClient, model: str, prompt: str, places: asyncio.Semaphore) -> Generation:
    """The prompt's token ids and their log-probabilities."""
    request = GenerationRequest(
        model=model, prompt=prompt, max_tokens=1, return_prompt_log_probs=True, timeout_s=PATIENCE_S
    )
    async with places, aclosing(client.stream(request)) as pieces:
        return collect([piece async for piece in pieces])


def _reference(checkpoint: Path, prompts: list[tuple[int, ...]]) -> list[npt.NDArray[np.float64]]:
    """Of each prompt the log-probability of every token from the second on, among the tokens that have a text."""
    reference, size = Reference(read_model(open_checkpoint(checkpoint))), load_tokenizer(checkpoint).size
    found = []
    for prompt, (logits, _) in zip(prompts, reference.run(prompts), strict=True):
        chosen = np.array(prompt[1:])
        found.append(log_softmax(logits[:-1, :size])[np.arange(len(chosen)), chosen])
    return found
