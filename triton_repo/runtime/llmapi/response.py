"""Turns pieces of an answer into responses of a model on TensorRT-LLM's LLM API, with the tensors of the request's
kind.

With the LLM API's tensors each response holds all of the text so far, as upstream's model sends it. With the wire's
tensors it holds the text that is new.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from export.tokenizer.loading import Tokenizer
from triton_repo.contracts.llmapi import METRIC_PATHS, METRICS
from triton_repo.contracts.piece import Piece
from triton_repo.contracts.wire import NUMPY_DTYPES
from triton_repo.runtime.llmapi.request import FINISH_REASON, LOGPROB, PERF_METRICS, STOP_REASON, LlmRequest, Tensors
from triton_repo.runtime.options import GenerationPlan
from triton_repo.runtime.responses import wire_outputs
from triton_repo.runtime.text.detokenizer import last_text_token

_METRIC_DTYPES = {tensor.name: NUMPY_DTYPES[tensor.dtype] for tensor in METRICS}


@dataclass(frozen=True, kw_only=True)
class Response:
    """The tensors of one response, and how many tokens the answer has so far."""

    outputs: Tensors
    is_last: bool
    finish_reason: str | None
    num_output_tokens: int | None


def stopped_response() -> Response:
    """The response to a request that only stops others."""
    outputs = {"text_output": _text(""), "finish_reason": _text("cancelled")}
    return Response(outputs=outputs, is_last=True, finish_reason="cancelled", num_output_tokens=0)


class Writer:
    """Turns the pieces of one answer into tensors of the kind that the request has."""

    def __init__(self, request: LlmRequest, tokenizer: Tokenizer, plan: GenerationPlan) -> None:
        self._wanted = request.wanted
        self._tokenizer = tokenizer
        self._plan = plan
        # A stream with the LLM API's tensors may begin with the prompt. A stream with the wire's tensors never does.
        options = plan.options
        self._text = options.prompt if options.stream and not options.exclude_input_in_output else ""
        self._token_ids: tuple[int, ...] = ()

    def response(self, piece: Piece, output: Any) -> Response:  # noqa: ANN401 - CompletionOutput, None before any
        """One response. `output` is the output of the LLM, which holds the metrics."""
        outputs = wire_outputs(piece) if self._wanted is None else self._llmapi_outputs(piece, output)
        return Response(
            outputs=outputs,
            is_last=bool(piece.finish_reason),
            finish_reason=piece.finish_reason,
            num_output_tokens=piece.num_output_tokens,
        )

    def _llmapi_outputs(self, piece: Piece, output: Any) -> Tensors:  # noqa: ANN401
        self._text += piece.text
        self._token_ids += piece.token_ids
        wanted = self._wanted or frozenset()
        outputs = {"text_output": _text(self._text)}
        if FINISH_REASON in wanted:
            outputs["finish_reason"] = _text(piece.finish_reason or str(None))
        if STOP_REASON in wanted:
            outputs["stop_reason"] = _text(str(self._stop_word() if piece.finish_reason == "stop" else None))
        if LOGPROB in wanted:
            outputs["cumulative_logprob"] = np.array([piece.cum_log_prob], dtype=np.float32)
        metrics = getattr(output, "request_perf_metrics", None) if PERF_METRICS in wanted else None
        return outputs if metrics is None else outputs | _metrics(metrics)

    def _stop_word(self) -> str | None:
        """The stop word that ended the answer: the one that was complete first, and of several that end there the
        longest."""
        context = last_text_token(self._tokenizer, self._plan.prompt_ids)
        before = self._tokenizer.decode(list(context))
        text = self._tokenizer.decode([*context, *self._token_ids])[len(before) :]
        found = [(text.find(word) + len(word), text.find(word), word) for word in self._plan.options.stop_words]
        return min((item for item in found if item[1] >= 0), default=(0, 0, None))[2]


def _text(text: str) -> npt.NDArray[Any]:
    return np.array([text.encode()], dtype=np.object_)


def _metrics(metrics: Any) -> dict[str, npt.NDArray[Any]]:  # noqa: ANN401 - RequestPerfMetrics
    """The outputs for the metrics of a request. Times are those of a steady clock, in nanoseconds."""
    values = {name: getattr(getattr(metrics, group), key) for name, (group, key) in METRIC_PATHS.items()}
    numbers = {
        name: value // timedelta(microseconds=1) * 1000 if isinstance(value, timedelta) else value
        for name, value in values.items()
    }
    return {name: np.array([value], dtype=_METRIC_DTYPES[name]) for name, value in numbers.items()}
