"""Finds the scales of int8 caches: runs the engine over a text and looks at what its cache holds.

A channel's scale is its largest magnitude over the text, divided by 127, and MARGIN times that, since other texts go
past it and what is cut off costs more than a coarser step. No scale is less than the mean of its head's channels before
the margin: a channel that a text leaves quiet may be loud in another. docs/kv-cache.md has the figures.

The rotary embedding turns two channels of a key into each other, by an angle that grows with the position, and a text
has few positions. The two therefore share the largest length of their pair, which no position can exceed.

The keys and values are those of the engine itself, quantised weights included, since these are what will be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from trt_build.errors import EngineError
from trt_build.ort.engine import Engine
from trt_build.ort.session import Session

LARGEST_CODE = 127
MARGIN = 1.2
Floats = npt.NDArray[np.float32]


def calibrate(
    engine: Engine, windows: Sequence[Sequence[int]], progress: Callable[[str], None] = lambda _: None
) -> Floats:
    """The scales [L, 2, G, D] for keys and values, over windows of token ids. Raises EngineError for an engine that
    cannot run here, and for keys or values that are not finite."""
    facts = engine.manifest.architecture
    session = Session(engine)
    cache = session.new_cache()
    largest = np.zeros((2 * facts.num_layers, facts.num_kv_heads, facts.head_size), dtype=np.float32)
    for number, window in enumerate(windows):
        progress(f"calibrating int8 caches: window {number + 1} of {len(windows)}")
        cache.shorten(0, 0)
        session.run(cache, window)
        for place, (here, found) in enumerate(zip(largest, cache.held(0), strict=True)):
            np.maximum(here, _magnitudes(found, facts.rotary_dim if place % 2 == 0 else 0), out=here)
    if not np.isfinite(largest).all():
        raise EngineError(
            f"calibrating int8 caches of {engine.folder}: its keys or values are not finite; look at the checkpoint's "
            "weights"
        )
    return _scales(largest).reshape(facts.num_layers, 2, facts.num_kv_heads, facts.head_size)


def _magnitudes(values: Floats, rotary_dim: int) -> Floats:
    """The largest magnitude of each channel of [G, T, D], and for the channels that the rotary embedding turns the
    largest length of their pair: [G, D]."""
    found: Floats = np.abs(values).max(axis=1)
    half = rotary_dim // 2
    if half:
        pairs = np.hypot(values[..., :half], values[..., half:rotary_dim]).max(axis=1)
        found[:, :half] = found[:, half:rotary_dim] = pairs
    return found


def _scales(largest: Floats) -> Floats:
    """The scales for the largest magnitudes [..., D], rounded up to eight significant bits, so that the last bits of
    another machine's arithmetic seldom show. A head that is zero throughout gets scales of 1."""
    scales = np.maximum(largest * MARGIN, largest.mean(axis=-1, keepdims=True)) / LARGEST_CODE
    mantissa, exponent = np.frexp(np.where(scales > 0, scales, 1.0))
    rounded: Floats = np.ldexp(np.ceil(mantissa * 256) / 256, exponent).astype(np.float32)
    return rounded
