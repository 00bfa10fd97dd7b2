"""Opens the endpoints of a load by their addresses, and checks that they serve one model."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from clients.bench.load import Work
from clients.bench.records import Arrival, Target
from clients.bench.targets.generate import GenerateTarget, ready_models
from clients.bench.targets.http import opened_session
from clients.bench.targets.openai import CHAT, COMPLETIONS, OpenAITarget, base_of, listed_models
from clients.bench.targets.triton import TritonTarget
from clients.generation import AsyncClient
from export.errors import ConfigError, names
from triton_repo.contracts.ensemble import STEP_MODELS
from triton_repo.contracts.tls.client import ClientTls

GRPC, GENERATE = "grpc", "generate"
ENDPOINTS = (GRPC, GENERATE, COMPLETIONS, CHAT)


@dataclass(frozen=True, kw_only=True)
class Endpoints:
    """The addresses of a load and how they are asked. `model` None takes the one that all of them serve."""

    urls: Sequence[str]
    kind: str = GRPC
    model: str | None = None
    timeout_s: float | None = None
    extra: Mapping[str, Any] | None = None  # fields that are added to every request of OpenAI's API
    tls: ClientTls | None = None
    api_key: str | None = None


class Spread:
    """Several targets as one: requests go to them in turn."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets, self._turns = targets, itertools.cycle(targets)
        self.counting = targets[0].counting

    async def answer(self, work: Work) -> AsyncGenerator[Arrival, None]:
        """Send one request to the next target and yield what arrives. Raises ClientError."""
        target = next(self._turns)
        async with aclosing(target.answer(work)) as arrivals:
            async for arrival in arrivals:
                yield arrival
        self.counting = target.counting


def kind_of(urls: Sequence[str]) -> str:
    """The endpoint that addresses without a named one mean: gRPC for HOST:PORT, OpenAI's completions for http://."""
    return COMPLETIONS if urls[0].startswith(("http://", "https://")) else GRPC


@asynccontextmanager
async def opened_endpoints(endpoints: Endpoints) -> AsyncIterator[tuple[Target, str]]:
    """The target of a load, and the name of its model. Raises ClientError where a server does not answer, and
    ConfigError where the endpoints have no model in common or several."""
    async with AsyncExitStack() as stack:
        opened = [await _open(stack, endpoints, url) for url in endpoints.urls]
        model = endpoints.model
        if model is None or len(opened) > 1:
            model = common_model({one.url: await one.models() for one in opened}, model)
        targets = [one.target(model) for one in opened]
        target: Target = targets[0] if len(targets) == 1 else Spread(targets)
        yield target, model


def common_model(listed: Mapping[str, Sequence[str]], asked: str | None) -> str:
    """The model that every endpoint serves: the one that was asked for, or the only one. `listed` has the names of each
    address. Raises ConfigError."""
    common = set.intersection(*(set(found) for found in listed.values()))
    if asked is not None and asked in common:
        return asked
    if asked is None and len(common) == 1 and len({frozenset(found) for found in listed.values()}) == 1:
        return next(iter(common))
    have = "; ".join(f"{url} has {names(sorted(found)) or 'none'}" for url, found in listed.items())
    if asked is not None:
        raise ConfigError(f"choosing the model of a load: {have}; expected {asked} at every address")
    if len(listed) == 1:
        raise ConfigError(f"choosing the model of a load: {have}; give --model")
    disagree = "the endpoints have no model in common" if not common else "the endpoints do not list the same models"
    raise ConfigError(f"choosing the model of a load: {disagree}: {have}; give --model, or leave an address out")


class _Opened:
    """One endpoint, before its model is known."""

    def __init__(self, url: str, endpoints: Endpoints, client: Any) -> None:  # noqa: ANN401 - of gRPC or of HTTP
        self.url, self._endpoints, self._client = url, endpoints, client

    async def models(self) -> Sequence[str]:
        """The names of the models that are ready, steps of an ensemble not counted. Raises ClientError."""
        if self._endpoints.kind == GRPC:
            found = [state.name for state in await self._client.models() if state.ready]
        elif self._endpoints.kind == GENERATE:
            found = list(await ready_models(self._client, self.url))
        else:
            found = list(await listed_models(self._client, self.url))
        return sorted({name for name in found if name not in STEP_MODELS})

    def target(self, model: str) -> Target:
        endpoints = self._endpoints
        if endpoints.kind == GRPC:
            return TritonTarget(self._client, model, endpoints.timeout_s)
        if endpoints.kind == GENERATE:
            return GenerateTarget(session=self._client, url=self.url, model=model)
        return OpenAITarget(
            session=self._client, url=self.url, model=model, extra=endpoints.extra or {}, endpoint=endpoints.kind
        )


async def _open(stack: AsyncExitStack, endpoints: Endpoints, url: str) -> _Opened:
    if endpoints.kind == GRPC:
        return _Opened(url, endpoints, await stack.enter_async_context(AsyncClient(url, tls=endpoints.tls)))
    session = opened_session(url, endpoints.timeout_s, endpoints.tls, endpoints.api_key)
    base = url.rstrip("/") if endpoints.kind == GENERATE else base_of(url)
    return _Opened(base, endpoints, await stack.enter_async_context(session))
