"""Answers one request on an engine: options in, pieces of text out. The server and in-process callers use it.

for piece in generate(session, tokenizer, GenerationOptions(prompt="def ", max_tokens=32)):
    print(piece.text, end="")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from triton_repo.contracts.piece import Piece
from triton_repo.runtime.answer import Answer, answer_plan
from triton_repo.runtime.options import GenerationOptions, GenerationPlan, plan_generation
from triton_repo.runtime.sampling import Floats, Sampler
from triton_repo.runtime.text.stopping import TextWatcher
from trt_build.ort.session import PREFILL_CHUNK_TOKENS

if TYPE_CHECKING:
    from export.tokenizer.loading import Tokenizer
    from trt_build.ort.session import Cache, Session


def never() -> bool:
    """An `is_cancelled` for callers that do not cancel."""
    return False


def generate(
    session: Session,
    tokenizer: Tokenizer,
    options: GenerationOptions,
    is_cancelled: Callable[[], bool] = never,
    cache: Cache | None = None,
) -> Iterator[Piece]:
    """Yield the pieces of one answer. `cache` is a cache of the session to reuse; its content is discarded.

    `is_cancelled` is called before every step. Raises RequestError at once for options that do not fit the model, and
    while the pieces are read for logits that are NaN or infinite.
    """
    plan = plan_generation(
        options,
        tokenizer,
        max_sequence=session.max_sequence,
        end_token_ids=session.engine.manifest.eos_token_ids,
    )
    return pieces_of(session, session.new_cache() if cache is None else cache, plan, tokenizer, is_cancelled)


def pieces_of(
    session: Session, cache: Cache, plan: GenerationPlan, tokenizer: Tokenizer, is_cancelled: Callable[[], bool]
) -> Iterator[Piece]:
    """`generate` for a request that is checked already. Raises RequestError for logits that are NaN or infinite."""
    cache.reset()
    writer = _Writer(plan, tokenizer)
    pending: Sequence[int] = plan.prompt_ids
    while True:
        logits = feed(session, cache, pending, is_cancelled)
        if logits is None:
            yield writer.answer.cancel()
            return
        token, piece = writer.write(logits)
        if piece is not None:
            yield piece
            if piece.finish_reason:
                return
        pending = [token]


def feed(session: Session, cache: Cache, token_ids: Sequence[int], is_cancelled: Callable[[], bool]) -> Floats | None:
    """Run tokens through the engine. Returns the logits [V] of the last token, which are valid until the next run; None
    if the request was cancelled. `is_cancelled` is called before every step of a long prompt.
    """
    logits = None
    for start in range(0, len(token_ids), PREFILL_CHUNK_TOKENS):
        if is_cancelled():
            return None
        logits = session.run(cache, token_ids[start : start + PREFILL_CHUNK_TOKENS])
    return logits


class _Writer:
    """Chooses the tokens of one answer and adds them to the answer."""

    def __init__(self, plan: GenerationPlan, tokenizer: Tokenizer) -> None:
        self.plan = plan
        self._bad_words = plan.options.bad_words
        self.answer = Answer(answer_plan(plan, tokenizer), tokenizer, self._bad_words)
        self._sampler = Sampler(
            plan,
            tokenizer.size,
            refuses=self._completes_bad_word if self._bad_words else None,
            banned=lambda: [np.array(self._bad_tokens, dtype=np.int64)],
        )
        self._tokenizer = tokenizer
        self._bad_alone = TextWatcher(self._bad_words)
        self._bad_tokens: list[int] = []  # tokens met so far whose own text contains a bad word

    def write(self, logits: Floats) -> tuple[int, Piece | None]:
        """Choose a token for logits [V]. Returns the token, and a piece if there is text to send or the answer ends."""
        choice = self._sampler.choose(logits)
        return choice.token_id, self.answer.extend(choice.token_id, choice.log_prob or 0.0, choice.top_log_probs)

    def _completes_bad_word(self, token: int) -> bool:
        """Whether the text would contain a bad word after `token`, whatever tokens spell the word."""
        if token in self.plan.end_ids or not self.answer.would_write_bad_word(token):
            return False
        if self._bad_alone.would_match(self._tokenizer.decode([token])):
            self._bad_tokens.append(token)
        return True
