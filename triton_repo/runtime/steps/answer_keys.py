"""The key of an answer, by which the steps of an ensemble recognise the same request. Preprocessing draws it.

The key goes from step to step as a tensor. An engine on ONNX Runtime sends it back with each response. TensorRT-LLM's
C++ backend does not, so there the key is also the correlation id of the steps: a step may set the response parameter
`sequence_id`, which becomes the correlation id of every step that depends on it (triton-inference-server/core,
src/ensemble_scheduler/ensemble_scheduler.cc). Python backends without response parameters, such as Triton 2.51's,
cannot set it. The client's request id cannot be the key: it may be absent, and several requests in flight may have the
same.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_repo.contracts.ensemble import ANSWER_KEY
from triton_repo.errors import RepositoryError

CORRELATION_PARAMETER = "sequence_id"


def takes_response_parameters(backend: ModuleType) -> bool:
    """Whether responses of the Python backend can have parameters. `backend` is triton_python_backend_utils."""
    try:
        backend.InferenceResponse(output_tensors=[], parameters={CORRELATION_PARAMETER: ""})
    except TypeError:
        return False
    return True


def require_response_parameters(backend: ModuleType, model: str) -> None:
    """Raise RepositoryError if correlation ids cannot be set. Call it for an engine that does not send keys back."""
    if not takes_response_parameters(backend):
        raise RepositoryError(
            f"loading {model}: this Triton's Python backend has no response parameters, which are needed to tell "
            "answers of TensorRT-LLM's backend apart; serve the repository in a container of TensorRT-LLM 1.0 to 1.2"
        )


def draw_key() -> str:
    """A key that no other answer has."""
    return uuid.uuid4().hex


def key_tensor(key: str) -> npt.NDArray[np.object_]:
    """A key as a tensor [1, 1] of UTF-8 bytes."""
    return np.array([[key.encode()]], dtype=np.object_)


def read_key(tensors: Mapping[str, npt.NDArray[Any]], name: str = ANSWER_KEY.name) -> str | None:
    """The key in the tensor with that name; None if the request has no such tensor."""
    if name not in tensors:
        return None
    item = tensors[name].reshape(-1)[0]
    return item.decode() if isinstance(item, bytes) else str(item)
