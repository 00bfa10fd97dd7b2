"""The last step of an ensemble: turns the engine's tokens, of many answers at a time, into pieces of the answers.

    postprocessor = Postprocessor(tokenizer)
    postprocessor.register(key, request_id, answer_json)       # before the engine begins
    step = postprocessor.extend(key, read_tokens(tensors), is_cancelled=request.is_cancelled)
    step.piece, step.stop
    postprocessor.note_stop(request_id)                        # the engine was asked to end the requests of this id

A response of a streaming engine holds the new tokens. A response without tokens means that the engine met the end
token, or that it was stopped. The end token itself is not in a response (TensorRT-LLM: sampling kernels do not count
it, and LlmRequest::createResult sends nothing else without a token). A response of an engine that does not stream holds
all tokens. Engines do not say why they ended, so the finish reason is found here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

import numpy.typing as npt

from export.tokenizer.loading import Tokenizer
from triton_repo.contracts.ensemble import ADDED_TOKEN_NAMES, CANCELLED, TOKEN_NAMES
from triton_repo.contracts.piece import Piece, TokenRouting, join
from triton_repo.errors import RequestError
from triton_repo.runtime.answer import Answer, AnswerPlan, TopLogProbs

# An answer is never completed here if its engine fails. So answers are forgotten: if there are more than ten thousand,
# which is more than engines and their queues hold and takes about 50 MB, and after an hour without tokens.
MOST_ANSWERS = 10_000
LONGEST_SILENCE_S = 3600.0
# Asking Triton whether a request was cancelled takes as long as writing a token, so it is not asked at every token.
CANCELLATION_PERIOD_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One response of an engine. Log-probabilities are natural logarithms, and None unless asked for."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] | None = None  # one for each token
    cum_log_prob: float | None = None  # sum over all tokens so far, including the end token
    is_cancelled: bool = False  # the engine says that it was stopped
    is_complete: bool = False  # a guide lets nothing follow
    # The likeliest tokens at the place of each token, and of an end token behind them; empty unless asked for.
    tops: tuple[TopLogProbs, ...] = ()
    sequence_index: int = 0  # which of the answers to the prompt
    # The prompt's tokens, and the log-probabilities of those from the second on; in the first response only.
    prompt_token_ids: tuple[int, ...] = ()
    prompt_log_probs: tuple[float, ...] = ()
    prompt_tops: tuple[TopLogProbs, ...] = ()  # at the same places; empty unless asked for
    routing: tuple[TokenRouting, ...] = ()  # of each token, and of an end token behind them; empty unless asked for
    num_experts: int | None = None


def read_tokens(tensors: Mapping[str, npt.NDArray[Any]]) -> Tokens:
    """The engine's response in postprocessing's inputs: TOKENS_BATCH [1, 1, n], SEQUENCE_LENGTH [1, 1] (how many of the
    n are valid), CUM_LOG_PROBS [1, 1] and OUTPUT_LOG_PROBS [1, 1, m], where m is n or the number of all tokens so far.
    TOP_TOKEN_IDS and TOP_LOG_PROBS are [1, t, k] for t tokens, an end token included, PROMPT_TOKEN_IDS [1, p],
    PROMPT_LOG_PROBS [1, p - 1], PROMPT_TOP_TOKEN_IDS and PROMPT_TOP_LOG_PROBS [1, p - 1, k], SEQUENCE_INDEX [1, 1],
    ROUTED_EXPERTS and EXPERT_WEIGHTS [1, t, m, k] and NUM_EXPERTS [1, 1]. Raises RequestError.
    """
    absent = [TOKEN_NAMES[name] for name in ("output_ids", "sequence_length") if TOKEN_NAMES[name] not in tensors]
    if absent:
        raise RequestError(f"reading an engine's response: {', '.join(absent)} absent", kind="INTERNAL")
    ids = tensors[TOKEN_NAMES["output_ids"]]
    if ids.ndim != 3 or ids.shape[:2] != (1, 1):
        raise RequestError(
            f"reading an engine's response: {TOKEN_NAMES['output_ids']} has shape {list(ids.shape)}, expected "
            "[1, 1, n]; build the engine with beam width 1",
            kind="INTERNAL",
        )
    count = int(tensors[TOKEN_NAMES["sequence_length"]].reshape(-1)[0])
    log_probs, cum = (tensors.get(TOKEN_NAMES[name]) for name in ("output_log_probs", "cum_log_probs"))
    values = None if log_probs is None else log_probs.reshape(-1)
    return Tokens(
        token_ids=tuple(ids[0, 0, :count].tolist()),
        log_probs=None if values is None else tuple(values[max(0, len(values) - count) :].tolist()),
        cum_log_prob=None if cum is None or not cum.size else float(cum.reshape(-1)[0]),
        is_cancelled=CANCELLED.name in tensors and bool(tensors[CANCELLED.name].any()),
        is_complete=any(_list(tensors, "is_complete")),
        tops=_read_tops(tensors, "top"),
        sequence_index=next(iter(_list(tensors, "sequence_index")), 0),
        prompt_token_ids=tuple(_list(tensors, "prompt_token_ids")),
        prompt_log_probs=tuple(_list(tensors, "prompt_log_probs")),
        prompt_tops=_read_tops(tensors, "prompt_top"),
        routing=_read_routing(tensors),
        num_experts=next(iter(_list(tensors, "num_experts")), None),
    )


def _list(tensors: Mapping[str, npt.NDArray[Any]], engine_name: str) -> list[Any]:
    """The values of a tensor that only engines on ONNX Runtime send; none if it is absent."""
    name = ADDED_TOKEN_NAMES[engine_name]
    return tensors[name].reshape(-1).tolist() if name in tensors else []


def _read_tops(tensors: Mapping[str, npt.NDArray[Any]], prefix: str) -> tuple[TopLogProbs, ...]:
    names = (f"{prefix}_token_ids", f"{prefix}_log_probs")
    ids, values = (tensors.get(ADDED_TOKEN_NAMES[name]) for name in names)
    if ids is None or values is None:
        return ()
    pairs = zip(ids[0].tolist(), values[0].tolist(), strict=True)
    return tuple(tuple(zip(of_ids, of_values, strict=True)) for of_ids, of_values in pairs)


def _read_routing(tensors: Mapping[str, npt.NDArray[Any]]) -> tuple[TokenRouting, ...]:
    experts, weights = (tensors.get(ADDED_TOKEN_NAMES[name]) for name in ("routed_experts", "expert_weights"))
    if experts is None or weights is None:
        return ()
    pairs = zip(experts[0].tolist(), weights[0].tolist(), strict=True)
    return tuple(tuple(tuple(zip(*layer, strict=True)) for layer in zip(*both, strict=True)) for both in pairs)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What follows from one response of the engine."""

    piece: Piece | None = None  # the piece to send, if any
    stop: str = ""  # name of the request that the engine must stop; "" for none


