"""Reads the metrics of a server once, and computes what has changed since an earlier time.

Counters and buckets are totals since a server began. Where one has fallen, the server has begun anew, and what was read
before says nothing of it.
"""

from __future__ import annotations

import http.client
import math
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from clients.errors import AddressInvalid, MetricsUnavailable
from export.optional import optional_package
from triton_repo.contracts.tls.client import ClientTls

MOST_BYTES = 1 << 26
WINDOW_S = 60.0  # of percentiles and of the experts' load
MOST_KEPT = 30  # readings of a window: one of 1,280 experts takes 1 MB
Labels = frozenset[tuple[str, str]]  # of one sample, the model's name included


@dataclass(frozen=True)
class Scrape:
    """The samples of one reading, by the stem of their name. `at_s` is on the clock of `time.monotonic`."""

    at_s: float
    values: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)

    def value(self, name: str, model: str, **labels: str) -> float | None:
        """The sum of the samples of this name, model and labels; None if there is none."""
        wanted = {("model", model), *labels.items()}
        found = [value for own, value in self.values.get(stem(name), {}).items() if wanted <= own]
        return sum(found) if found else None

    def by_label(self, name: str, model: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The samples of a name and model, by the values of these labels."""
        found: dict[tuple[str, ...], float] = {}
        for own, value in self.values.get(stem(name), {}).items():
            texts = dict(own)
            if texts.get("model") == model:
                key = tuple(texts.get(label, "") for label in labels)
                found[key] = found.get(key, 0.0) + value
        return found

    def models(self, prefix: str) -> set[str]:
        """The models that have a metric whose name begins so."""
        named = (values for name, values in self.values.items() if name.startswith(stem(prefix)))
        return {dict(labels)["model"] for values in named for labels in values if "model" in dict(labels)}


def stem(name: str) -> str:
    """A name as it is kept here: prometheus_client adds `_total` to the names of counters that lack it."""
    return name.removesuffix("_total")


def read_metrics(url: str, tls: ClientTls | None, timeout_s: float, api_key: str | None = None) -> Scrape:
    """Ask for the metrics. A key goes to `url` alone, not to where that redirects to. Raises MetricsUnavailable,
    AddressInvalid."""
    doing = f"reading the metrics of {url}"
    if not url.startswith(("http://", "https://")):
        raise AddressInvalid(f"{doing}: found no scheme, expected http://HOST:PORT/metrics, as `moeship serve` prints")
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    handlers += [urllib.request.HTTPSHandler(context=tls.context())] if tls else []
    try:
        request = urllib.request.Request(url)
        if api_key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {api_key}")
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as response:
            text = response.read(MOST_BYTES)
    except urllib.error.HTTPError as error:
        remedy = "; give --api-key or --api-key-env" if error.code in (401, 403) else ""
        raise MetricsUnavailable(f"{doing}: HTTP status {error.code}{remedy}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MetricsUnavailable(f"{doing}: {getattr(error, 'reason', None) or error}") from error
    return parse(text.decode("utf-8", "replace"), doing)


def parse(text: str, doing: str) -> Scrape:
    """The samples in a text of Prometheus' format 0.0.4. Raises MetricsUnavailable."""
    with optional_package("prometheus_client", "reading metrics", "client"):
        from prometheus_client.parser import text_string_to_metric_families
    values: dict[str, dict[Labels, float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values.setdefault(stem(sample.name), {})[frozenset(sample.labels.items())] = sample.value
    except (ValueError, IndexError, KeyError, AttributeError) as error:
        raise MetricsUnavailable(f"{doing}: what answers is no text of Prometheus ({error})") from error
    return Scrape(at_s=time.monotonic(), values=values)


class History:
    """The readings of the last WINDOW_S seconds of one server's life."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._scrapes: deque[Scrape] = deque()
        self.restarts = 0  # times that the counters were found to have begun anew

    def add(self, scrape: Scrape) -> None:
        if self._scrapes and has_restarted(self._scrapes[-1], scrape):
            self._scrapes.clear()
            self.restarts += 1
        elif len(self._scrapes) > 2 and self._scrapes[-2].at_s - self._scrapes[-3].at_s < self._window_s / MOST_KEPT:
            del self._scrapes[-2]  # the window begins at one of those that stay
        self._scrapes.append(scrape)
        while len(self._scrapes) > 2 and scrape.at_s - self._scrapes[1].at_s >= self._window_s:
            self._scrapes.popleft()

    @property
    def last(self) -> Change | None:
        """What changed between the last two readings; None where there are not two."""
        return Change(self._scrapes[-2], self._scrapes[-1]) if len(self._scrapes) > 1 else None

    @property
    def whole(self) -> Change | None:
        """What changed within the window."""
        return Change(self._scrapes[0], self._scrapes[-1]) if len(self._scrapes) > 1 else None

    @property
    def newest(self) -> Scrape:
        return self._scrapes[-1]


@dataclass(frozen=True)
class Change:
    """Two readings of the same life of a server."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        return max(1e-6, self.after.at_s - self.before.at_s)

    def grown(self, name: str, model: str, **labels: str) -> float | None:
        """By how much a counter has grown; None where the server has no such counter. One that is new began at 0."""
        after = self.after.value(name, model, **labels)
        return None if after is None else max(0.0, after - (self.before.value(name, model, **labels) or 0.0))

    def rate(self, name: str, model: str, **labels: str) -> float | None:
        """The same a second."""
        grown = self.grown(name, model, **labels)
        return None if grown is None else grown / self.seconds

    def grown_by(self, name: str, model: str, *labels: str) -> dict[tuple[str, ...], float]:
        """By how much the counters of a name have grown, by the values of these labels."""
        before = self.before.by_label(name, model, *labels)
        after = self.after.by_label(name, model, *labels)
        return {key: max(0.0, value - before.get(key, 0.0)) for key, value in after.items()}

    def quantile(self, name: str, model: str, share: float) -> float | None:
        """The value below which a share of the values lies that a histogram got meanwhile; None where it got none.

        Within a bucket values are taken to lie evenly, as by Prometheus' histogram_quantile. In the last, which has no
        upper bound, that is its lower one.
        """
        counts = {float(bound): count for (bound,), count in self.grown_by(f"{name}_bucket", model, "le").items()}
        buckets = sorted(counts.items())
        if not buckets or not buckets[-1][1]:
            return None
        wanted, lower, below = share * buckets[-1][1], 0.0, 0.0
        for bound, count in buckets:
            if count >= wanted and count > below:
                if math.isinf(bound):
                    return lower
                return lower + (bound - lower) * (wanted - below) / (count - below)
            lower, below = bound, count
        return lower


def has_restarted(before: Scrape, after: Scrape) -> bool:
    """Whether a counter has fallen, or a model that had counters has none."""
    for name, labels, value in _counters(before):
        found = after.values.get(name, {}).get(labels)
        if found is None or found < value:
            return True
    return False


def _counters(scrape: Scrape) -> Iterator[tuple[str, Labels, float]]:
    """The counters that tell a restart: the steps of engines and the requests of models."""
    for name in ("moeship_steps", "nv_inference_request_success"):
        for labels, value in scrape.values.get(name, {}).items():
            yield name, labels, value
