"""What the server says of itself while a load is measured: its metrics, read once a second."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

from clients.errors import MetricsUnavailable
from clients.top.figures import figures
from clients.top.scrape import History, read_metrics
from triton_repo.contracts.tls.client import ClientTls

INTERVAL_S = 1.0
_TIMEOUT_S = 5.0
_SERIES = ("streams", "waiting", "requests_running", "output_tokens_per_s", "cache_used_share", "cache_reserved_bytes")


class Beside:
    """Reads the metrics of one server in a thread of its own, between `start` and `stop`."""

    def __init__(self, url: str, tls: ClientTls | None, interval_s: float = INTERVAL_S) -> None:
        self._url, self._tls, self._interval_s = url, tls, interval_s

    def check(self) -> None:
        """Raise MetricsUnavailable or AddressInvalid where the metrics cannot be read."""
        read_metrics(self._url, self._tls, _TIMEOUT_S)

    def start(self) -> None:
        self._history = History(math.inf)  # keeps the first reading, so percentiles are those of the whole load
        self._samples: list[dict[str, Any]] = []
        self._faults, self._fault = 0, ""
        self._began, self._stops = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics beside", daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, Any]:
        """The samples of each engine, and its figures over the whole load, as JSON values."""
        self._stops.set()
        self._thread.join()
        self._read()
        found = figures(self._history) if self._history.whole else []
        return {
            "url": self._url,
            "interval_s": self._interval_s,
            "samples": self._samples,
            "engines": [{key: value for key, value in one.as_json().items() if key != "expert_load"} for one in found],
            "restarts_seen": self._history.restarts,
            "readings_failed": self._faults,
            "fault": self._fault or None,
        }

    def _run(self) -> None:
        while not self._stops.is_set():
            begun = time.monotonic()
            self._read()
            self._stops.wait(max(0.0, self._interval_s - (time.monotonic() - begun)))

    def _read(self) -> None:
        try:
            self._history.add(read_metrics(self._url, self._tls, _TIMEOUT_S))
        except MetricsUnavailable as error:
            self._faults, self._fault = self._faults + 1, str(error)
            return
        at_s = time.monotonic() - self._began
        for one in figures(self._history):
            values = {name: getattr(one, name) for name in _SERIES if getattr(one, name) is not None}
            self._samples.append({"at_s": at_s, "model": one.model, **values})
