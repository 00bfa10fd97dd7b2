"""A loaded engine that answers wire requests: tensors in, pieces out.

service = Service.open(EngineInstance(folder=engine_folder))
service.submit(Request(tensors={"text_input": ..., "max_tokens": ...}, request_id="7", send=..., ...))
service.runner.stop("7")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy.typing as npt

from export.tokenizer.loading import Tokenizer, load_tokenizer
from triton_repo.contracts.model_parameters import EngineInstance
from triton_repo.contracts.piece import Piece, join_by_answer
from triton_repo.runtime.batching.loading import Loaded, load
from triton_repo.runtime.batching.outlet import Outlet
from triton_repo.runtime.batching.runner import Pulse
from triton_repo.runtime.batching.sequence import Request as Computed
from triton_repo.runtime.features import refuse_routing
from triton_repo.runtime.guided.guides import Guides
from triton_repo.runtime.options import GenerationPlan, plan_generation, refusal
from triton_repo.runtime.request_reading import read_options
from triton_repo.runtime.single.generation import text_request
from triton_repo.runtime.text.prompt import most_bytes


@dataclass(frozen=True, kw_only=True)
class Request:
    """A wire request. Any thread may call its functions."""

    tensors: Mapping[str, npt.NDArray[Any]]
    request_id: str
    send: Callable[[Piece, bool], None]  # takes a piece and whether it is the last
    fail: Callable[[Exception], None]  # takes the error that ends the request
    is_cancelled: Callable[[], bool]
    timeout_s: float | None = None  # how long its client waits; None says nothing


class Service:
    """A loaded engine and its tokenizer. If `unary`, it sends one response for each request, and refuses requests that
    ask for a stream or for several answers."""

    def __init__(self, loaded: Loaded, tokenizer: Tokenizer, *, unary: bool = False) -> None:
        self._tokenizer, self._guides = tokenizer, Guides(tokenizer)
        self._unary = unary
        self._most_tokens = loaded.most_tokens
        self._most_prompt_bytes = most_bytes(tokenizer, self._most_tokens - 1)
        self._gives_routing = loaded.session.routing is not None
        self._end_token_ids = loaded.session.engine.manifest.eos_token_ids
        self.runner = loaded.runner

    @classmethod
    def open(cls, instance: EngineInstance, pulse: Pulse | None = None, *, unary: bool = False) -> Service:
        """Load the engine (`load`). Raises EngineError, CheckpointError, MissingPackageError, RepositoryError."""
        return cls(load(instance, pulse), load_tokenizer(instance.folder), unary=unary)

    def submit(self, request: Request) -> None:
        """Check a request and have the engine answer it: piece by piece if it streams, else by one piece for each
        answer. A request that cannot be answered fails at once, whatever else is computed."""
        self.runner.answer(request.request_id, partial(self._made, request), request.fail)

    def _made(self, request: Request) -> Computed[Piece]:
        plan = self._plan(request.tensors)
        return text_request(
            plan,
            self._tokenizer,
            Outlet(request.send, request.fail, request.is_cancelled, merge=join_by_answer),
            names=frozenset({request.request_id} - {""}),
            deadline_s=None if request.timeout_s is None else time.monotonic() + request.timeout_s,
            joined=not plan.options.stream,
            request_id=request.request_id,
            guides=self._guides,
        )

    def _plan(self, tensors: Mapping[str, npt.NDArray[Any]]) -> GenerationPlan:
        options = read_options(tensors, self._most_prompt_bytes)
        refuse_routing(options.return_routed_experts, given=self._gives_routing)
        if self._unary and options.stream:
            raise refusal(
                [
                    "stream: found true, expected false: this model was packaged with --unary and sends one response "
                    "for each request; leave stream out, or package the engine without --unary"
                ]
            )
        if self._unary and options.num_return_sequences > 1:
            raise refusal(
                [
                    f"num_return_sequences: found {options.num_return_sequences}, expected 1: this model was packaged "
                    "with --unary and sends one response for each request; package the engine without --unary"
                ]
            )
        return plan_generation(
            options,
            self._tokenizer,
            max_sequence=self._most_tokens,
            end_token_ids=self._end_token_ids,
        )
