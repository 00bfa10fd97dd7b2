"""What a backend's verification gives to the command that prints it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trt_build.comparison.parity import Thresholds, Verification
from trt_build.comparison.serving_ways import ServingLimits


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A verification with the limits that it was judged by. `record` writes the result into engine.json."""

    verification: Verification
    precision: str
    limits: Thresholds
    serving_limits: ServingLimits
    record: Callable[[], None]
