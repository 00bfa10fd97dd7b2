"""What keys and values in int8 cost: an engine with caches in int8 against the same engine with caches in float.

Both run the same text in chunks, as a server does, and give the logits of every position. Weights, kernels and graph
are the same, so the difference is the cache's. A quantised engine rounds activations to 8 bits besides, which makes
more of any small difference: a code that was nearly halfway becomes another one. So such an engine is compared once
more with float32 activations, and that figure, which is the cache's own, is judged by MOST_MEAN_KL. As it is served,
an engine must keep the limit that it has for its mean KL from the reference. A limit is missed where the mean is past
it by CERTAIN_ERRORS standard errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from export.exporter import INT8_CACHE_GRAPH, SERVING_GRAPH
from export.provider import FLOAT, INT8
from trt_build.comparison.answers import OF_INT8_CACHE, Answer
from trt_build.comparison.parity import CERTAIN_ERRORS, FloatArray, log_softmax
from trt_build.ort.engine import Engine
from trt_build.ort.int8_cache.graph import graph_failures
from trt_build.ort.questions.float32 import float32_experts, with_float32_activations
from trt_build.ort.session import PREFILL_CHUNK_TOKENS, Session
from trt_build.ort.step_call import Row

MOST_MEAN_KL = 1e-3  # nats
CACHE_TOKENS = 1024  # that are compared


@dataclass(frozen=True, kw_only=True)
class _Loss:
    """Of each position [S]: the KL divergence from the engine with caches in float, in nats, and whether the most
    likely token is the same."""

    kl: npt.NDArray[np.float64]
    same: npt.NDArray[np.bool_]

    @property
    def mean(self) -> float:
        return float(self.kl.mean())

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return float(self.kl.std() / np.sqrt(len(self.kl)))

    def is_past(self, limit: float) -> bool:
        """Whether the mean is past a limit for certain: one token for which a router chooses another expert can make
        a third of it. NaN is."""
        return not self.mean - CERTAIN_ERRORS * self.error <= limit


def ask_about_int8_cache(engine: Engine, windows: Sequence[Sequence[int]]) -> Answer:
    """Measure what int8 caches cost over the first CACHE_TOKENS of windows of token ids that calibration has not seen.
    Raises EngineError as `Session` does."""
    starts = list(accumulate(map(len, windows), initial=0))
    windows = [one[: CACHE_TOKENS - start] for start, one in zip(starts, windows, strict=False) if start < CACHE_TOKENS]
    served = _measure(engine, windows)
    figures: dict[str, Any] = {
        "num_tokens": len(served.kl), "kl": served.mean, "kl_error": served.error,
        "p99_kl": float(np.quantile(served.kl, 0.99)), "max_kl": float(served.kl.max()),
        "top1": float(served.same.mean()), "allowed": MOST_MEAN_KL,
    }  # fmt: skip
    judged = [(served, max(MOST_MEAN_KL, engine.manifest.thresholds.mean_kl), "")]
    if engine.manifest.precision.quantises:
        with float32_experts():
            graphs = [with_float32_activations(engine.folder, name) for name in (SERVING_GRAPH, INT8_CACHE_GRAPH)]
            exact = _measure(engine, windows, *graphs)
        figures["kl_float32_activations"] = exact.mean
        judged.append((exact, MOST_MEAN_KL, ", and activations in float32,"))
    failures = [
        f"with keys and values in int8{how} the mean KL from the same engine with floats is {loss.mean:.2g} nats, with "
        f"a standard error of {loss.error:.1g}, allowed {most:.0e}; serve it with --kv float"
        for loss, most, how in judged
        if loss.is_past(most)
    ]
    failures += graph_failures(engine)
    return Answer(question=OF_INT8_CACHE, figures={"int8_cache": figures}, failures=tuple(failures))


def _measure(
    engine: Engine, windows: Sequence[Sequence[int]], float_graph: bytes | None = None, int8_graph: bytes | None = None
) -> _Loss:
    """The loss over windows, with other graphs in place of the stored ones."""
    expected = [chunk.copy() for chunk in _logits(engine, windows, FLOAT, float_graph)]
    kl, same = [], []
    for theirs, ours in zip(map(log_softmax, expected), _logits(engine, windows, INT8, int8_graph), strict=True):
        kl.append((np.exp(theirs) * (theirs - log_softmax(ours))).sum(axis=-1))
        same.append(ours.argmax(axis=-1) == theirs.argmax(axis=-1))
    return _Loss(kl=np.concatenate(kl), same=np.concatenate(same))


def _logits(
    engine: Engine, windows: Sequence[Sequence[int]], kv_cache: str, graph: bytes | None
) -> Iterator[FloatArray]:
    """The logits of windows in chunks, each [n, V] and valid until the next."""
    session = Session(engine, content=graph, kv_cache=kv_cache)
    cache = session.new_cache()
    for window in windows:
        cache.shorten(0, 0)
        for start in range(0, len(window), PREFILL_CHUNK_TOKENS):
            chunk = window[start : start + PREFILL_CHUNK_TOKENS]
            yield session.step(cache, [Row(slot=0, token_ids=chunk, num_logits=len(chunk))])
