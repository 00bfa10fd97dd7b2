"""An engine on ONNX Runtime with the tensors of TensorRT-LLM's model `tensorrt_llm`: token ids in, new token ids out.

    engine = TokenEngine.open(EngineInstance(folder=folder))
    engine.submit(Request(request_id="7", tensors={"input_ids": ...}, send=..., fail=..., is_cancelled=...))
    engine.runner.stop("7")

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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from export.tokenizer.loading import load_tokenizer
from triton_repo.contracts.ensemble import ENGINE_CANCELLED, ENGINE_KEY_INPUT, ENGINE_KEY_OUTPUT, ENGINE_PROBE
from triton_repo.contracts.model_parameters import EngineInstance
from triton_repo.contracts.piece import TokenRouting
from triton_repo.runtime.answer import TopLogProbs
from triton_repo.runtime.batching.loading import Loaded, load
from triton_repo.runtime.batching.outlet import Outlet
from triton_repo.runtime.batching.runner import Pulse
from triton_repo.runtime.batching.sequence import Request as Computed
from triton_repo.runtime.features import refuse_routing
from triton_repo.runtime.guided.guides import AwaitedGuide, CompiledGuide, Guides
from triton_repo.runtime.responses import routing_outputs, top_outputs
from triton_repo.runtime.sampling import Choice, Guide, Sampler
from triton_repo.runtime.steps.answer_keys import key_tensor, read_key
from triton_repo.runtime.steps.token_request import TokenRequest, read_token_request
from triton_repo.runtime.text.stopping import TokenWatcher

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
    timeout_s: float | None = None  # how long its client waits; None says nothing


class TokenEngine:
    """An engine that computes the requests of an ensemble's third step."""

    def __init__(self, loaded: Loaded) -> None:
        self._most_tokens = loaded.most_tokens
        self._gives_routing = loaded.session.routing is not None
        manifest = loaded.session.engine.manifest
        self._num_tokens, self._end_token_ids = manifest.tokenizer_size, manifest.eos_token_ids
        self._engine_folder = loaded.session.engine.folder
        self.runner = loaded.runner

    @classmethod
    def open(cls, instance: EngineInstance, pulse: Pulse | None = None) -> TokenEngine:
        """Load the engine (`load`). Raises EngineError, MissingPackageError, RepositoryError."""
        return cls(load(instance, pulse))

    @cached_property
    def _guides(self) -> Guides:
        """The engine's folder has its tokenizer, which only guides need here."""
        return Guides(load_tokenizer(self._engine_folder))

    def submit(self, request: Request) -> None:
        """Check a request and have the engine answer it. A request that cannot be answered fails at once, whatever else
        is computed. Use `runner.stop` and `stopped_response` for a request to stop others."""
        self.runner.answer(request.request_id, partial(self._made, request), request.fail)

    def _made(self, request: Request) -> Computed[Tensors]:
        key = read_key(request.tensors, ENGINE_KEY_INPUT.name)
        tensors = {name: tensor for name, tensor in request.tensors.items() if name != ENGINE_KEY_INPUT.name}
        asked = read_token_request(tensors, self._most_tokens, self._num_tokens, self._end_token_ids)
        refuse_routing(asked.wants_routing, given=self._gives_routing)
        return token_request(
            asked,
            self._num_tokens,
            _outlet(request, key),
            names=frozenset({request.request_id, key or ""} - {""}),
            deadline_s=None if request.timeout_s is None else time.monotonic() + request.timeout_s,
            request_id=request.request_id,
            guide=self._guide(asked),
        )

    def _guide(self, asked: TokenRequest) -> Future[CompiledGuide] | None:
        """The guide of a request, if it has one, once it is compiled. Without one the tokenizer is not loaded."""
        options = asked.plan.options
        if not options.guided_decoding_guide_type:
            return None
        return self._guides.ask(options.guided_decoding_guide_type, options.guided_decoding_guide)


