"""Tokens of many answers in, as engines give them, each answer's pieces out.

    postprocessor = Postprocessor(tokenizer)
    postprocessor.register(key, request_id, answer_json)       # before the engine begins
    step = postprocessor.extend(key, read_tokens(tensors), is_cancelled=request.is_cancelled)
    step.piece, step.stop
    postprocessor.note_stop(request_id)                        # somebody asked the engine to end these

A response of an engine that streams is new tokens; none at all means that it has met the end token, which it does not
show (TensorRT-LLM: sampling kernels do not count it, and LlmRequest::createResult sends nothing else without a token),
or that it was stopped. One of an engine that does not stream is all tokens. It says nothing of why it ended, so that is
found here.
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
from triton_repo.contracts.ensemble import CANCELLED, TOKEN_NAMES
from triton_repo.contracts.piece import Piece, join
from triton_repo.errors import RequestError
from triton_repo.runtime.answer import Answer, AnswerPlan

# An answer whose engine fails, or ends without a token that shows it, is never completed here. Ten thousand are more
# than engines and their queues hold, and take about 50 MB; an hour is longer than a client waits for the next token.
MOST_ANSWERS = 10_000
LONGEST_SILENCE_S = 3600.0
# To ask Triton whether a request was cancelled takes as long as to write a token.
CANCELLATION_PERIOD_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One response of an engine. `log_probs` are natural logarithms, one a token, and None unless asked for, as is the
    sum over all tokens so far, the end token's included. `is_cancelled`: the engine says that it was stopped.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] | None = None
    cum_log_prob: float | None = None
    is_cancelled: bool = False


def read_tokens(tensors: Mapping[str, npt.NDArray[Any]]) -> Tokens:
    """From postprocessing's inputs: TOKENS_BATCH [1, 1, n], of which SEQUENCE_LENGTH [1, 1] count; CUM_LOG_PROBS [1, 1]
    and OUTPUT_LOG_PROBS [1, 1, m], where m is n or the number of all tokens so far. Raises RequestError.
    """
    absent = [TOKEN_NAMES[name] for name in ("output_ids", "sequence_length") if TOKEN_NAMES[name] not in tensors]
    if absent:
        raise RequestError(f"reading an engine's response: {', '.join(absent)} absent", kind="INTERNAL")
    ids = tensors[TOKEN_NAMES["output_ids"]]
    if ids.ndim != 3 or ids.shape[:2] != (1, 1):
        raise RequestError(
            f"reading an engine's response: {TOKEN_NAMES['output_ids']} has shape {list(ids.shape)}, expected "
            "[1, 1, n]; is the engine's beam width 1?",
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
    )


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one response brings: the piece to send, if any, and the name of the request that the engine must stop, ""
    where there is none."""

    piece: Piece | None = None
    stop: str = ""


@dataclass(kw_only=True)
class _State:
    request_id: str
    answer: Answer
    touched_s: float
    looked_s: float  # when it was last asked whether the request was cancelled
    kept: list[Piece] = field(default_factory=list)  # not yet sent
    ended: bool = False  # its last piece was sent, the engine's last tokens are still to come
    stopped: bool = False  # somebody asked the engine to end it

    def take(self) -> Piece:
        """What was kept, as one piece."""
        kept, self.kept = self.kept, []
        return join(kept)


