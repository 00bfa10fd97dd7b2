"""Requests to stop others: they bear the id of those that they end, and `stop` beside inputs that nobody reads.

A request to stop is answered at once, by a piece of nothing. One whose id no request in flight bears ends none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from triton_repo.contracts.piece import Piece
from triton_repo.errors import RequestError
from triton_repo.runtime.answer import AnswerPlan

STOP = "stop"
# The answer to a request to stop, and the plan of an answer that becomes it.
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
    stream=False,
)


def asks_to_stop(tensors: Mapping[str, npt.NDArray[Any]], name: str = STOP) -> bool:
    """Whether a request's tensors ask to stop others; `name` is what the model calls the tensor."""
    return name in tensors and bool(tensors[name].any())


def check_stop_id(request_id: str) -> None:
    """Raises RequestError for a request to stop that names no other."""
    if not request_id:
        raise RequestError(
            "reading the request: stop is true and there is no request id; send the id of the request to end"
        )
