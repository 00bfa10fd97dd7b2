"""Computes one request by an engine of its own, in the caller's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any

from triton_repo.runtime.batching.engine import SequenceEngine
from triton_repo.runtime.batching.memory.slots import Slots
from triton_repo.runtime.batching.outlet import Outlet
from triton_repo.runtime.batching.scheduler import Limits
from triton_repo.runtime.batching.sequence import Request

if TYPE_CHECKING:
    from trt_build.ort.session import Session


def never() -> bool:
    """An `is_cancelled` for callers that do not cancel."""
    return False


def answered(
    session: Session, make: Callable[[Outlet[Any]], Request[Any]], is_cancelled: Callable[[], bool] = never
) -> Iterator[tuple[Any, bool]]:
    """Compute one request alone and yield its responses, each with whether it is the last. Raises the error that ends
    it."""
    sent: deque[Any] = deque()
    request = make(Outlet(lambda *response: sent.append(response), sent.append, is_cancelled))
    count = len(request.writers)
    cache = session.new_cache(count)
    slots = Slots(cache, count * cache.bytes_of(cache.positions))
    engine = SequenceEngine(
        session, cache, slots, num_tokens=session.engine.manifest.tokenizer_size, limits=Limits(slots=count),
        routing=session.routing if request.wants_routing else None,
    )  # fmt: skip
    engine.submit(request)
    if request.awaited is not None:
        wait([request.awaited])  # a failure of it is the answer
    goes_on = True
    while goes_on:
        engine.look()
        goes_on = engine.step()
        while sent:
            response = sent.popleft()
            if isinstance(response, Exception):
                raise response
            yield response
