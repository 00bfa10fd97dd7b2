"""A model on TensorRT-LLM's LLM API: tensors of a request in, tensors of the responses out.

    service = LlmService(llm, SamplingParams, tokenizer, settings)
    async for response in service.respond(tensors, request_id, is_cancelled):
        response.outputs["text_output"], response.is_last

A request has the tensors of contracts/wire.py or those of contracts/llmapi.py, and its responses have the same kind.
The LLM takes token ids and gives token ids. Text is encoded and decoded here, so that prompts, characters, stop words
and end tokens are treated as with every other engine.

Names of the library are those of tensorrt_llm/llmapi/llm.py (LLM.generate_async) and tensorrt_llm/executor/result.py
(GenerationResult, CompletionOutput) of 1.2.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from export.tokenizer.loading import Tokenizer
from triton_repo.contracts.llmapi_settings import LlmSettings
from triton_repo.contracts.piece import Piece, join
from triton_repo.errors import RequestError
from triton_repo.runtime.answer import Answer, answer_plan
from triton_repo.runtime.guided.tensorrt_llm import check_plan, llm_fields
from triton_repo.runtime.llmapi.request import PERF_METRICS, Tensors, read_request, sampling_fields
from triton_repo.runtime.llmapi.response import Response, Writer, stopped_response
from triton_repo.runtime.options import GenerationPlan, plan_generation
from triton_repo.runtime.stop_requests import asks_to_stop, check_stop_id
from triton_repo.runtime.text.prompt import most_bytes


@dataclass(eq=False)
class _Run:
    """A request in progress."""

    is_stopped: bool = False  # another request asked to end it
    output: Any = None  # the LLM's latest output
    num_taken: int = 0  # tokens of the output that were taken


class LlmService:
    """An LLM that answers any number of requests at the same time, all in one event loop. `guided_params` is the
    library's GuidedDecodingParams where the LLM was started with guided decoding."""

    def __init__(
        self,
        llm: Any,  # noqa: ANN401 - tensorrt_llm.LLM
        sampling_params: Callable[..., Any],
        tokenizer: Tokenizer,
        settings: LlmSettings,
        guided_params: Callable[..., Any] | None = None,
    ) -> None:
        self._llm, self._guided_params = llm, guided_params
        self._sampling_params = sampling_params
        self._tokenizer = tokenizer
        self._text = settings.text
        self._most_prompt_bytes = most_bytes(tokenizer, settings.text.max_sequence - 1)
        self._period_s = settings.triton.cancellation_check_period_ms / 1000
        self._runs: defaultdict[str, set[_Run]] = defaultdict(set)

    async def respond(
        self, tensors: Tensors, request_id: str, is_cancelled: Callable[[], bool]
    ) -> AsyncIterator[Response]:
        """The responses to one request; the last has `is_last`. Raises RequestError for a request that cannot be
        answered, and what the LLM raises.
        """
        if asks_to_stop(tensors):
            check_stop_id(request_id)
            self._stop(request_id)
            yield stopped_response()
            return
        request = read_request(tensors, self._most_prompt_bytes)
        plan = plan_generation(
            request.options,
            self._tokenizer,
            max_sequence=self._text.max_sequence,
            end_token_ids=self._text.end_token_ids,
        )
        fields = sampling_fields(plan, self._text.end_token_ids, penalties=self._text.penalties)
        check_plan(plan, self._text.end_token_ids, served=self._guided_params is not None)
        if self._guided_params is not None and (guide_type := plan.options.guided_decoding_guide_type):
            guide = llm_fields(guide_type, plan.options.guided_decoding_guide)
            fields["guided_decoding"] = self._guided_params(**guide)
        if PERF_METRICS in (request.wanted or ()):
            fields["return_perf_metrics"] = True
        writer = Writer(request, self._tokenizer, plan)
        with self._running(request_id) as run:
            kept = []
            async with aclosing(self._pieces(plan, fields, run, is_cancelled)) as pieces:
                async for piece in pieces:
                    if plan.options.stream:
                        yield writer.response(piece, run.output)
                    else:
                        kept.append(piece)
            if kept:
                yield writer.response(join(kept), run.output)

    @contextmanager
    def _running(self, request_id: str) -> Iterator[_Run]:
        """Register a request, so that other requests can end it by its id while the block lasts."""
        run = _Run()
        self._runs[request_id].add(run)
        try:
            yield run
        finally:
            self._runs[request_id].discard(run)
            if not self._runs[request_id]:
                del self._runs[request_id]

    def _stop(self, request_id: str) -> None:
        """End the requests with the id."""
        for run in self._runs.get(request_id, ()):
            run.is_stopped = True

    async def _pieces(
        self, plan: GenerationPlan, fields: Mapping[str, Any], run: _Run, is_cancelled: Callable[[], bool]
    ) -> AsyncGenerator[Piece, None]:
        """The LLM's tokens as pieces. If the answer ends before the LLM does, the LLM is told to abort."""
        answer = Answer(answer_plan(plan, self._tokenizer), self._tokenizer)
        # A stop word in the text can end the LLM's work only if the tokens come one by one.
        streaming = plan.options.stream or bool(plan.options.stop_words)
        try:
            parameters = self._sampling_params(**fields)
            result = self._llm.generate_async(list(plan.prompt_ids), parameters, streaming=streaming)
        except ValueError as error:  # the LLM checks its arguments
            raise RequestError(f"reading the request: TensorRT-LLM refuses it: {error}") from error
        finished = False
        try:
            async with aclosing(_steps(result, self._period_s, lambda: run.is_stopped or is_cancelled())) as steps:
                async for is_alive in steps:
                    if not is_alive:
                        yield answer.cancel()
                        return
                    finished = bool(result.finished)
                    for piece in _take(answer, run, result.outputs[0], finished=finished):
                        yield piece
                        if piece.finish_reason:
                            return
            raise RequestError("answering the request: TensorRT-LLM's output did not end", kind="INTERNAL")
        finally:
            if not finished:
                result.abort()


