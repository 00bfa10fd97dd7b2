"""What the client of a served model gets: turns pieces into tensors of the wire contract, and errors into status and
text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from export.errors import MoeshipError
from triton_repo.contracts.piece import Piece, TokenRouting
from triton_repo.errors import GRPC_STATUS, RequestError, RequestErrorKind

logger = logging.getLogger(__name__)


def wire_outputs(piece: Piece) -> dict[str, npt.NDArray[Any]]:
    """The tensors of one response. Log-probabilities are absent unless asked for.

    text_output has shape [1], as TensorRT-LLM's postprocessing sends it and its clients read it. top_token_ids and
    top_log_probs have [1, tokens, n], routed_experts and expert_weights [1, tokens, layers, n], and all others [1, n].
    """
    outputs: dict[str, npt.NDArray[Any]] = {
        "text_output": np.array([piece.text.encode()], dtype=np.object_),
        "sequence_index": np.array([[piece.sequence_index]], dtype=np.int32),
        "batch_index": np.zeros((1, 1), dtype=np.int32),
        "finish_reason": np.array([[(piece.finish_reason or "").encode()]], dtype=np.object_),
        "token_ids": np.array([piece.token_ids], dtype=np.int32),
        "num_input_tokens": np.array([[piece.num_input_tokens]], dtype=np.int32),
        "num_output_tokens": np.array([[piece.num_output_tokens]], dtype=np.int32),
    }
    if piece.cum_log_prob is not None:
        outputs["cum_log_probs"] = np.array([[piece.cum_log_prob]], dtype=np.float32)
        outputs["output_log_probs"] = np.array([piece.log_probs], dtype=np.float32)
    if piece.top_log_probs:
        outputs |= top_outputs(piece.top_log_probs, "top")
    if piece.prompt_token_ids:
        outputs["prompt_token_ids"] = np.array([piece.prompt_token_ids], dtype=np.int32)
        outputs["prompt_log_probs"] = np.array([piece.prompt_log_probs], dtype=np.float32)
    if piece.prompt_top_log_probs:
        outputs |= top_outputs(piece.prompt_top_log_probs, "prompt_top")
    if piece.routing:
        outputs |= routing_outputs(piece.routing, piece.num_experts)
    return outputs


def top_outputs(tops: Sequence[Sequence[tuple[int, float]]], prefix: str) -> dict[str, npt.NDArray[Any]]:
    """The likeliest tokens at some places, as PREFIX_token_ids and PREFIX_log_probs, each [1, places, n]."""
    return {
        f"{prefix}_token_ids": np.array([[[token for token, _ in top] for top in tops]], dtype=np.int32),
        f"{prefix}_log_probs": np.array([[[value for _, value in top] for top in tops]], dtype=np.float32),
    }


def routing_outputs(routing: Sequence[TokenRouting], num_experts: int | None) -> dict[str, npt.NDArray[Any]]:
    """The tensors of what the routers chose for the tokens of one response."""
    pairs = np.array(routing, dtype=np.float64)  # [tokens, layers, n, 2]
    return {
        "routed_experts": pairs[None, ..., 0].astype(np.int32),
        "expert_weights": pairs[None, ..., 1].astype(np.float32),
        "num_experts": np.array([[num_experts]], dtype=np.int32),
    }


def failure(error: Exception) -> tuple[RequestErrorKind, str]:
    """The status and message that the client of a failed request sees. An error that is not the client's fault is
    logged. The message of another library is only in the log, since it means nothing to the client and may contain
    paths.

    The message begins with the name of the gRPC status. A Triton before 2.68 sends the errors of a stream only as text,
    and crashes when it is asked for a real status (triton-inference-server/server#8708).
    """
    if isinstance(error, RequestError):
        return error.kind, f"{GRPC_STATUS[error.kind]}: {error}"
    logger.error("a request failed because of a fault in the server", exc_info=error)
    reason = str(error) if isinstance(error, MoeshipError) else "the server failed; its log has the reason"
    return "INTERNAL", f"{GRPC_STATUS['INTERNAL']}: answering the request: {reason}"


def server_stopping() -> RequestError:
    """The error of a request that arrives or still waits when the server is about to end."""
    return RequestError(
        "answering the request: the server is stopping; send the request to another server or again later",
        kind="UNAVAILABLE",
    )


def error_response(backend: ModuleType, error: Exception) -> Any:  # noqa: ANN401 - its types exist inside Triton only
    """The response that tells the client of an error. `backend` is triton_python_backend_utils."""
    kind, message = failure(error)
    return backend.InferenceResponse(error=backend.TritonError(message, getattr(backend.TritonError, kind)))
