"""Looks at a server again and again, whether it answers or not."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from clients.errors import MetricsUnavailable
from clients.top.figures import Figures, figures
from clients.top.scrape import History, read_metrics
from triton_repo.contracts.tls.client import ClientTls

LONGEST_READ_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was found at one time. Where the server does not answer, `engines` are those of the last answer."""

    time: datetime
    url: str
    engines: tuple[Figures, ...] = ()
    fault: str = ""  # why there was no answer
    silent_s: float = 0.0  # since the last answer, or the first look
    restarts: int = 0  # times that the server was found to have begun anew

    def as_json(self) -> dict[str, object]:
        return {
            "time": self.time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "url": self.url,
            "up": not self.fault,
            "fault": self.fault or None,
            "restarts_seen": self.restarts,
            "engines": [] if self.fault else [each.as_json() for each in self.engines],
        }


class Watcher:
    """Looks at one server. `since_start`: percentiles count since the server's start. `api_key` is sent to it."""

    def __init__(
        self,
        url: str,
        tls: ClientTls | None,
        interval_s: float,
        *,
        since_start: bool = False,
        api_key: str | None = None,
    ) -> None:
        self.url, self._tls, self._interval_s, self._since_start = url, tls, interval_s, since_start
        self._api_key = api_key
        self._history = History()
        self._engines: tuple[Figures, ...] = ()
        self._answered = time.monotonic()

    def look(self, *, patient: bool = True) -> Look:
        """Read the metrics. If not `patient`, raises MetricsUnavailable where there is no answer."""
        fault = ""
        try:
            # Where no next frame waits for it, a busy server is given more time than the interval.
            timeout_s = max(1.0, min(self._interval_s, LONGEST_READ_S)) if patient else LONGEST_READ_S
            self._history.add(read_metrics(self.url, self._tls, timeout_s, self._api_key))
            self._engines = tuple(figures(self._history, since_start=self._since_start))
            self._answered = time.monotonic()
        except MetricsUnavailable as error:
            if not patient:
                raise
            fault = str(error)
        return Look(
            time=datetime.now(UTC),
            url=self.url,
            engines=self._engines,
            fault=fault,
            silent_s=time.monotonic() - self._answered,
            restarts=self._history.restarts,
        )

    def follow(self) -> tuple[queue.SimpleQueue[Look | Exception], threading.Event]:
        """Look in a thread until the event is set. The queue gets every look, and an exception that ends the thread."""
        found: queue.SimpleQueue[Look | Exception] = queue.SimpleQueue()
        stops = threading.Event()

        def run() -> None:
            try:
                while not stops.is_set():
                    begun = time.monotonic()
                    found.put(self.look())
                    stops.wait(max(0.0, self._interval_s - (time.monotonic() - begun)))
            except Exception as error:  # whatever it is, the one who draws raises it
                found.put(error)

        threading.Thread(target=run, name="top", daemon=True).start()
        return found, stops
