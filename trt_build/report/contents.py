"""What the page of `moeship verify --report` shows. Nothing here depends on a backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_build.comparison.evaluation_text import EvaluationText
from trt_build.comparison.parity import Thresholds
from trt_build.comparison.serving_ways import ServingLimits

Rows = tuple[tuple[str, str], ...]  # names and values


@dataclass(frozen=True, kw_only=True)
class ReportedEngine:
    """An engine: its name on the page, facts, and the result of its verification in the form of engine.json. `record`
    is None for an engine that was never verified; `note` says why there is no measurement of this run."""

    name: str
    facts: Rows
    record: Mapping[str, Any] | None
    limits: Thresholds
    serving: ServingLimits | None
    kl: npt.NDArray[np.float64] | None = None  # [N], nats, of the scored positions
    note: str | None = None

    @property
    def failures(self) -> tuple[str, ...]:
        return tuple(map(str, (self.record or {}).get("failures", ())))

    @property
    def verdict(self) -> str:
        if self.record is None:
            return "not verified"
        return "FAILED" if self.failures else "passed"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The most likely next token as text, and its probability."""

    text: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Place:
    """A position of the text: the text before it, the token that follows there, and what the reference and each engine
    would choose. An engine that did not score the position has None."""

    number: int  # among the scored positions, from 0
    before: str
    following: str
    reference: Choice
    engines: tuple[Choice | None, ...]
    kl: tuple[float | None, ...]  # nats


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token of greedy text. `instead` is the token that the reference would have chosen there, None for the same."""

    text: str
    instead: str | None = None


@dataclass(frozen=True, kw_only=True)
class GreedyText:
    """A prompt and how each engine goes on; None for an engine that writes none here."""

    prompt: str
    engines: tuple[tuple[Token, ...] | None, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the page shows, in its order."""

    model: str
    facts: Rows
    engines: tuple[ReportedEngine, ...]
    places: tuple[Place, ...]
    texts: tuple[GreedyText, ...]
    text: EvaluationText
    num_tokens: int
    mixture_layers: tuple[int, ...]
    versions: Mapping[str, str]
    command: str
