"""Answers requests of texts: writes the tokens of a sequence as pieces of text, and answers one request in process.

for piece in generate(session, tokenizer, GenerationOptions(prompt="def ", max_tokens=32)):
    print(piece.text, end="")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from triton_repo.contracts.piece import Piece, join
from triton_repo.runtime.answer import Answer, TopLogProbs, answer_plan
from triton_repo.runtime.batching.alone import answered, never
from triton_repo.runtime.batching.outlet import Outlet
from triton_repo.runtime.batching.sequence import Request
from triton_repo.runtime.features import refuse_routing
from triton_repo.runtime.guided.guides import AwaitedGuide, Guides
from triton_repo.runtime.options import GenerationOptions, GenerationPlan, plan_generation
from triton_repo.runtime.sampling import Choice, Guide, Sampler
from triton_repo.runtime.text.stopping import TextWatcher

if TYPE_CHECKING:
    from export.tokenizer.loading import Tokenizer
    from trt_build.ort.session import Session


class TextWriter:
    """Chooses the tokens of one answer and writes them as pieces, or `joined` as one piece
    (`triton_repo.runtime.batching.sequence.Writer`)."""

    def __init__(
        self,
        plan: GenerationPlan,
        tokenizer: Tokenizer,
        sequence_index: int = 0,
        *,
        joined: bool = False,
        guide: Guide | None = None,
    ) -> None:
        self.plan = plan
        self._joined = joined
        self.wants_prompt = plan.options.return_prompt_log_probs
        self.wants_routing = plan.options.return_routed_experts
        self._bad_words = plan.options.bad_words
        self.answer = Answer(answer_plan(plan, tokenizer), tokenizer, self._bad_words, sequence_index=sequence_index)
        self.sampler = Sampler(
            plan,
            tokenizer.size,
            refuses=self._completes_bad_word if self._bad_words else None,
            banned=(lambda: [np.array(self._bad_tokens, dtype=np.int64)]) if self._bad_words else None,
            sequence_index=sequence_index,
            guide=guide,
        )
        self._tokenizer = tokenizer
        self._bad_alone = TextWatcher(self._bad_words)
        self._bad_tokens: list[int] = []  # tokens met so far whose own text contains a bad word
        self.num_prompt_tops = plan.options.num_log_probs
        self._prompt_log_probs: list[float] = []
        self._prompt_tops: list[TopLogProbs] = []
        self._kept: list[Piece] = []  # pieces of an answer that comes in one response

    def write(self, choice: Choice) -> tuple[Piece | None, str]:
        """Take the next token. Returns a piece if there is one to send, and the answer's finish reason once it has
        ended."""
        if self.wants_prompt:
            self.answer.give_prompt(self.plan.prompt_ids, tuple(self._prompt_log_probs), tuple(self._prompt_tops))
            self.wants_prompt = False
        self.answer.num_experts, is_last = choice.num_experts, self.sampler.is_complete
        piece = self.answer.extend(
            choice.token_id, choice.log_prob or 0.0, choice.top_log_probs, choice.routing, is_last=is_last
        )
        if piece is None:
            return None, ""
        reason = piece.finish_reason or ""
        return (self._whole(piece) if reason else self._part(piece)), reason

    def cancel(self) -> Piece:
        """The last piece of an answer that nobody waits for."""
        return self._whole(self.answer.cancel())

    def take_prompt(self, log_probs: Sequence[float], tops: Sequence[TopLogProbs]) -> None:
        """Take the log-probabilities of some of the prompt's tokens, in their order, from the second token on, and the
        likeliest tokens at their places, where they are wanted."""
        self._prompt_log_probs += log_probs
        self._prompt_tops += tops

    def _part(self, piece: Piece) -> Piece | None:
        if self._joined:
            self._kept.append(piece)
            return None
        return piece

    def _whole(self, piece: Piece) -> Piece:
        return join([*self._kept, piece]) if self._kept else piece

    def _completes_bad_word(self, token: int) -> bool:
        """Whether the text would contain a bad word after `token`, whatever tokens spell the word."""
        if token in self.plan.end_ids or not self.answer.would_write_bad_word(token):
            return False
        if self._bad_alone.would_match(self._tokenizer.decode([token])):
            self._bad_tokens.append(token)
        return True


def text_request(
    plan: GenerationPlan,
    tokenizer: Tokenizer,
    outlet: Outlet[Piece],
    names: frozenset[str] = frozenset(),
    deadline_s: float | None = None,
    *,
    joined: bool = False,
    request_id: str = "",
    guides: Guides | None = None,
) -> Request[Piece]:
    """The request of a checked plan. If `joined`, each of its answers comes as one piece. `guides` compiles its guide,
    which the request awaits. Raises RequestError where no guide can be compiled at the moment."""
    count, options = plan.options.num_return_sequences, plan.options
    guides = Guides(tokenizer) if guides is None else guides  # one that keeps no guide yet is false
    compiled = guides.of(options.guided_decoding_guide_type, options.guided_decoding_guide)
    return Request(
        names=names,
        prompt_ids=plan.prompt_ids,
        most_tokens=plan.most_tokens,
        writers=[
            TextWriter(
                plan,
                tokenizer,
                index,
                joined=joined,
                guide=None if compiled is None else AwaitedGuide(compiled, plan.end_ids),
            )
            for index in range(count)
        ],
        outlet=outlet,
        deadline_s=deadline_s,
        request_id=request_id,
        awaited=compiled,
    )


def generate(
    session: Session,
    tokenizer: Tokenizer,
    options: GenerationOptions,
    is_cancelled: Callable[[], bool] = never,
    *,
    guides: Guides | None = None,
) -> Iterator[Piece]:
    """Yield the pieces of one request's answers. `guides` keeps compiled guides from call to call.

    `is_cancelled` is called before every step. Raises RequestError at once for options that do not fit the model, and
    while the pieces are read for logits that are NaN or infinite.
    """
    plan = plan_generation(
        options,
        tokenizer,
        max_sequence=session.max_sequence,
        end_token_ids=session.engine.manifest.eos_token_ids,
    )
    refuse_routing(options.return_routed_experts, given=session.routing is not None)
    guides = Guides(tokenizer) if guides is None else guides
    if options.guided_decoding_guide_type:
        guides.compile(options.guided_decoding_guide_type, options.guided_decoding_guide)
    responses = answered(session, lambda outlet: text_request(plan, tokenizer, outlet, guides=guides), is_cancelled)
    return (piece for piece, _ in responses)
