"""Second question: does the graph compute what the codes say?

The scoring graph, with float32 activations in its quantised products, is compared with the streamed reference on the
dequantised codes of the same engine (`stored_weights.py`). So the quantiser's error is on both sides, and what is left
is the order of summation, at every precision. A fault of a node, an edge or a kernel shows at its full size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from export.exporter import SCORING_GRAPH
from export.families import Model
from export.provider import PROVIDERS
from export.reference.model import Reference
from export.reference.remaining import RemainingReference
from trt_build.comparison.answers import Answer, behind_routers, first_layer, off
from trt_build.comparison.limits import graph_limit
from trt_build.ort.device import Device
from trt_build.ort.engine import Engine
from trt_build.ort.questions.float32 import float32_experts, with_float32_activations
from trt_build.ort.questions.graph_begins import relative_difference, where_graph_begins
from trt_build.ort.questions.stored_weights import FloatArray, StoredWeights, open_stored_weights
from trt_build.ort.session import ScoringSession

QUESTION = "Does the graph compute what the codes say?"
GRAPH_TOKENS = 256  # tokens of the text that are compared


def ask_about_graph(
    engine: Engine,
    model: Model,
    token_ids: Sequence[int],
    progress: Callable[[str], None] = lambda _: None,
    device: Device | None = None,
) -> Answer:
    """Compare an engine's scoring graph with the reference on what the engine stores, over the first GRAPH_TOKENS of a
    text. Raises EngineError for graphs that cannot be read or loaded."""
    stored = open_stored_weights(engine, model)
    missing = next((name for name in stored.table if stored.misfit(name)), None)
    if missing is not None:
        return Answer(question=QUESTION, unasked=f"the engine does not store {missing} in its shape")
    window = list(token_ids[:GRAPH_TOKENS])
    with float32_experts():
        content = with_float32_activations(engine.folder, SCORING_GRAPH)
        try:
            session = ScoringSession(engine, device=device, content=content)
            found, found_routing = session.run(window)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            return Answer(question=QUESTION, failures=(f"ONNX Runtime cannot run {SCORING_GRAPH}: {error}",))
    del session
    limit = graph_limit(PROVIDERS[engine.manifest.provider].float_type)
    choices = _Choices(found_routing, model.architecture.experts_per_token, limit)
    reference = _reference(engine, model, stored)
    choose = choices if found_routing is not None else None
    [(expected, expected_routing)] = reference.run([window], progress, choose=choose)
    figures: dict[str, Any] = {"num_tokens": len(window), "allowed": limit, "near_ties": choices.near_ties}
    layers = model.architecture.mixture_layers if found_routing is not None else ()
    routers = [relative_difference(*both) for both in _by_layer(found_routing, expected_routing)]
    where = first_layer(layers, routers, limit)
    failures = [] if where is None else [where]
    logits = relative_difference(found, expected)
    if not logits <= limit:
        last = f", and {behind_routers(layers)}" if layers and where is None else ""
        failures.append(f"the logits differ{last}: {off(logits, limit)}")
    if failures:
        progress("looking for the layer in which the graph begins to differ from its codes")
        first = _first_position(found, expected, limit)
        choose = choices.of(first + 1) if found_routing is not None else None
        begin = where_graph_begins(engine, content, reference, choose, window[: first + 1], progress, device)
        failures[-1] += f"; {begin}"
    figures |= {"logits": logits, "routers": dict(zip(map(str, layers), routers, strict=True))}
    return Answer(question=QUESTION, figures=figures, failures=tuple(failures))


def _by_layer(found: FloatArray | None, expected: FloatArray | None) -> Iterator[tuple[FloatArray, FloatArray]]:
    """The router logits [S, E] of engine and reference, of each layer that has experts."""
    if found is not None and expected is not None:
        yield from zip(found, expected, strict=True)


def _first_position(found: FloatArray, expected: FloatArray, limit: float) -> int:
    """The first position whose logits [S, V] differ by more than the limit of the largest; without one the last."""
    with np.errstate(invalid="ignore"):
        wrong = np.flatnonzero(~(np.abs(found - expected).max(axis=1) <= limit * np.abs(expected).max()))
    return int(wrong[0]) if len(wrong) else len(found) - 1


def _reference(engine: Engine, model: Model, stored: StoredWeights) -> Reference | RemainingReference:
    """The reference on what the engine stores, without the experts that were dropped."""
    whole, lacking = Reference(dataclasses.replace(model, weights=stored)), engine.manifest.lacking_experts
    return RemainingReference(whole, model.architecture.mixture_layers, lacking) if lacking else whole


class _Choices:
    """Which experts the reference takes: its own, and the engine's where the logits of those that differ are within
    `limit` of each other, relative to the largest logit. There the order of summation decides, and either is right."""

    def __init__(self, found: FloatArray | None, experts_per_token: int, limit: float) -> None:
        self.found = found  # the engine's router logits [M, S, E]
        self.near_ties = 0
        self._experts_per_token, self._limit = experts_per_token, limit

    def of(self, num_tokens: int) -> _Choices:
        """The same for the first tokens alone."""
        found = None if self.found is None else self.found[:, :num_tokens]
        return _Choices(found, self._experts_per_token, self._limit)

    def __call__(self, mixture: int, logits: FloatArray) -> npt.NDArray[np.int64]:
        assert self.found is not None
        k = self._experts_per_token
        own, theirs = (np.argsort(-part, axis=-1, kind="stable")[:, :k] for part in (logits, self.found[mixture]))
        least = np.take_along_axis(logits, own, axis=-1).min(axis=-1)
        gap = least - np.take_along_axis(logits, theirs, axis=-1).min(axis=-1)
        other = (np.sort(own, axis=-1) != np.sort(theirs, axis=-1)).any(axis=-1)
        near = other & (gap <= self._limit * np.abs(logits).max())
        self.near_ties += int(near.sum())
        own[near] = theirs[near]
        return own
