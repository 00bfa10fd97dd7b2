"""An engine ready to answer wire requests, one at a time: tensors in, pieces out, pieces to tensors.

service = Service.open(engine_folder, threads=None)
for piece in service.respond({"text_input": ..., "max_tokens": ...}, is_cancelled):
    wire_outputs(piece)["text_output"]
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.tokenizer import Tokenizer, load_tokenizer
from triton_repo.errors import GRPC_STATUS, RequestError, RequestErrorKind
from triton_repo.runtime.generation import Piece, generate, join
from triton_repo.runtime.options import read_options
from triton_repo.seal import is_sealed
from trt_build.engine import open_engine
from trt_build.ort.session import Session

logger = logging.getLogger(__name__)


class Service:
    """A loaded engine, its tokenizer and one cache that every request uses again."""

    def __init__(self, session: Session, tokenizer: Tokenizer) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._cache = session.new_cache()

    @classmethod
    def open(cls, folder: Path, threads: int | None, device_index: int = 0) -> Service:
        """Load the engine, on the GPU of that index where it is for GPUs. Every digest is checked first, unless the
        files are as they were when the engine was packaged.

        Raises EngineError, CheckpointError, MissingPackageError.
        """
        engine = open_engine(folder, check_digests=not is_sealed(folder))
        return cls(Session(engine, threads, device_index), load_tokenizer(folder))

    def respond(self, tensors: Mapping[str, npt.NDArray[Any]], is_cancelled: Callable[[], bool]) -> Iterator[Piece]:
        """The pieces of one answer, or the whole answer as one piece unless the request streams.

        Raises RequestError for a request that cannot be answered.
        """
        options = read_options(tensors)
        pieces = generate(self._session, self._tokenizer, options, is_cancelled, self._cache)
        return pieces if options.stream else iter([join(pieces)])


def wire_outputs(piece: Piece) -> dict[str, npt.NDArray[Any]]:
    """The response's tensors. Log-probabilities are absent unless asked for.

    text_output has shape [1], as TensorRT-LLM's postprocessing sends it and its clients read it; all others [1, n].
    """
    outputs: dict[str, npt.NDArray[Any]] = {
        "text_output": np.array([piece.text.encode()], dtype=np.object_),
        "sequence_index": np.zeros((1, 1), dtype=np.int32),
        "batch_index": np.zeros((1, 1), dtype=np.int32),
        "finish_reason": np.array([[piece.finish_reason.encode()]], dtype=np.object_),
        "token_ids": np.array([piece.token_ids], dtype=np.int32),
        "num_input_tokens": np.array([[piece.num_input_tokens]], dtype=np.int32),
        "num_output_tokens": np.array([[piece.num_output_tokens]], dtype=np.int32),
    }
    if piece.log_probs is not None:
        outputs["cum_log_probs"] = np.array([[piece.cum_log_prob]], dtype=np.float32)
        outputs["output_log_probs"] = np.array([piece.log_probs], dtype=np.float32)
    return outputs


def failure(error: Exception) -> tuple[RequestErrorKind, str]:
    """The status and message that the client of a failed request sees; what is not the client's doing is logged.

    The message begins with the gRPC status' name: a Triton before 2.68 sends the errors of a stream as text alone, and
    crashes when it is asked to do otherwise (triton-inference-server/server#8708).
    """
    if isinstance(error, RequestError):
        return error.kind, f"{GRPC_STATUS[error.kind]}: {error}"
    logger.error("a request failed for a reason of the server's own", exc_info=error)
    return "INTERNAL", f"{GRPC_STATUS['INTERNAL']}: answering the request: {type(error).__name__}: {error}"
