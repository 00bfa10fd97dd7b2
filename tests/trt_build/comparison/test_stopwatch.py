from __future__ import annotations

from types import SimpleNamespace

import pytest

from trt_build.comparison import stopwatch
from trt_build.comparison.stopwatch import Stopwatch


def test_a_part_has_the_seconds_since_the_part_before_and_two_parts_of_a_name_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readings = iter([100.0, 101.5, 104.0, 104.25])
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(monotonic=lambda: next(readings)))
    watch = Stopwatch()
    for part in ("reference", "scoring", "reference"):
        watch.ended(part)
    assert watch.seconds == {"reference": 1.75, "scoring": 2.5}
