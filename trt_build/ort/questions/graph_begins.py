"""Where the difference between a scoring graph and the reference on its codes begins: in which part of which layer.

The graph runs once more with what each layer's attention and its MLP or experts give as outputs, the reference layer by
layer until one of its parts differs from the graph's. Both run up to the first position that differs; what follows it
says nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from export.provider import PROVIDERS
from export.reference.model import Choose, Observe, Windows
from trt_build.comparison.answers import first_part
from trt_build.ort.device import Device
from trt_build.ort.engine import Engine
from trt_build.ort.questions.float32 import float32_experts
from trt_build.ort.questions.layer_outputs import PART_LIMITS, groups_of, layer_parts, room_for, with_outputs
from trt_build.ort.questions.stored_weights import FloatArray
from trt_build.ort.session import ScoringSession


class Observed(Protocol):
    """A reference that shows the parts of its layers, such as `export.reference.model.Reference`."""

    def observe(
        self, windows: Windows, observe: Observe, progress: Callable[[str], None], choose: Choose | None
    ) -> Iterator[int]:
        """As `export.reference.model.Reference.observe`."""


def where_graph_begins(
    engine: Engine,
    content: bytes,
    reference: Observed,
    choose: Choose | None,
    window: Sequence[int],
    progress: Callable[[str], None],
    device: Device | None,
) -> str:
    """The first part of a layer that differs over a window, as a sentence. `content` is the scoring graph with float32
    activations, `choose` which experts the reference takes."""
    facts, limit = engine.manifest.architecture, PART_LIMITS[PROVIDERS[engine.manifest.provider].float_type]
    names, differences = list[str](), list[float]()
    for group in groups_of(layer_parts(engine, content), facts.hidden_size, len(window)):
        with float32_experts():
            session = ScoringSession(engine, device=device, content=with_outputs(content, group))
            room = room_for(session.backend, group, 1, len(window), facts.hidden_size)
            session.run(window, room)
        del session
        given = {(part.layer, part.part): room.pop(part.value)[0] for part in group}
        compared: dict[tuple[int, str], float] = {}

        def observe(layer: int, part: str, values: FloatArray) -> None:
            if (found := given.pop((layer, part), None)) is not None:  # noqa: B023 - called in this turn alone
                compared[layer, part] = relative_difference(found, values)  # noqa: B023

        for _ in reference.observe([window], observe, progress, choose):
            if not given or not all(value <= limit for value in compared.values()):
                break
        done = [part for part in group if (part.layer, part.part) in compared]
        names += [part.name for part in done]
        differences += [compared[part.layer, part.part] for part in done]
        if not all(value <= limit for value in differences):
            break
    return first_part(names, differences, limit, rounded=False)


def relative_difference(found: FloatArray, expected: FloatArray) -> float:
    """The largest |found - expected| over the largest |expected|; NaN where one is."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.abs(found - expected).max() / np.abs(expected).max())
