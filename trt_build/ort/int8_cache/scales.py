"""Reads the scales of an engine's int8 caches and checks them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from export.checkpoint.safetensors_header import read_header
from export.errors import CheckpointError
from export.onnx_graph.kv_scales import SCALES_FILE, planned_scales
from export.provider import PER_POSITION
from trt_build.errors import EngineError
from trt_build.ort.engine import Engine

REMEDY = "build it again with --kv int8, or leave --kv int8 out here"
Floats = npt.NDArray[np.float32]


def require_int8_cache(engine: Engine, doing: str) -> None:
    """Raise EngineError, whose message begins with `doing`, for an engine that was built without int8 caches."""
    if engine.manifest.kv_cache is None:
        raise EngineError(f"{doing}: it was built without keys and values in int8; {REMEDY}")


def check_int8_cache(engine: Engine) -> None:
    """Raise EngineError as `read_scales` does, for an engine whose scales are not found as positions are written."""
    if engine.manifest.cache_scales != PER_POSITION:
        read_scales(engine)


def read_scales(engine: Engine) -> Floats:
    """The scales [L, 2, G, D] of keys and values. Raises EngineError for an engine without them, and for scales that
    are missing, not of the engine's shape, not finite or not positive."""
    doing = f"loading the engine {engine.folder} for caches in int8"
    require_int8_cache(engine, doing)
    facts, path = engine.manifest.architecture, engine.folder / SCALES_FILE
    planned = planned_scales(facts)
    try:
        stored = {tensor.name: tensor for tensor in read_header(path)}
    except (CheckpointError, OSError) as error:
        raise EngineError(f"{doing}: its scales cannot be read ({error}); {REMEDY}") from error
    found = np.empty((len(planned), facts.num_kv_heads, facts.head_size), dtype=np.float32)
    content = path.read_bytes()
    for place, tensor in zip(found, planned, strict=True):
        one = stored.get(tensor.name)
        if one is None or (one.dtype, one.shape) != (tensor.dtype, tensor.shape):
            what = "is missing" if one is None else f"is {one.dtype} {list(one.shape)}"
            expected = f"{tensor.dtype} {list(tensor.shape)}"
            raise EngineError(f"{doing}: {tensor.name} {what} in {SCALES_FILE}, expected {expected}; {REMEDY}")
        place[:] = np.frombuffer(content, dtype="<f4", count=place.size, offset=one.offset).reshape(place.shape)
        wrong = ~((place > 0) & np.isfinite(place))
        if wrong.any():
            head, channel = (int(index[0]) for index in np.nonzero(wrong))
            raise EngineError(
                f"{doing}: {tensor.name} has {float(place[head, channel])} for head {head}, channel {channel}, "
                f"expected a positive number; {REMEDY}"
            )
    return found.reshape(facts.num_layers, 2, facts.num_kv_heads, facts.head_size)
