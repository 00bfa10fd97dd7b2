"""The Tritons behind a gateway: which of them are up, which gets a request, and what is sent to another one.

    async with Pool(settings) as pool:
        async for pieces in pool.stream(request): ...

A request goes to the Triton that has the model ready and the fewest requests of this gateway in flight. Where one
cannot be reached, refuses for load, or ends before the first piece, the request goes to the next. After the first
piece nothing is sent again, since a client has seen a part of the answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TypeVar

from clients.errors import (
    ClientError,
    ConnectionFailed,
    ConnectionLost,
    DeadlineExceeded,
    ModelNotFound,
    ModelNotReady,
    ServerOverloaded,
)
from clients.gateway.errors import ApiError, model_not_found, unavailable
from clients.gateway.settings import Settings
from clients.generation import AsyncClient
from clients.messages import Generation, GenerationRequest
from triton_repo.contracts.ensemble import STEP_MODELS
from triton_repo.contracts.piece import Piece

logger = logging.getLogger(__name__)

POLL_S = 1.0  # between two questions to a Triton for its models
_MOST_LATE = 3  # answers in a row that do not come in time before a Triton counts as away: it may only be busy
# Errors before the first piece after which another Triton may answer.
_ELSEWHERE = (ConnectionFailed, ConnectionLost, ModelNotReady, ModelNotFound, ServerOverloaded)
# How often a request is sent again that may itself have ended the Triton that computed it.
_MOST_LOST = 1

_CLOCKS_S = 0.5  # by which gRPC's clock may be ahead of the loop's at a request's deadline

_Item = TypeVar("_Item")


@dataclass(eq=False)
class Triton:
    """One Triton and what is known of it."""

    client: AsyncClient
    ready: frozenset[str] = frozenset()  # its ready models without an ensemble's steps
    is_up: bool = False
    in_flight: int = 0
    late: int = 0  # questions in a row that were not answered in time
    fault: type[ClientError] | None = None  # why the last question has no answer
    inputs: dict[str, frozenset[str]] = field(default_factory=dict)  # model to the names of its inputs

    @property
    def url(self) -> str:
        return self.client.url


class Pool:
    """All Tritons of a gateway. Make it in the running loop. `on_retry` is called where a request goes to another."""

    def __init__(self, settings: Settings, on_retry: Callable[[], object] = lambda: None) -> None:
        self.tritons = [Triton(AsyncClient(url, tls=settings.tls)) for url in dict.fromkeys(settings.tritons)]
        self._on_retry = on_retry
        self._pollers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Pool:
        await asyncio.gather(*map(self._look, self.tritons))
        self._pollers = [asyncio.create_task(self._poll(triton)) for triton in self.tritons]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._pollers:
            task.cancel()
        await asyncio.gather(*self._pollers, return_exceptions=True)
        await asyncio.gather(*(triton.client.close() for triton in self.tritons))

    def models(self) -> list[str]:
        """The models that are ready on any Triton, in the order of names."""
        return sorted(frozenset().union(*(triton.ready for triton in self.tritons)))

    async def inputs(self, model: str) -> frozenset[str]:
        """The names of the inputs that a model has on every Triton where it is ready."""
        having = [triton for triton in self.tritons if model in triton.ready]
        for triton in having:
            if model not in triton.inputs:
                with suppress(ClientError):
                    triton.inputs[model] = await triton.client.model_inputs(model)
        known = [triton.inputs[model] for triton in having if model in triton.inputs]
        return frozenset.intersection(*known) if known else frozenset()

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Sequence[Piece], None]:
        """The answer piece by piece, each time all pieces that wait. Raises ApiError where no Triton can be asked, and
        ClientError."""
        return self._asked(request, lambda client, asked: client.stream_waiting(asked))

    async def generate_all(self, request: GenerationRequest) -> Sequence[Generation]:
        """The whole answers to a prompt. Raises as `stream`."""

        async def answers(client: AsyncClient, asked: GenerationRequest) -> AsyncGenerator[Sequence[Generation], None]:
            yield await client.generate_all(asked)

        async with aclosing(self._asked(request, answers)) as found:
            return await anext(found)

    async def _asked(
        self,
        request: GenerationRequest,
        ask: Callable[[AsyncClient, GenerationRequest], AsyncGenerator[_Item, None]],
    ) -> AsyncGenerator[_Item, None]:
        loop = asyncio.get_running_loop()
        began, deadline = False, None if request.timeout_s is None else loop.time() + request.timeout_s
        tried: set[Triton] = set()
        num_lost = 0
        triton = self._choose(request.model, tried)
        while True:
            triton.in_flight += 1
            try:
                left = None if deadline is None else max(0.001, deadline - loop.time())
                async with aclosing(ask(triton.client, replace(request, timeout_s=left))) as items:
                    async for item in items:
                        began = True
                        yield item
                return
            except DeadlineExceeded:
                if began or (deadline is not None and loop.time() > deadline - _CLOCKS_S):
                    raise
                # The request has time left: the server did not answer what it is asked before a first request.
                tried.add(triton)
                triton.is_up = False
                self._on_retry()
            except _ELSEWHERE as error:
                num_lost += isinstance(error, ConnectionLost)
                tried.add(triton)
                if isinstance(error, (ConnectionFailed, ConnectionLost)):
                    triton.is_up = False
                others = [other for other in self._having(request.model) if other not in tried]
                if began or not others or num_lost > _MOST_LOST:
                    raise
                logger.info("a request goes to another server, since %s", error)
                self._on_retry()
            finally:
                triton.in_flight -= 1
            triton = self._choose(request.model, tried)

    def _having(self, model: str) -> list[Triton]:
        """The Tritons that are up and have the model ready."""
        return [triton for triton in self.tritons if triton.is_up and model in triton.ready]

    def _choose(self, model: str, tried: set[Triton]) -> Triton:
        """The Triton with the fewest requests in flight. Raises ApiError."""
        able = [triton for triton in self._having(model) if triton not in tried]
        if able:
            return min(able, key=lambda triton: triton.in_flight)
        raise self.absent(model)

    def absent(self, model: str) -> ApiError:
        """The error of a request for a model that no Triton has ready: for the moment, or at all."""
        down = [triton for triton in self.tritons if not triton.is_up]
        if down and (not self.models() or any(model in triton.ready for triton in down)):
            return unavailable("the model's server cannot be reached at present; send the request again")
        return model_not_found(model, self.models())

    async def _poll(self, triton: Triton) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self._look(triton)

    async def _look(self, triton: Triton) -> None:
        """Ask a Triton for its models. One that does not answer keeps those that it had, so that a request for one of
        them gets the answer that the server is away, and not that there is no such model."""
        was_up = triton.is_up
        try:
            states = await triton.client.models()
        except ClientError as error:
            triton.late += 1
            triton.is_up = was_up and isinstance(error, DeadlineExceeded) and triton.late < _MOST_LATE
            # A server that never was up is told too, and one that stays away for another reason is told again.
            if not triton.is_up and (was_up or triton.fault is not type(error)):
                logger.warning("a server is away: %s", error)
            triton.fault = type(error)
            return
        ready = frozenset(state.name for state in states if state.ready and state.name not in STEP_MODELS)
        if not was_up:
            triton.inputs.clear()
            logger.info("%s answers, with the models: %s", triton.url, ", ".join(sorted(ready)) or "none")
        triton.is_up, triton.ready, triton.late, triton.fault = True, ready, 0, None
        await self._look_at_inputs(triton)

    async def _look_at_inputs(self, triton: Triton) -> None:
        """Ask again for the inputs that are known: a model may have been replaced by another one of its name."""
        for model in list(triton.inputs):
            if model not in triton.ready:
                del triton.inputs[model]
                continue
            with suppress(ClientError):
                triton.inputs[model] = await triton.client.model_inputs(model)
