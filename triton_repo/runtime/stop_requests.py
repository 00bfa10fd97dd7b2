"""Requests to stop other requests. Such a request has the id of those that it ends and the input `stop`; its other
inputs are not read.

It is answered at once, by an empty piece. If no request in flight has its id, it ends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from triton_repo.contracts.piece import Piece
from triton_repo.errors import RequestError
from triton_repo.runtime.answer import AnswerPlan

STOP = "stop"
# The answer to a request to stop, and the plan that produces this answer.
STOPPED = Piece(
    text="",
    finish_reason="cancelled",
    num_input_tokens=0,
    num_output_tokens=0,
)
STOPPED_PLAN = AnswerPlan(
    num_input_tokens=0,
    context_ids=(),
    most_tokens=1,
    end_ids=(),
    stop_words=(),
    stop_tokens=(),
    prefix="",
    return_log_probs=False,
    num_log_probs=0,
    num_sequences=1,
    stream=False,
)


def asks_to_stop(tensors: Mapping[str, npt.NDArray[Any]], name: str = STOP) -> bool:
    """Whether the tensors of a request ask to stop other requests. `name` is the name of that tensor in the model."""
    return name in tensors and bool(tensors[name].any())


def check_stop_id(request_id: str) -> None:
    """Raise RequestError for a request to stop that has no id."""
    if not request_id:
        raise RequestError(
            "reading the request: stop is true and there is no request id; send the id of the request to end"
        )