class Postprocessor:
    """The answers under way, by key. `clock` gives seconds. `knows_keys`: the engine can be told by an answer's key to
    stop; one that cannot knows the client's request id alone, which several requests may bear.
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
        self._states: dict[str, _State] = {}  # the one without tokens for longest first
        self._request_ids: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._states)

    def register(self, key: str, request_id: str, answer_json: str) -> None:
        """Begin an answer, whose key no other has. Raises ValueError for another's JSON."""
        self._forget_stale()
        answer = Answer(AnswerPlan.from_json(answer_json), self._tokenizer)
        now = self._clock()
        self._states[key] = _State(request_id=request_id, answer=answer, touched_s=now, looked_s=now)
        self._request_ids[request_id] += 1

    def look(self, key: str, is_cancelled: Callable[[], bool]) -> str:
        """Whether somebody waits for an answer whose engine has nothing to say yet; the name of the request that the
        engine must stop, if nobody does."""
        state = self._states.pop(key, None)
        if state is None:
            return key if self._knows_keys else ""
        self._states[key] = state
        state.touched_s = self._clock()
        return self._stoppable(key, state) if is_cancelled() else ""

    def note_stop(self, request_id: str) -> None:
        """Remember that the engine is asked to end the requests of that id, whose end it may not explain."""
        for state in self._states.values():
            if state.request_id == request_id:
                state.stopped = True

    def extend(self, key: str, tokens: Tokens, is_cancelled: Callable[[], bool]) -> Step:
        """Take an engine's response. Raises RequestError where no answer waits for it."""
        state = self._states.pop(key, None)
        if state is None:
            raise RequestError(
                f"writing the answer {key!r}: none waits for tokens; it was silent for {LONGEST_SILENCE_S:g} s, or "
                f"{self._most_answers} others came since",
                kind="INTERNAL",
            )
        self._states[key] = state
        state.touched_s = self._clock()
        if state.ended:
            if not tokens.token_ids:
                self._forget(key)
            return Step()
        last = self._write(state, replace(tokens, is_cancelled=tokens.is_cancelled or state.stopped))
        answer = state.answer
        over = answer.is_complete or not tokens.token_ids or not answer.plan.is_watched
        if last is None and self._is_cancelled(state, is_cancelled):
            last = answer.cancel()
        if last is None:
            return Step(piece=state.take() if state.kept and answer.plan.stream else None)
        state.kept.append(last)
        state.ended = True
        stop = "" if over else self._stoppable(key, state)
        if over:
            self._forget(key)
        return Step(piece=state.take(), stop=stop)

    def abandon(self, key: str) -> str:
        """Give up an answer that cannot be written; the name of the request that the engine must stop, if any."""
        state = self._states.get(key)
        if state is None or state.ended:
            return ""
        state.ended = True
        return self._stoppable(key, state)

    def _write(self, state: _State, tokens: Tokens) -> Piece | None:
        """Take the tokens, and the end token where the engine has met it; the last piece, if any. Others are kept."""
        answer = state.answer
        wanted = answer.plan.return_log_probs
        log_probs = tokens.log_probs or ()
        if wanted and len(log_probs) != len(tokens.token_ids):
            raise RequestError(
                f"writing an answer: the engine gave {len(log_probs)} log-probabilities for {len(tokens.token_ids)} "
                "tokens",
                kind="INTERNAL",
            )
        for token_id, log_prob in zip(tokens.token_ids, log_probs if wanted else repeat(0.0), strict=False):
            piece = answer.extend(token_id, log_prob)
            if piece is not None and piece.finish_reason:
                return piece
            state.kept += [piece] if piece is not None else []
        watched = answer.plan.is_watched
        return None if watched and tokens.token_ids else _end(answer, tokens)

    def _is_cancelled(self, state: _State, is_cancelled: Callable[[], bool]) -> bool:
        """Whether nobody waits for the answer, asked now and then."""
        if state.touched_s - state.looked_s < CANCELLATION_PERIOD_S:
            return False
        state.looked_s = state.touched_s
        return is_cancelled()

    def _stoppable(self, key: str, state: _State) -> str:
        """The name by which the engine stops this request and no other, if there is one."""
        if self._knows_keys:
            return key
        return state.request_id if self._request_ids[state.request_id] == 1 else ""

    def _forget(self, key: str) -> None:
        request_id = self._states.pop(key).request_id
        self._request_ids[request_id] -= 1
        if not self._request_ids[request_id]:
            del self._request_ids[request_id]

    def _forget_stale(self) -> None:
        """Make room for one more."""
        oldest_s = self._clock() - LONGEST_SILENCE_S
        while self._states:
            key, state = next(iter(self._states.items()))
            if len(self._states) < self._most_answers and state.touched_s >= oldest_s:
                return
            self._forget(key)


def _end(answer: Answer, tokens: Tokens) -> Piece:
    """The last piece of an answer whose engine gave no token: it met the end token, whose log-probability is what the
    sum has grown by, or was stopped by another's request."""
    if tokens.is_cancelled or not answer.plan.end_ids:
        return answer.cancel()
    grown = 0.0 if tokens.cum_log_prob is None else tokens.cum_log_prob - answer.cum_log_prob
    return answer.end(answer.plan.end_ids[0], min(0.0, grown))
