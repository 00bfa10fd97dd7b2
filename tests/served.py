"""Requests to a `Service` or a `TokenEngine` without Triton, and what came of them."""

from __future__ import annotations

import queue

from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.runtime.batching.loading import start
from triton_repo.runtime.single.service import Request, Service

PATIENCE_S = 30


class Sent:
    """What a request was sent, in its order. `kind` is its class: the service's, or the token engine's."""

    def __init__(self, kind, *, request_id: str, tensors, is_cancelled=lambda: False) -> None:
        self.found: queue.Queue = queue.Queue()
        self.request = kind(
            request_id=request_id, tensors=tensors, send=lambda *sent: self.found.put(sent), fail=self.found.put,
            is_cancelled=is_cancelled,
        )  # fmt: skip

    def next(self):
        """The next response with whether it is the last, or the error that ended the request."""
        return self.found.get(timeout=PATIENCE_S)

    def all(self) -> list:
        """Every response to the last. Raises the error that ended the request."""
        responses = []
        while True:
            sent = self.next()
            if isinstance(sent, Exception):
                raise sent
            responses.append(sent[0])
            if sent[1]:
                return responses

    def last(self):
        """The last response with its mark, or the error."""
        while True:
            sent = self.next()
            if isinstance(sent, Exception) or sent[1]:
                return sent


def answers(session, tokenizer, tensors) -> list:
    """The pieces of one request by a service of its own, which computes three sequences at a time."""
    service = Service(start(session, ModelParameters(slots=3)), tokenizer)
    sent = Sent(Request, request_id="", tensors=tensors)
    try:
        service.submit(sent.request)
        return sent.all()
    finally:
        service.runner.close()
