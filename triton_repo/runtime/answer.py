"""Turns the tokens of an answer into pieces of text, for every kind of engine.

    answer = Answer(answer_plan(plan, tokenizer), tokenizer)
    piece = answer.extend(token_id, log_prob)     # None while there is nothing to send
    if piece is not None and piece.finish_reason: ...

A piece holds whole characters and the tokens since the piece before. Only the last piece has a finish reason: "stop"
(an end token or a stop word), "length" (max_tokens or the engine's context) or "cancelled".
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property

from export.files.typed_json import read_typed
from export.tokenizer.loading import Tokenizer
from triton_repo.contracts.piece import Piece, TokenRouting
from triton_repo.runtime.options import GenerationPlan
from triton_repo.runtime.text.detokenizer import Detokenizer, last_text_token
from triton_repo.runtime.text.stopping import StopWatcher, TextWatcher, TokenWatcher
from triton_repo.runtime.text.words import Words, not_starting_in, spell

TopLogProbs = tuple[tuple[int, float], ...]  # ids and natural logarithms of their probabilities, the likeliest first


@dataclass(frozen=True, kw_only=True)
class AnswerPlan:
    """Everything that is needed to turn tokens into an answer. Its JSON goes from the process that reads a request to
    the process that writes the answer.

    Engines match `stop_tokens` against the prompt's tokens too. So a stop word that could begin in the prompt is not in
    `stop_tokens`, and is found only in the text.
    """

    num_input_tokens: int
    context_ids: tuple[int, ...]  # token of the prompt that the detokenizer begins with
    most_tokens: int  # new tokens
    end_ids: tuple[int, ...]
    stop_words: tuple[str, ...]
    stop_tokens: Words  # spellings of the stop words: for engines, and for words that show in no text
    # Put before the text: the prompt, if it is asked for and the answer comes in one response. A stream never repeats
    # the prompt (TensorRT-LLM, LlmRequest::createResult of cpp/tensorrt_llm/batch_manager/llmRequest.cpp).
    prefix: str
    return_log_probs: bool
    num_log_probs: int  # of how many of the likeliest tokens log-probabilities are sent at each token
    num_sequences: int  # answers to the prompt, each of which is written by this plan
    stream: bool

    @property
    def is_watched(self) -> bool:
        """Whether each token is looked at as it comes, to send it or to find a stop word in the text."""
        return self.stream or bool(self.stop_words)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> AnswerPlan:
        """Raises ValueError for what `to_json` did not write."""
        return read_typed(cls, json.loads(text))


def answer_plan(plan: GenerationPlan, tokenizer: Tokenizer) -> AnswerPlan:
    """The plan of the answer to a checked request."""
    options = plan.options
    return AnswerPlan(
        num_input_tokens=len(plan.prompt_ids),
        context_ids=last_text_token(tokenizer, plan.prompt_ids),
        most_tokens=plan.most_tokens,
        end_ids=plan.end_ids,
        stop_words=options.stop_words,
        stop_tokens=not_starting_in(plan.prompt_ids, spell(tokenizer, options.stop_words)),
        prefix="" if options.exclude_input_in_output or options.stream else options.prompt,
        return_log_probs=options.return_log_probs,
        num_log_probs=options.num_log_probs,
        num_sequences=options.num_return_sequences,
        stream=options.stream,
    )


class Answer:
    """An answer in progress: takes tokens, gives the pieces that can be sent.

    `bad_words` are only used by `would_write_bad_word`. `sequence_index` tells the answers to one prompt apart.
    """

    def __init__(
        self, plan: AnswerPlan, tokenizer: Tokenizer, bad_words: tuple[str, ...] = (), *, sequence_index: int = 0
    ) -> None:
        self.plan = plan
        self._sequence_index = sequence_index
        self._detokenizer = Detokenizer(tokenizer, plan.context_ids)
        self._bad_words = bad_words
        self.num_experts: int | None = None  # of each layer that has some, where the routing is sent
        self._unsent: list[tuple[int, float, TopLogProbs, TokenRouting]] = []
        self._prompt: tuple[tuple[int, ...], tuple[float, ...], tuple[TopLogProbs, ...]] = ((), (), ())
        self._prefix = plan.prefix
        self._num_tokens = 0
        self._cum_log_prob = 0.0
        self._complete = False

    # The watchers are made with the first token. For as many words as are allowed they take 8 MB, and many answers may
    # wait for their engine at the same time.
    @cached_property
    def _stop(self) -> StopWatcher:
        return StopWatcher(self.plan.stop_words)

    @cached_property
    def _stop_tokens(self) -> TokenWatcher:
        return TokenWatcher(self.plan.stop_tokens)

    @cached_property
    def _bad(self) -> TextWatcher:
        return TextWatcher(self._bad_words)

    @property
    def cum_log_prob(self) -> float:
        """The sum of the log-probabilities of the tokens so far."""
        return self._cum_log_prob

    @property
    def is_complete(self) -> bool:
        """Whether the tokens ended the answer, so that the engine has ended too: by an end token, by the tokens of a
        stop word, by a guide, or by their number. A stop word that is found only in the text does not end the
        engine."""
        return self._complete

    def give_prompt(
        self, token_ids: tuple[int, ...], log_probs: tuple[float, ...], tops: tuple[TopLogProbs, ...] = ()
    ) -> None:
        """Take the prompt's tokens, and the natural logarithms of their probabilities from the second token on, and the
        likeliest tokens at their places, where they are asked for. The next piece has them. Call it before the first
        token, for a request that asks for them."""
        self._prompt = token_ids, log_probs, tops

    def extend(
        self,
        token_id: int,
        log_prob: float = 0.0,
        top: TopLogProbs = (),
        routing: TokenRouting = (),
        *,
        is_last: bool = False,
    ) -> Piece | None:
        """Take a token, its log-probability, those of the likeliest tokens at its place, and its experts. Returns a
        piece if there is text to send or the answer ends. `is_last`: a guide lets nothing follow."""
        if token_id in self.plan.end_ids:
            return self.end(token_id, log_prob, top, routing)
        self._take(token_id, log_prob, top, routing)
        text, stopped = self._add_text(self._detokenizer.push(token_id))
        met = self._stop_tokens.push(token_id)
        met = met or is_last
        self._complete = met or self._num_tokens == self.plan.most_tokens
        if stopped:
            return self._piece(text, "stop")
        if self._complete:
            return self._last_piece(text, "stop" if met else "length")
        return self._piece(text, None) if text else None

    def end(self, end_id: int, log_prob: float = 0.0, top: TopLogProbs = (), routing: TokenRouting = ()) -> Piece:
        """Take an end token, which adds no text. Returns the last piece."""
        self._take(end_id, log_prob, top, routing)
        self._complete = True
        return self._last_piece("", "stop")

    def end_at_limit(self) -> Piece:
        """The last piece of an answer that its engine ended before `most_tokens`, at a limit of its own."""
        self._complete = True
        return self._last_piece("", "length")

    def cancel(self) -> Piece:
        """The last piece of an answer that nobody waits for."""
        return self._piece("", "cancelled")

    def would_write_bad_word(self, token_id: int) -> bool:
        """Whether the text would contain a bad word after `token_id`, whatever tokens spell the word. Adds nothing."""
        return self._bad.would_match(self._detokenizer.preview(token_id))

    def _take(self, token_id: int, log_prob: float, top: TopLogProbs, routing: TokenRouting) -> None:
        self._unsent.append((token_id, log_prob, top, routing))
        self._num_tokens += 1
        self._cum_log_prob += log_prob

    def _last_piece(self, text: str, finish_reason: str) -> Piece:
        """A piece of `text` and of all text that was kept back. If that holds a stop word, the finish reason is
        "stop"."""
        rest, stopped = self._add_text(self._detokenizer.flush())
        text += rest if stopped else rest + self._stop.flush()
        return self._piece(text, "stop" if stopped else finish_reason)

    def _add_text(self, text: str) -> tuple[str, bool]:
        self._bad.push(text)
        return self._stop.push(text)

    def _piece(self, text: str, finish_reason: str | None) -> Piece:
        unsent, self._unsent = self._unsent, []
        prefix, self._prefix = self._prefix, ""
        (prompt_ids, prompt_log_probs, prompt_tops), self._prompt = self._prompt, ((), (), ())
        wanted = self.plan.return_log_probs
        return Piece(
            text=prefix + text,
            token_ids=tuple(token for token, _, _, _ in unsent),
            log_probs=tuple(log_prob for _, log_prob, _, _ in unsent) if wanted else (),
            top_log_probs=tuple(top for _, _, top, _ in unsent) if self.plan.num_log_probs else (),
            routing=tuple(routing for _, _, _, routing in unsent if routing),
            num_experts=self.num_experts if unsent else None,
            prompt_token_ids=prompt_ids,
            prompt_log_probs=prompt_log_probs,
            prompt_top_log_probs=prompt_tops,
            sequence_index=self._sequence_index,
            cum_log_prob=self._cum_log_prob if wanted else None,
            finish_reason=finish_reason,
            num_input_tokens=self.plan.num_input_tokens,
            num_output_tokens=self._num_tokens,
        )
