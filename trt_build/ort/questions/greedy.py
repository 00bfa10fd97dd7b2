"""Greedy text of an engine, by its serving graph and cache as a server computes it."""

from __future__ import annotations

from collections.abc import Sequence

from trt_build.ort.engine import Engine
from trt_build.ort.session import Session


def greedy_answers(engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """The token ids behind each prompt, the most likely one at each step: at most `num_tokens`, fewer at an end token,
    which is left out, or at the end of the context. Ids that stand for no text are never chosen."""
    session, manifest = Session(engine), engine.manifest
    answers = []
    for prompt in prompts:
        cache = session.new_cache()
        answer: list[int] = []
        logits = session.run(cache, prompt)
        while len(answer) < min(num_tokens, manifest.max_sequence - len(prompt)):
            token = int(logits[: manifest.tokenizer_size].argmax())
            if token in manifest.eos_token_ids:
                break
            answer.append(token)
            if len(answer) < min(num_tokens, manifest.max_sequence - len(prompt)):
                logits = session.run(cache, [token])
        answers.append(answer)
    return answers
