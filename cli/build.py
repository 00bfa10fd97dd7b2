"""Build an engine directory from a checkpoint; the same as `python trt_build/build_engine.py`."""

from __future__ import annotations

from trt_build.build_engine import add_arguments, run

__all__ = ["add_arguments", "run"]