async def _steps(result: Any, period_s: float, is_cancelled: Callable[[], bool]) -> AsyncGenerator[bool, None]:  # noqa: ANN401
    """Yields True whenever the result has grown. If the request is cancelled, which is checked every period, yields
    False and ends."""
    iterator, ended = aiter(result), object()
    due_s = time.monotonic() + period_s
    step: asyncio.Future[Any] | None = None
    while True:
        step = step or asyncio.ensure_future(anext(iterator, ended))
        await asyncio.wait({step}, timeout=max(0.0, due_s - time.monotonic()))
        if time.monotonic() >= due_s:
            due_s = time.monotonic() + period_s
            if is_cancelled():
                step.cancel()
                yield False
                return
        if step.done():
            if step.result() is ended:
                return
            step = None
            yield True


def _take(answer: Answer, run: _Run, output: Any, *, finished: bool) -> Iterator[Piece]:  # noqa: ANN401
    """The pieces of the tokens that a step added to a CompletionOutput. If the LLM has finished, the last piece ends
    the answer."""
    run.output = output
    wanted = answer.plan.return_log_probs
    for place in range(run.num_taken, len(output.token_ids)):
        token = output.token_ids[place]
        piece = answer.extend(token, _log_prob(output.logprobs, place, token) if wanted else 0.0)
        run.num_taken += 1
        if piece is not None:
            yield piece
            if piece.finish_reason:
                return
    if finished:
        yield _ended(answer, output)


def _log_prob(log_probs: Any, place: int, token: int) -> float:  # noqa: ANN401 - list[dict[int, Logprob]] or list[float]
    """The log-probability of a token. Raises RequestError if the LLM did not give it."""
    found = log_probs[place] if place < len(log_probs) else {}
    if isinstance(found, float):
        return found
    if token not in found:
        raise RequestError(
            f"answering the request: TensorRT-LLM gave no log-probability of the token {token}; its sampler gives "
            "only those of the likeliest tokens: ask for them without a temperature",
            kind="INTERNAL",
        )
    return float(found[token].logprob)


def _ended(answer: Answer, output: Any) -> Piece:  # noqa: ANN401
    """The last piece if the LLM finished for a reason that its tokens do not show: an end token that it did not send, a
    limit of its own, or an abort.
    """
    if output.finish_reason == "length":
        return answer.end_at_limit()
    end_ids = (output.stop_reason,) if isinstance(output.stop_reason, int) else answer.plan.end_ids
    if output.finish_reason != "stop" or not end_ids:
        return answer.cancel()
    return answer.end(end_ids[0])