def token_request(
    asked: TokenRequest,
    num_tokens: int,
    outlet: Outlet[Tensors],
    names: frozenset[str] = frozenset(),
    deadline_s: float | None = None,
    request_id: str = "",
    guide: Future[CompiledGuide] | None = None,
) -> Computed[Tensors]:
    """The request of checked options, and its guide, which it awaits."""
    return Computed(
        names=names,
        prompt_ids=asked.plan.prompt_ids,
        most_tokens=asked.most_tokens,
        writers=[
            TokenWriter(
                asked, num_tokens, index, guide=None if guide is None else AwaitedGuide(guide, asked.plan.end_ids)
            )
            for index in range(asked.num_sequences)
        ],
        outlet=outlet,
        deadline_s=deadline_s,
        request_id=request_id,
        awaited=guide,
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
    """The tokens chosen so far for one sequence. The end token counts only in the sum of log-probabilities. `num_sent`
    tokens were sent."""

    request: TokenRequest
    sequence_index: int = 0
    prompt_log_probs: list[float] = field(default_factory=list)  # from the second token of the prompt on
    prompt_tops: list[TopLogProbs] = field(default_factory=list)  # at the same places, where they are asked for
    wants_prompt: bool = False  # whether the next response has the prompt
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    unsent_tops: list[TopLogProbs] = field(default_factory=list)  # an end token's too
    unsent_routing: list[TokenRouting] = field(default_factory=list)  # an end token's too
    num_experts: int | None = None
    cum_log_prob: float = 0.0
    num_sent: int = 0
    num_chosen: int = 0
    is_complete: bool = False  # a guide lets nothing follow

    def add(self, choice: Choice, *, shown: bool) -> None:
        self.num_chosen += 1
        self.cum_log_prob += choice.log_prob or 0.0
        if choice.top_log_probs:
            self.unsent_tops.append(choice.top_log_probs)
        if choice.routing:
            self.unsent_routing.append(choice.routing)
            self.num_experts = choice.num_experts
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
            "sequence_index": np.array([[self.sequence_index]], dtype=np.int32),
            ENGINE_CANCELLED.name: np.array([[is_cancelled]], dtype=np.bool_),
        }
        if self.wants_prompt and self.num_chosen:
            self.wants_prompt = False
            tensors["prompt_token_ids"] = np.array([request.plan.prompt_ids], dtype=np.int32)
            tensors["prompt_log_probs"] = np.array([self.prompt_log_probs], dtype=np.float32)
            tensors |= top_outputs(self.prompt_tops, "prompt_top") if self.prompt_tops else {}
        if request.plan.options.return_log_probs:
            tensors["cum_log_probs"] = np.array([[self.cum_log_prob]], dtype=np.float32)
            tensors["output_log_probs"] = np.array([[self.log_probs]], dtype=np.float32)
        if self.unsent_tops:
            tops, self.unsent_tops = self.unsent_tops, []
            tensors |= top_outputs(tops, "top")
        if self.unsent_routing:
            routing, self.unsent_routing = self.unsent_routing, []
            tensors |= routing_outputs(routing, self.num_experts)
        if self.is_complete:
            tensors["is_complete"] = np.ones((1, 1), dtype=np.bool_)
        if request.count_input_tokens:
            tensors["num_input_tokens"] = np.array([[len(request.plan.prompt_ids)]], dtype=np.int32)
        if request.count_output_tokens:
            tensors["num_output_tokens"] = np.array([[len(new)]], dtype=np.int32)
        return tensors


class TokenWriter:
    """Chooses the tokens of one answer and writes them as tensors (`triton_repo.runtime.batching.sequence.Writer`)."""

    def __init__(
        self, request: TokenRequest, num_tokens: int, sequence_index: int = 0, *, guide: Guide | None = None
    ) -> None:
        self._request = request
        self.num_prompt_tops = request.plan.options.num_log_probs
        self.wants_prompt, self.wants_routing = request.wants_prompt, request.wants_routing
        self._progress = _Progress(request=request, sequence_index=sequence_index, wants_prompt=request.wants_prompt)
        self._stop_words, self._bad_words = TokenWatcher(request.stop_words), TokenWatcher(request.bad_words)
        self.sampler = Sampler(
            request.plan,
            num_tokens,
            banned=self._bad_words.completing if request.bad_words else None,
            sequence_index=sequence_index,
            guide=guide,
        )

    def write(self, choice: Choice) -> tuple[Tensors | None, str]:
        """Take the next token. Returns the tensors of a response if there is one to send, and the finish reason once
        the answer has ended."""
        request, progress = self._request, self._progress
        self.wants_prompt = False
        met_end = choice.token_id == request.end_id
        progress.add(choice, shown=not met_end)
        self._bad_words.push(choice.token_id)
        progress.is_complete = self.sampler.is_complete and not met_end
        stops = self._stop_words.push(choice.token_id) or met_end or progress.is_complete
        reason = "stop" if stops else "length" if len(progress.token_ids) == request.most_tokens else ""
        return (progress.take() if request.streaming or reason else None), reason

    def cancel(self) -> Tensors:
        """The last response of an answer that nobody waits for."""
        return self._progress.take(is_cancelled=True)

    def take_prompt(self, log_probs: Sequence[float], tops: Sequence[TopLogProbs]) -> None:
        """Take the log-probabilities of some of the prompt's tokens, in their order, from the second token on, and the
        likeliest tokens at their places, where they are wanted."""
        self._progress.prompt_log_probs += log_probs
        self._progress.prompt_tops += tops
