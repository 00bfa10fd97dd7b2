"""Pieces and errors in, what the client of a served model gets out: tensors of the wire contract, status and text."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from export.errors import MoeshipError
from triton_repo.contracts.piece import Piece
from triton_repo.errors import GRPC_STATUS, RequestError, RequestErrorKind

logger = logging.getLogger(__name__)


def wire_outputs(piece: Piece) -> dict[str, npt.NDArray[Any]]:
    """The response's tensors. Log-probabilities are absent unless asked for.

    text_output has shape [1], as TensorRT-LLM's postprocessing sends it and its clients read it; all others [1, n].
    """
    outputs: dict[str, npt.NDArray[Any]] = {
        "text_output": np.array([piece.text.encode()], dtype=np.object_),
        "sequence_index": np.zeros((1, 1), dtype=np.int32),
        "batch_index": np.zeros((1, 1), dtype=np.int32),
        "finish_reason": np.array([[(piece.finish_reason or "").encode()]], dtype=np.object_),
        "token_ids": np.array([piece.token_ids], dtype=np.int32),
        "num_input_tokens": np.array([[piece.num_input_tokens]], dtype=np.int32),
        "num_output_tokens": np.array([[piece.num_output_tokens]], dtype=np.int32),
    }
    if piece.cum_log_prob is not None:
        outputs["cum_log_probs"] = np.array([[piece.cum_log_prob]], dtype=np.float32)
        outputs["output_log_probs"] = np.array([piece.log_probs], dtype=np.float32)
    return outputs


def failure(error: Exception) -> tuple[RequestErrorKind, str]:
    """The status and message that the client of a failed request sees. What is not the client's doing is logged, and
    another library's words, which mean nothing to the client and may hold paths, are only there.

    The message begins with the gRPC status' name: a Triton before 2.68 sends the errors of a stream as text alone, and
    crashes when it is asked to do otherwise (triton-inference-server/server#8708).
    """
    if isinstance(error, RequestError):
        return error.kind, f"{GRPC_STATUS[error.kind]}: {error}"
    logger.error("a request failed for a reason of the server's own", exc_info=error)
    reason = str(error) if isinstance(error, MoeshipError) else "the server failed; its log has the reason"
    return "INTERNAL", f"{GRPC_STATUS['INTERNAL']}: answering the request: {reason}"


def server_stopping() -> RequestError:
    """The error of a request that comes, or still waits, when the server is about to end."""
    return RequestError(
        "answering the request: the server is stopping; send the request to another server or again later",
        kind="UNAVAILABLE",
    )


def error_response(backend: ModuleType, error: Exception) -> Any:  # noqa: ANN401 - its types exist inside Triton only
    """The response that refuses a request; `backend` is triton_python_backend_utils."""
    kind, message = failure(error)
    return backend.InferenceResponse(error=backend.TritonError(message, getattr(backend.TritonError, kind)))
