"""The endpoints of a batch: which of them gets a request, which is left alone for a while, and which model they have.

An endpoint that asks to be left alone (Retry-After) gets nothing until then. One that cannot be reached gets nothing
until it answers again; its requests go to the others. Where none can be reached for `patience_s`, the batch stops.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

from clients.batch.endpoints import Access, Endpoint, open_endpoint
from clients.errors import AccessDenied, BatchStopped, ClientError, EndpointsDisagree
from export.errors import named as named_safely
from export.errors import names

logger = logging.getLogger(__name__)

POLL_S = 1.0  # between two questions to an endpoint that is away
_TURN_S = 0.5  # a waiting request looks at the endpoints at least this often


@dataclass(eq=False)
class Place:
    """An endpoint and what is known of it."""

    endpoint: Endpoint
    in_flight: int = 0
    open_at: float = 0.0  # time of the loop until which it asked to be left alone
    away: str | None = None  # why it cannot be asked at present


@dataclass(kw_only=True)
class Pool:
    """The endpoints at `urls`, each with at most `concurrency` requests at a time. Enter it in the running loop."""

    urls: Sequence[str]
    access: Access
    concurrency: int
    patience_s: float
    places: list[Place] = field(default_factory=list)

    async def __aenter__(self) -> Pool:
        self._free = asyncio.Event()
        self._pollers: set[asyncio.Task[None]] = set()
        self._denied: AccessDenied | None = None
        self._last_up = asyncio.get_running_loop().time()
        try:
            for url in dict.fromkeys(self.urls):
                self.places.append(Place(open_endpoint(url, self.access)))
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._pollers:
            task.cancel()
        await asyncio.gather(*self._pollers, return_exceptions=True)
        await asyncio.gather(*(place.endpoint.close() for place in self.places))

    async def take(self, failed: Collection[Place] = ()) -> Place:
        """A place at the endpoint with the fewest requests in flight of those that may be asked; waits until there is
        one. Those where the request has `failed` are left out where others are open. Give the place back with `give`.
        Raises BatchStopped, and AccessDenied."""
        loop = asyncio.get_running_loop()
        while True:
            self._free.clear()
            if self._denied is not None:
                raise self._denied
            now = loop.time()
            up = [place for place in self.places if place.away is None]
            opened = [place for place in up if place.open_at <= now]
            # One that fails at once is always free: without this it would draw most requests, and fail them for good.
            opened = [place for place in opened if place not in failed] or opened
            able = [place for place in opened if place.in_flight < self.concurrency]
            if up:
                self._last_up = now
            elif now - self._last_up > self.patience_s:
                raise BatchStopped(
                    f"sending the batch: no endpoint could be reached for {self.patience_s:g} s: "
                    + "; ".join(str(place.away) for place in self.places)
                )
            if able:
                place = min(able, key=lambda one: one.in_flight)
                place.in_flight += 1
                return place
            next_s = min((place.open_at - now for place in up if place.open_at > now), default=_TURN_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._free.wait(), min(next_s, _TURN_S))

    def give(self, place: Place) -> None:
        place.in_flight -= 1
        self._free.set()

    def pause(self, place: Place, seconds: float) -> None:
        """Leave an endpoint alone for some time."""
        place.open_at = max(place.open_at, asyncio.get_running_loop().time() + seconds)

    def lose(self, place: Place, reason: str) -> None:
        """Send nothing to an endpoint until it answers again."""
        if place.away is not None:
            return
        place.away = reason
        logger.warning("an endpoint is away: %s", reason)
        task = asyncio.create_task(self._poll(place))
        self._pollers.add(task)
        task.add_done_callback(self._pollers.discard)

    async def _poll(self, place: Place) -> None:
        while place.away is not None:
            await asyncio.sleep(POLL_S)
            try:
                found = await place.endpoint.models()
            except AccessDenied as error:
                self._denied = error
            except ClientError as error:
                place.away = str(error)
                continue
            else:
                if found is not None and not self.access.models <= found:
                    place.away = f"{place.endpoint.url} does not have {names(sorted(self.access.models - found))}"
                    continue
                logger.info("%s answers again", place.endpoint.url)
            place.away = None
            self._free.set()


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The models of a batch: those that its endpoints have, and the one for lines that name none."""

    models: frozenset[str]
    default: str | None


async def agree(pool: Pool, named: frozenset[str], *, needs_model: bool) -> Agreement:
    """Check that the endpoints have the same of the models that a batch names. `needs_model` says whether lines name
    none; these go to the only model that the endpoints have.

    Raises EndpointsDisagree, also where no endpoint has any of the models, and ClientError for an endpoint that does
    not answer."""
    known: dict[str, frozenset[str]] = {}
    found = await asyncio.gather(*(place.endpoint.models() for place in pool.places))
    for place, models in zip(pool.places, found, strict=True):
        if models is not None:
            known[place.endpoint.url] = models
    there = "; ".join(f"{url} has {names(sorted(models)) or 'none'}" for url, models in known.items())
    doing = "choosing the model of the batch"
    every = frozenset[str]().union(*known.values())
    common = every.intersection(*known.values())
    absent = named - every if known else frozenset[str]()
    if (named & every) - common or (absent and absent == named):
        raise EndpointsDisagree(
            f"{doing}: not all endpoints have {names(sorted(named - common))}: {there}; give endpoints that have the "
            "same models, or --model NAME to send every line to that one"
        )
    for name in sorted(absent):
        logger.warning("no endpoint has the model %s: lines that name it will fail", named_safely(name))
    default = None
    if needs_model:
        if len(known) < len(pool.places) or len(every) != 1 or common != every:
            raise EndpointsDisagree(
                f"{doing}: lines name none, and the endpoints do not have one and the same model alone: "
                f"{there or 'they do not tell their models'}; give --model NAME"
            )
        default = next(iter(every))
    # A model that no endpoint tells of is not among them, or its absence would pass for one that ends by itself.
    return Agreement(models=(named & every) | ({default} if default else set()), default=default)
