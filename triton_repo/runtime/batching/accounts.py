"""Keeps the accounts of an engine of sequences: counts for metrics, what became of each request, and which experts the
tokens of some steps chose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_repo.contracts.piece import TokenRouting
from triton_repo.errors import GRPC_STATUS, RequestError
from triton_repo.runtime.batching.sequence import Request
from triton_repo.runtime.batching.stats import Stats
from triton_repo.runtime.sampling import Choice
from trt_build.ort.routing import Routing
from trt_build.ort.step_call import Row

SAMPLE_INTERVAL_S = 0.25  # between steps whose routers are looked at, which costs such a step up to 1 ms


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What became of one request. Times are seconds since it arrived; None for what it did not come to."""

    request_id: str  # as its client gave it
    end: str  # one of ENDS or REFUSALS in `stats`
    status: str  # "OK", or the name of the gRPC status of the error that its client got
    prompt_tokens: int | None
    reused_tokens: int | None = None  # those of the prompt that were in the cache and were not computed
    output_tokens: int = 0
    queued_s: float | None = None
    first_token_s: float | None = None
    total_s: float = 0.0


class Accounts:
    """The accounts of one engine. `routing` is its session's, if the experts that tokens choose are to be counted.
    `post` calls `report`, where one is set, with what became of each request."""

    def __init__(
        self,
        routing: Routing | None,
        clock: Callable[[], float],
        post: Callable[[Callable[[], object]], object],
    ) -> None:
        self.stats = Stats()
        self.routing = routing
        self.report: Callable[[Ended], object] | None = None
        self._clock, self._post = clock, post
        self._sampled_s = -math.inf
        self._counts = False  # whether the experts of this step are counted
        if routing is not None:
            self.stats.expert_tokens = np.zeros((len(routing.layers), len(routing.expert_order)), dtype=np.int64)

    def ended(self, request: Request[Any], how: str, error: Exception | None = None) -> None:
        """A request that was taken on has ended."""
        self.stats.ended(how)
        self._tell(request, how, error)

    def refused(self, request: Request[Any], reason: str, error: Exception) -> None:
        """A request was refused before it began."""
        self.stats.refused(reason)
        self._tell(request, reason, error)

    def unread(self, request_id: str, error: Exception, reason: str = "") -> None:
        """A request was refused before it was read, for a reason, or since it could not be read."""
        reason = reason or ("invalid" if isinstance(error, RequestError) else "failed")
        self.stats.refused(reason)
        self._send(Ended(request_id=request_id, end=reason, status=_status(error), prompt_tokens=None))

    def room_for_routers(self, rows: Sequence[Row], *, wanted: bool) -> npt.NDArray[np.float32] | None:
        """Room for the logits of the routers of a step of `rows`; None for a step whose routers are not looked at.
        `wanted`: a request of the step wants the experts of its tokens."""
        now = self._clock()
        self._counts = self.routing is not None and now - self._sampled_s >= SAMPLE_INTERVAL_S
        if self._counts:
            self._sampled_s = now
        if self.routing is None or not (self._counts or wanted):
            return None
        return self.routing.room(sum(len(row.token_ids) for row in rows))

    def routed(
        self, router_logits: npt.NDArray[np.float32] | None, rows: Sequence[Row], wanted: Sequence[bool]
    ) -> list[TokenRouting]:
        """What the routers chose for each of the logits that the rows of a step ask for, one row after the other, from
        the logits of its routers, if they were looked at; empty for a row that is not `wanted`."""
        chosen: list[TokenRouting] = [() for row in rows for _ in range(row.num_logits)]
        if self.routing is None or router_logits is None:
            return chosen
        places: list[int] = []  # of logits that are wanted
        tokens: list[int] = []  # whose logits these are
        done = seen = 0
        for row, wants in zip(rows, wanted, strict=True):
            done, seen = done + row.num_logits, seen + len(row.token_ids)
            if wants:
                places += range(done - row.num_logits, done)
                tokens += range(seen - row.num_logits, seen)
        if places:
            experts, weights = (found.tolist() for found in self.routing.chosen(router_logits[:, np.array(tokens)]))
            for place, of_token, weights_of_token in zip(places, experts, weights, strict=True):
                pairs = zip(of_token, weights_of_token, strict=True)
                chosen[place] = tuple(tuple(zip(*layer, strict=True)) for layer in pairs)
        return chosen

    def count_experts(
        self, router_logits: npt.NDArray[np.float32] | None, rows: Sequence[Row], rejected: Sequence[int]
    ) -> None:
        """Count the experts that the tokens of a step chose, where it is time to, but for the last `rejected` tokens of
        each row, which are in no text."""
        if self.routing is None or router_logits is None or not self._counts:
            return
        if any(rejected):
            counts = [(len(row.token_ids) - less, less) for row, less in zip(rows, rejected, strict=True)]
            stays = np.repeat([True, False] * len(rows), np.ravel(counts))
            router_logits = router_logits[:, stays]
        self.stats.expert_tokens += self.routing.count_chosen(router_logits)

    def with_routing(self, choice: Choice, routing: TokenRouting) -> Choice:
        """A choice with what the routers chose where its logits were computed, if that is given."""
        if self.routing is None or not routing:
            return choice
        return replace(choice, routing=routing, num_experts=len(self.routing.expert_order))

    def _tell(self, request: Request[Any], end: str, error: Exception | None) -> None:
        if self.report is None:
            return
        begun_s, first_s = request.begun_s, request.first_token_s
        self._send(
            Ended(
                request_id=request.request_id,
                end=end,
                status="OK" if error is None else _status(error),
                prompt_tokens=len(request.prompt_ids),
                reused_tokens=request.num_reused,
                output_tokens=request.num_output,
                queued_s=None if begun_s is None else begun_s - request.arrived_s,
                first_token_s=None if first_s is None else first_s - request.arrived_s,
                total_s=self._clock() - request.arrived_s,
            )
        )

    def _send(self, ended: Ended) -> None:
        if self.report is not None:
            self._post(partial(self.report, ended))


def _status(error: Exception) -> str:
    return GRPC_STATUS[error.kind] if isinstance(error, RequestError) else "INTERNAL"
