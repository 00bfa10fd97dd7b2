"""An engine on ONNX Runtime with the tensors of TensorRT-LLM's model `tensorrt_llm`: token ids in, new token ids out.

    engine = TokenEngine.open(folder, threads=None, workers=1)
    engine.submit(Request(request_id="7", tensors={"input_ids": ...}, send=..., fail=..., is_cancelled=...))
    engine.workers.stop("7")

Responses are as the C++ backend sends them (triton_backend/inflight_batcher_llm/src/model_instance_state.cc and
cpp/tensorrt_llm/batch_manager/llmRequest.cpp upstream). A request that streams gets one response for each token, with
the log-probabilities of all tokens so far; another request gets one response. The tokens of stop words are sent, the
end token is not: an answer that ends with it, or that is stopped, ends with a response without tokens. A request with
the key of its answer gets the key back with each response, and `is_cancelled`.

A request with a key is a step of an ensemble. Triton 2.51 looks whether the client has gone only when it makes the
request of a step (triton-inference-server/core, src/ensemble_scheduler/ensemble_scheduler.cc). The request of this step
lasts as long as the answer, so this step is never told. While it has no tokens to send it therefore sends a probe now
and then: a response without tokens, for which Triton makes a request to the next step. The next step is told that the
client has gone, and has this one stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from triton_repo.contracts.ensemble import ENGINE_CANCELLED, ENGINE_KEY_INPUT, ENGINE_KEY_OUTPUT, ENGINE_PROBE
from triton_repo.runtime.answer import TopLogProbs
from triton_repo.runtime.generation import feed
from triton_repo.runtime.sampling import Choice, Sampler
from triton_repo.runtime.seats import Seat, open_sessions, seat
from triton_repo.runtime.steps.answer_keys import key_tensor, read_key
from triton_repo.runtime.steps.token_request import TokenRequest, read_token_request
from triton_repo.runtime.text.stopping import TokenWatcher
from triton_repo.runtime.workers import Job, Outlet, Pulse, Workers
from trt_build.ort.session import Session

if TYPE_CHECKING:
    from trt_build.ort.session import Cache

Tensors = dict[str, npt.NDArray[Any]]
PROBE_INTERVAL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request. Any thread may call its functions."""

    request_id: str
    tensors: Mapping[str, npt.NDArray[Any]]
    send: Callable[[Tensors, bool], None]  # takes the tensors of a response and whether it is the last
    fail: Callable[[Exception], None]  # takes the error that ends the request
    is_cancelled: Callable[[], bool]


class TokenEngine:
    """An engine and its workers. Each worker has its own cache; requests wait in a queue for a free worker."""

    def __init__(self, sessions: Sequence[Session], pulse: Pulse | None = None) -> None:
        self._max_sequence = sessions[0].max_sequence
        manifest = sessions[0].engine.manifest
        self._num_tokens, self._end_token_ids = manifest.tokenizer_size, manifest.eos_token_ids
        self.workers: Workers[Seat] = Workers([seat(session) for session in sessions], pulse)

    @classmethod
    def open(
        cls, folder: Path, threads: int | None, workers: int, device_index: int = 0, pulse: Pulse | None = None
    ) -> TokenEngine:
        """Load the engine (`open_sessions`). Raises EngineError, MissingPackageError."""
        return cls(open_sessions(folder, threads, workers, device_index), pulse)

    def submit(self, request: Request) -> None:
        """Check a request and have a worker answer it. A request that cannot be answered fails at once, even if all
        workers are busy. Use `workers.stop` and `stopped_response` for a request to stop others."""
        key = read_key(request.tensors, ENGINE_KEY_INPUT.name)
        tensors = {name: tensor for name, tensor in request.tensors.items() if name != ENGINE_KEY_INPUT.name}
        try:
            asked = read_token_request(tensors, self._max_sequence, self._num_tokens, self._end_token_ids)
        except Exception as error:  # whatever it is, the client is told
            request.fail(error)
            return
        self.workers.submit(
            Job(
                names=frozenset({request.request_id, key or ""} - {""}),
                respond=lambda used, is_over: respond(used.session, asked, is_over, used.cache),
                withdrawn=lambda: _Progress(request=asked).take(is_cancelled=True),
                outlet=_outlet(request, key),
            )
        )


def _outlet(request: Request, key: str | None) -> Outlet[Tensors]:
    """The outlet of a request's responses. If the request has a key, it also sends the probes."""
    sent_s = time.monotonic()

    def send(tensors: Tensors, is_last: bool) -> None:
        nonlocal sent_s
        sent_s = time.monotonic()
        request.send(_with_key(tensors, key), is_last)

    def is_cancelled() -> bool:
        if key is not None and time.monotonic() - sent_s >= PROBE_INTERVAL_S:
            send({ENGINE_PROBE.name: np.ones((1, 1), dtype=np.bool_)}, False)
        return request.is_cancelled()

    return Outlet(send, request.fail, is_cancelled)


