"""An objective that requests should meet (an SLO), and which of the measured requests met it.

Goodput counts only requests that met the objective (Zhong et al., DistServe, 2024, section 2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clients.bench.records import Record
from export.errors import ConfigError

# The names of bounds as they are given, and the fields that they are kept in.
NAMES = {"ttft": "first_token_s", "itl": "between_tokens_s", "e2e": "answer_s"}
_BOUND = re.compile(r"(?:(\w+):)?(\d+(?:\.\d+)?)")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Upper bounds for one request, in seconds; None sets none.

    `first_token_s`: from when the request was due to its first token. `between_tokens_s`: the mean time between its
    tokens. `answer_s`: from when it was due to its end.
    """

    first_token_s: float | None = None
    between_tokens_s: float | None = None
    answer_s: float | None = None

    def verdict(self, record: Record) -> bool | None:
        """Whether a request met the objective. A failed request did not. None where the request was ended before that
        could be known: by the end of the load, or by the client because the load asks for that."""
        if record.error is not None or any(self._is_missed(record, name) for name in NAMES.values()):
            return False
        return True if record.is_answered else None

    def _is_missed(self, record: Record, name: str) -> bool:
        bound = getattr(self, name)
        if bound is None:
            return False
        value = getattr(record, name)
        if value is None and name != "between_tokens_s":  # it is still waited for; an answer of one token has no gaps
            value = (record.end_s or 0.0) - record.due_s
        return value is not None and value > bound

    def __str__(self) -> str:
        bounds = ((short, getattr(self, name)) for short, name in NAMES.items())
        return ",".join(f"{short}:{1e3 * value:g}" for short, value in bounds if value is not None)


def read_objective(text: str, what: str) -> Objective:
    """Read bounds in milliseconds: "ttft:500,itl:50,e2e:8000", some of them, or "500" for ttft alone. Raises
    ConfigError; `what` names the value in it."""
    bounds: dict[str, float] = {}
    for word in text.split(","):
        match = _BOUND.fullmatch(word.strip())
        name = NAMES.get(match[1] or "ttft") if match else None
        value = float(match[2]) / 1e3 if match else 0.0
        if match is None or name is None or name in bounds or not 0 < value < math.inf:
            raise ConfigError(
                f"reading {what}: found {text!r}, expected milliseconds such as 500 for the first token, or bounds "
                "such as ttft:500,itl:50,e2e:8000 (first token, between tokens, whole answer), each once and above 0"
            )
        bounds[name] = value
    return Objective(**bounds)


def goodput(records: Sequence[Record], objective: Objective, window_s: float) -> dict[str, Any]:
    """How many requests met the objective, what share of those that could be judged, and how many a second, as JSON
    values. A request counts in the rate where it ended in the window."""
    verdicts = [(objective.verdict(record), record) for record in records]
    met = [record for verdict, record in verdicts if verdict]
    missed = sum(verdict is False for verdict, _ in verdicts)
    in_time = sum((record.end_s or 0.0) <= window_s for record in met)
    return {
        "objective": str(objective),
        "met": len(met),
        "missed": missed,
        "unknown": len(records) - len(met) - missed,
        "share_met": len(met) / (len(met) + missed) if met or missed else None,
        "requests_per_s": in_time / window_s if window_s else None,
    }
