"""The line that a build shows while it works."""

from __future__ import annotations

import io

from export.conversion.writer import Progress
from trt_build.progress_line import ProgressLine, describe

HALF = Progress(
    parts=40,
    num_parts=100,
    resumed_parts=10,
    bytes=5_000_000_000,
    num_bytes=15_000_000_000,
    resumed_bytes=2_000_000_000,
)


def test_rate_and_time_left_count_what_this_run_converts():
    # 3 GB in 6 s are 500 MB/s; the 10 GB that are left take 20 s.
    assert describe(HALF, 6.0) == "part 40 of 100, 5.00 of 15.00 GB read, 500 MB/s, 0:20 left"
    assert describe(HALF, 600.0).endswith(" 5 MB/s, 33:20 left")


def test_before_anything_is_read_there_is_no_rate():
    start = Progress(parts=10, num_parts=100, resumed_parts=10, bytes=2, num_bytes=15, resumed_bytes=2)
    assert describe(start, 3.0) == "part 10 of 100, 0.00 of 0.00 GB read"


def test_the_line_is_written_over_until_the_last_part():
    stream = io.StringIO()
    line = ProgressLine(stream)
    line(HALF)
    line(Progress(parts=100, num_parts=100, resumed_parts=10, bytes=3, num_bytes=3, resumed_bytes=3))
    first, second = stream.getvalue().split("\r")[1:]
    assert not first.endswith("\n")
    assert second.endswith("\n")
