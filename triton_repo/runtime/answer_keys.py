"""How the steps of one ensemble request know each other: the key of its answer.

An ensemble's steps bear the ensemble request's id, which clients choose. A step may also set the response parameter
`sequence_id`, which becomes the correlation id of every step that depends on it (triton-inference-server/core,
src/ensemble_scheduler/ensemble_scheduler.cc): preprocessing draws one where its Python backend takes parameters of
responses. One that does not, as Triton 2.51's, leaves the request id alone.
"""

from __future__ import annotations

import uuid
from types import ModuleType
from typing import Any

from triton_repo.errors import RequestError

CORRELATION_PARAMETER = "sequence_id"


def takes_response_parameters(backend: ModuleType) -> bool:
    """Whether a Python backend's responses can bear parameters; `backend` is triton_python_backend_utils."""
    try:
        backend.InferenceResponse(output_tensors=[], parameters={CORRELATION_PARAMETER: ""})
    except TypeError:
        return False
    return True


def draw_key() -> str:
    """A key that no other answer has."""
    return uuid.uuid4().hex


def require_request_id(request_id: str) -> None:
    """Raises RequestError where the request id has to be the key and there is none."""
    if not request_id:
        raise RequestError(
            "reading the request: found no request id, expected one that no request under way bears, since this "
            "server's steps know each other by nothing else; send an id with the request, such as a UUID"
        )


def answer_key(request: Any, *, by_correlation: bool) -> str:  # noqa: ANN401 - the backend's type exists inside Triton
    """The key of the answer that a step's request is about."""
    return str(request.correlation_id()) if by_correlation else str(request.request_id())
