"""One request through an engine: options in, pieces of text out. The server and every in-process caller run this.

    for piece in generate(session, tokenizer, GenerationOptions(prompt="def ", max_tokens=32)):
        print(piece.text, end="")

A piece carries whole characters and the tokens since the piece before; the last one alone has a finish reason:
"stop" (an end token or a stop word), "length" (max_tokens or the engine's context), "cancelled".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from triton_repo.runtime.detokenizer import Detokenizer
from triton_repo.runtime.options import GenerationOptions, GenerationPlan, plan_generation
from triton_repo.runtime.sampling import Choice, Floats, Sampler
from triton_repo.runtime.stopping import StopWatcher
from trt_build.ort.session import PREFILL_CHUNK_TOKENS

if TYPE_CHECKING:
    from export.tokenizer import Tokenizer
    from trt_build.ort.session import Cache, Session


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step adds. `token_ids` and `log_probs` are those since the piece before, an end token included;
    `log_probs` and `cum_log_prob` (natural logarithm, sum so far) are None unless asked for; `num_output_tokens` counts
    all so far; `finish_reason` is empty until the last piece.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] | None
    cum_log_prob: float | None
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int


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
    """Yield the pieces of one answer. `cache` is one of the session's to use again; its content is forgotten.

    `is_cancelled` is asked before every step. Raises RequestError at once for options that do not fit the model, and
    later for logits that are no numbers.
    """
    plan = plan_generation(
        options,
        tokenizer,
        max_sequence=session.max_sequence,
        end_token_ids=session.engine.manifest.eos_token_ids,
    )
    if cache is None:
        cache = session.new_cache()
    cache.reset()
    return _pieces(session, cache, Answer(plan, tokenizer), is_cancelled)


def _pieces(session: Session, cache: Cache, answer: Answer, is_cancelled: Callable[[], bool]) -> Iterator[Piece]:
    pending = list(answer.plan.prompt_ids)
    while True:
        while pending:
            if is_cancelled():
                yield answer.cancel()
                return
            logits = session.run(cache, pending[:PREFILL_CHUNK_TOKENS])
            pending = pending[PREFILL_CHUNK_TOKENS:]
        token, piece = answer.extend(logits)
        if piece is not None:
            yield piece
            if piece.finish_reason:
                return
        pending = [token]


def join(pieces: Iterable[Piece]) -> Piece:
    """All pieces of one answer as one."""
    parts = list(pieces)
    last = parts[-1]
    wanted = last.log_probs is not None
    return Piece(
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        log_probs=tuple(value for part in parts for value in part.log_probs or ()) if wanted else None,
        cum_log_prob=last.cum_log_prob,
        finish_reason=last.finish_reason,
        num_input_tokens=last.num_input_tokens,
        num_output_tokens=last.num_output_tokens,
    )


class Answer:
    """The answer as it grows: from logits to a chosen token, its text, and the piece that can be sent."""

    def __init__(self, plan: GenerationPlan, tokenizer: Tokenizer) -> None:
        options = plan.options
        self.plan = plan
        self._sampler = Sampler(plan, tokenizer.size)
        self._detokenizer = Detokenizer(tokenizer, plan.prompt_ids)
        self._stop = StopWatcher(options.stop_words)
        self._bad_words = options.bad_words
        self._tail_size = max((len(word) for word in options.bad_words), default=1) - 1
        self._tail = ""  # the end of the text, as much of it as a bad word could begin in
        self._unsent: list[Choice] = []
        self._prefix = "" if options.exclude_input_in_output else options.prompt
        self._num_tokens = 0
        self._cum_log_prob = 0.0

    def extend(self, logits: Floats) -> tuple[int, Piece | None]:
        """Choose a token for logits [V]; returns it, and a piece if there is text to send or the answer ends."""
        choice = self._sampler.choose(logits, self._completes_bad_word if self._bad_words else None)
        self._unsent.append(choice)
        self._num_tokens += 1
        self._cum_log_prob += choice.log_prob or 0.0
        ended = choice.token_id in self.plan.end_ids
        text, stopped = ("", False) if ended else self._add_text(self._detokenizer.push(choice.token_id))
        if not stopped and (ended or self._num_tokens == self.plan.most_tokens):
            rest, stopped = self._add_text(self._detokenizer.flush())
            text += rest if stopped else rest + self._stop.flush()
            return choice.token_id, self._piece(text, "stop" if ended or stopped else "length")
        if text or stopped:
            return choice.token_id, self._piece(text, "stop" if stopped else "")
        return choice.token_id, None

    def cancel(self) -> Piece:
        """The last piece of an answer that nobody waits for."""
        return self._piece("", "cancelled")

    def _add_text(self, text: str) -> tuple[str, bool]:
        if self._tail_size:
            self._tail = (self._tail + text)[-self._tail_size :]
        return self._stop.push(text)

    def _completes_bad_word(self, token: int) -> bool:
        """Whether a bad word would stand in the text with `token`, however the text is split into tokens."""
        if token in self.plan.end_ids:
            return False
        text = self._tail + self._detokenizer.preview(token)
        return any(word in text for word in self._bad_words)

    def _piece(self, text: str, finish_reason: str) -> Piece:
        choices, self._unsent = self._unsent, []
        wanted = self.plan.options.return_log_probs
        prefix, self._prefix = self._prefix, ""
        return Piece(
            text=prefix + text,
            token_ids=tuple(choice.token_id for choice in choices),
            log_probs=tuple(choice.log_prob or 0.0 for choice in choices) if wanted else None,
            cum_log_prob=self._cum_log_prob if wanted else None,
            finish_reason=finish_reason,
            num_input_tokens=len(self.plan.prompt_ids),
            num_output_tokens=self._num_tokens,
        )