def stopped_response(tensors: Mapping[str, npt.NDArray[Any]]) -> Tensors | None:
    """The response to a request to stop others: one without tokens if it has a key. Without a key there is no response,
    as from the C++ backend."""
    key = read_key(tensors, ENGINE_KEY_INPUT.name)
    if key is None:
        return None
    nothing = {
        "output_ids": np.zeros((1, 1, 0), dtype=np.int32),
        "sequence_length": np.zeros((1, 1), dtype=np.int32),
        ENGINE_CANCELLED.name: np.ones((1, 1), dtype=np.bool_),
    }
    return _with_key(nothing, key)


def _with_key(tensors: Tensors, key: str | None) -> Tensors:
    """The tensors of a response to a request. Only a request with a key gets tensors that upstream does not have."""
    if key is None:
        return {name: tensor for name, tensor in tensors.items() if name != ENGINE_CANCELLED.name}
    return {**tensors, ENGINE_KEY_OUTPUT.name: key_tensor(key)}


@dataclass(kw_only=True)
class _Progress:
    """The tokens chosen so far for one request. The end token counts only in the sum of log-probabilities. `num_sent`
    tokens were sent."""

    request: TokenRequest
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    unsent_tops: list[TopLogProbs] = field(default_factory=list)  # an end token's too
    cum_log_prob: float = 0.0
    num_sent: int = 0

    def add(self, choice: Choice, *, shown: bool) -> None:
        self.cum_log_prob += choice.log_prob or 0.0
        if choice.top_log_probs:
            self.unsent_tops.append(choice.top_log_probs)
        if shown:
            self.token_ids.append(choice.token_id)
            self.log_probs.append(choice.log_prob or 0.0)

    def take(self, *, is_cancelled: bool = False) -> Tensors:
        """A response with the tokens that were not sent yet."""
        request = self.request
        new = self.token_ids[self.num_sent :]
        self.num_sent = len(self.token_ids)
        echo = request.plan.prompt_ids if request.echo and not request.streaming else ()
        tensors: Tensors = {
            "output_ids": np.array([[[*echo, *new]]], dtype=np.int32),
            "sequence_length": np.array([[len(echo) + len(new)]], dtype=np.int32),
            ENGINE_CANCELLED.name: np.array([[is_cancelled]], dtype=np.bool_),
        }
        if request.plan.options.return_log_probs:
            tensors["cum_log_probs"] = np.array([[self.cum_log_prob]], dtype=np.float32)
            tensors["output_log_probs"] = np.array([[self.log_probs]], dtype=np.float32)
        if self.unsent_tops:
            tops, self.unsent_tops = self.unsent_tops, []
            tensors["top_token_ids"] = np.array([[[token for token, _ in top] for top in tops]], dtype=np.int32)
            tensors["top_log_probs"] = np.array([[[value for _, value in top] for top in tops]], dtype=np.float32)
        if request.count_input_tokens:
            tensors["num_input_tokens"] = np.array([[len(request.plan.prompt_ids)]], dtype=np.int32)
        if request.count_output_tokens:
            tensors["num_output_tokens"] = np.array([[len(new)]], dtype=np.int32)
        return tensors


def respond(
    session: Session, request: TokenRequest, is_cancelled: Callable[[], bool], cache: Cache
) -> Iterator[tuple[Tensors, bool]]:
    """The responses to a request, each with whether it is the last. Raises RequestError for logits that are NaN or
    infinite."""
    cache.reset()
    plan, progress = request.plan, _Progress(request=request)
    stop_words, bad_words = TokenWatcher(request.stop_words), TokenWatcher(request.bad_words)
    sampler = Sampler(plan, session.engine.manifest.tokenizer_size, banned=bad_words.completing)
    pending: Sequence[int] = plan.prompt_ids
    while True:
        logits = feed(session, cache, pending, is_cancelled)
        if logits is None:
            yield progress.take(is_cancelled=True), True
            return
        choice = sampler.choose(logits)
        ended = choice.token_id == request.end_id
        progress.add(choice, shown=not ended)
        bad_words.push(choice.token_id)
        ended = stop_words.push(choice.token_id) or ended or len(progress.token_ids) == request.most_tokens
        if request.streaming or ended:
            yield progress.take(), ended
        if ended:
            return
        pending = [choice.token_id]