@dataclass(kw_only=True)
class _Sequence:
    """One of the answers to a prompt."""

    answer: Answer
    kept: list[Piece] = field(default_factory=list)  # pieces that were not sent yet
    num_tokens: int = 0  # that the engine sent
    ended: bool = False  # the last piece was sent, but the engine may not have ended yet
    is_over: bool = False  # the engine has ended too

    def take(self) -> Piece:
        """The kept pieces as one piece."""
        kept, self.kept = self.kept, []
        return join(kept)


@dataclass(kw_only=True)
class _State:
    request_id: str
    sequences: tuple[_Sequence, ...]
    touched_s: float
    looked_s: float  # when Triton was last asked whether the request was cancelled
    stopped: bool = False  # a client asked the engine to end the request

    @property
    def has_ended(self) -> bool:
        """Whether the last piece of every answer was sent."""
        return all(sequence.ended for sequence in self.sequences)


class Postprocessor:
    """The answers in progress, by key. `clock` gives seconds. `knows_keys`: the engine can be told to stop by the key
    of an answer. An engine that cannot knows only the client's request id, which several requests may have.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        knows_keys: bool = True,
        clock: Callable[[], float] = time.monotonic,
        most_answers: int = MOST_ANSWERS,
    ) -> None:
        self._tokenizer = tokenizer
        self._knows_keys = knows_keys
        self._clock = clock
        self._most_answers = most_answers
        self._states: dict[str, _State] = {}  # in the order of their latest response, the oldest first
        self._request_ids: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._states)

    def register(self, key: str, request_id: str, answer_json: str) -> None:
        """Begin the answer to a prompt, or several. The key must be unique. Raises ValueError for JSON that is no
        AnswerPlan."""
        self._forget_stale()
        plan = AnswerPlan.from_json(answer_json)
        sequences = tuple(
            _Sequence(answer=Answer(plan, self._tokenizer, sequence_index=index)) for index in range(plan.num_sequences)
        )
        now = self._clock()
        self._states[key] = _State(request_id=request_id, sequences=sequences, touched_s=now, looked_s=now)
        self._request_ids[request_id] += 1

    def look(self, key: str, is_cancelled: Callable[[], bool]) -> str:
        """Check whether the client still waits for an answer, while its engine has no tokens to send. Returns the name
        of the request that the engine must stop; "" if the client waits."""
        state = self._states.pop(key, None)
        if state is None:
            return key if self._knows_keys else ""
        self._states[key] = state
        state.touched_s = self._clock()
        return self._stoppable(key, state) if is_cancelled() else ""

    def note_stop(self, request_id: str) -> None:
        """Remember that the engine is asked to end the requests with that id, since it may not say why they ended."""
        for state in self._states.values():
            if state.request_id == request_id:
                state.stopped = True

    def extend(self, key: str, tokens: Tokens, is_cancelled: Callable[[], bool]) -> Step:
        """Take a response of the engine. Raises RequestError if no answer waits for it.

        An engine ends the sequences of one request together, so it is stopped when all of them have ended, or when
        their client has gone.
        """
        state = self._states.pop(key, None)
        if state is None:
            raise RequestError(
                f"writing the answer {key!r}: no such answer waits for tokens; it got none for {LONGEST_SILENCE_S:g} "
                f"s, or {self._most_answers} others began since",
                kind="INTERNAL",
            )
        self._states[key] = state
        state.touched_s = self._clock()
        if tokens.sequence_index >= len(state.sequences):
            raise RequestError(
                f"writing the answer {key!r}: found tokens of sequence {tokens.sequence_index}, expected one below "
                f"{len(state.sequences)}",
                kind="INTERNAL",
            )
        sequence = state.sequences[tokens.sequence_index]
        answer = sequence.answer
        sequence.num_tokens += len(tokens.token_ids)
        if sequence.ended:
            sequence.is_over |= (
                not tokens.token_ids or tokens.is_complete or sequence.num_tokens >= answer.plan.most_tokens
            )
            self._forget_if_over(key, state)
            return Step()
        last = self._write(sequence, replace(tokens, is_cancelled=tokens.is_cancelled or state.stopped))
        is_over = answer.is_complete or not tokens.token_ids or not answer.plan.is_watched
        has_gone = last is None and self._is_cancelled(state, is_cancelled)
        if has_gone:
            last = answer.cancel()
        if last is None:
            return Step(piece=sequence.take() if sequence.kept and answer.plan.stream else None)
        sequence.kept.append(last)
        sequence.ended, sequence.is_over = True, is_over
        self._forget_if_over(key, state)
        must_stop = key in self._states and (state.has_ended or has_gone)
        return Step(piece=sequence.take(), stop=self._stoppable(key, state) if must_stop else "")

    def abandon(self, key: str) -> str:
        """Give up an answer that cannot be written. Returns the name of the request that the engine must stop, or
        ""."""
        state = self._states.get(key)
        if state is None or state.has_ended:
            return ""
        for sequence in state.sequences:
            sequence.ended = True
        return self._stoppable(key, state)

    def _write(self, sequence: _Sequence, tokens: Tokens) -> Piece | None:
        """Take the tokens, and the end token if the engine met it. Returns the last piece, if there is one; other
        pieces are kept."""
        answer = sequence.answer
        if tokens.prompt_token_ids:
            answer.give_prompt(tokens.prompt_token_ids, tokens.prompt_log_probs, tokens.prompt_tops)
        wanted = answer.plan.return_log_probs
        log_probs = tokens.log_probs or ()
        if wanted and len(log_probs) != len(tokens.token_ids):
            raise RequestError(
                f"writing an answer: the engine gave {len(log_probs)} log-probabilities for {len(tokens.token_ids)} "
                "tokens",
                kind="INTERNAL",
            )
        answer.num_experts = answer.num_experts or tokens.num_experts
        values = log_probs if wanted else repeat(0.0)
        tops, routing = tokens.tops or repeat(()), tokens.routing or repeat(())
        lefts = range(len(tokens.token_ids) - 1, -1, -1)
        for token_id, value, top, routed, left in zip(tokens.token_ids, values, tops, routing, lefts, strict=False):
            piece = answer.extend(token_id, value, top, routed, is_last=tokens.is_complete and not left)
            if piece is not None and piece.finish_reason:
                return piece
            sequence.kept += [piece] if piece is not None else []
        watched = answer.plan.is_watched
        return None if watched and tokens.token_ids else _end(answer, tokens)

    def _is_cancelled(self, state: _State, is_cancelled: Callable[[], bool]) -> bool:
        """Whether the client has gone. Triton is asked only every CANCELLATION_PERIOD_S."""
        if state.touched_s - state.looked_s < CANCELLATION_PERIOD_S:
            return False
        state.looked_s = state.touched_s
        return is_cancelled()

    def _stoppable(self, key: str, state: _State) -> str:
        """The name by which the engine can stop this request and no other; "" if there is none."""
        if self._knows_keys:
            return key
        return state.request_id if self._request_ids[state.request_id] == 1 else ""

    def _forget_if_over(self, key: str, state: _State) -> None:
        if all(sequence.is_over for sequence in state.sequences):
            self._forget(key)

    def _forget(self, key: str) -> None:
        request_id = self._states.pop(key).request_id
        self._request_ids[request_id] -= 1
        if not self._request_ids[request_id]:
            del self._request_ids[request_id]

    def _forget_stale(self) -> None:
        """Forget old answers, until there is room for one more."""
        oldest_s = self._clock() - LONGEST_SILENCE_S
        while self._states:
            key, state = next(iter(self._states.items()))
            if len(self._states) < self._most_answers and state.touched_s >= oldest_s:
                return
            self._forget(key)


def _end(answer: Answer, tokens: Tokens) -> Piece:
    """The last piece of an answer whose engine sent no token. Either the engine was stopped, or it met the end token,
    whose log-probability is the growth of the sum."""
    if tokens.is_cancelled or not answer.plan.end_ids:
        return answer.cancel()
    grown = 0.0 if tokens.cum_log_prob is None else tokens.cum_log_prob - answer.cum_log_prob
    count = len(tokens.token_ids)
    top = tokens.tops[-1] if len(tokens.tops) > count else ()
    routing = tokens.routing[-1] if len(tokens.routing) > count else ()
    return answer.end(answer.plan.end_ids[0], min(0.0, grown), top, routing)
