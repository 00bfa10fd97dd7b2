"""A loaded engine that answers wire requests: tensors in, pieces out. Each worker answers one request at a time.

service = Service.open(engine_folder, threads=None)
service.submit(Request(tensors={"text_input": ..., "max_tokens": ...}, request_id="7", send=..., ...))
service.workers.stop("7")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from export.tokenizer.loading import Tokenizer, load_tokenizer
from triton_repo.contracts.piece import Piece, join
from triton_repo.runtime.answer import Answer, answer_plan
from triton_repo.runtime.features import PROMPT_LOG_PROBS, SEVERAL_SEQUENCES, refuse_features
from triton_repo.runtime.generation import pieces_of
from triton_repo.runtime.options import GenerationPlan, plan_generation, read_options, refusal
from triton_repo.runtime.seats import Seat, open_sessions, seat
from triton_repo.runtime.text.prompt import most_bytes
from triton_repo.runtime.workers import Job, Outlet, Pulse, Workers
from trt_build.ort.session import Session


@dataclass(frozen=True, kw_only=True)
class Request:
    """A wire request. Any thread may call its functions."""

    tensors: Mapping[str, npt.NDArray[Any]]
    request_id: str
    send: Callable[[Piece, bool], None]  # takes a piece and whether it is the last
    fail: Callable[[Exception], None]  # takes the error that ends the request
    is_cancelled: Callable[[], bool]


class Service:
    """A loaded engine, its tokenizer and its workers. If `unary`, it sends one response for each request, and refuses
    requests that ask for a stream."""

    def __init__(
        self, sessions: Sequence[Session], tokenizer: Tokenizer, pulse: Pulse | None = None, *, unary: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._unary = unary
        self._max_sequence = sessions[0].max_sequence
        self._most_prompt_bytes = most_bytes(tokenizer, self._max_sequence - 1)
        self._end_token_ids = sessions[0].engine.manifest.eos_token_ids
        self.workers: Workers[Seat] = Workers([seat(session) for session in sessions], pulse)

    @classmethod
    def open(
        cls,
        folder: Path,
        threads: int | None,
        workers: int = 1,
        device_index: int = 0,
        pulse: Pulse | None = None,
        *,
        unary: bool = False,
    ) -> Service:
        """Load the engine (`open_sessions`). Raises EngineError, CheckpointError, MissingPackageError."""
        sessions = open_sessions(folder, threads, workers, device_index)
        return cls(sessions, load_tokenizer(folder), pulse, unary=unary)

    def submit(self, request: Request) -> None:
        """Check a request and have a worker answer it: piece by piece if it streams, else by one piece. A request that
        cannot be answered fails at once, even if all workers are busy."""
        try:
            plan = self._plan(request.tensors)
        except Exception as error:  # whatever it is, the client is told
            request.fail(error)
            return

        def respond(used: Seat, is_over: Callable[[], bool]) -> Iterator[tuple[Piece, bool]]:
            pieces = pieces_of(used.session, used.cache, plan, self._tokenizer, is_over)
            for piece in pieces if plan.options.stream else iter([join(pieces)]):
                yield piece, bool(piece.finish_reason)

        self.workers.submit(
            Job(
                names=frozenset({request.request_id} - {""}),
                respond=respond,
                withdrawn=lambda: Answer(answer_plan(plan, self._tokenizer), self._tokenizer).cancel(),
                outlet=Outlet(request.send, request.fail, request.is_cancelled),
            )
        )

    def _plan(self, tensors: Mapping[str, npt.NDArray[Any]]) -> GenerationPlan:
        options = read_options(tensors, self._most_prompt_bytes)
        refuse_features(options, (PROMPT_LOG_PROBS, SEVERAL_SEQUENCES), "this model")
        if self._unary and options.stream:
            raise refusal(
                [
                    "stream: found true, expected false: this model was packaged with --unary and sends one response "
                    "for each request; leave stream out, or package the engine without --unary"
                ]
            )
        return plan_generation(
            options,
            self._tokenizer,
            max_sequence=self._max_sequence,
            end_token_ids=self._end_token_ids,
        )
