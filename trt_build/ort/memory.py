"""The memory that an engine needs to run, compared with the memory available, before anything is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np

from export.architecture import Architecture
from export.onnx_graph.kv_records import record_bytes
from export.provider import FLOAT, INT8, PER_POSITION, PROVIDERS, Provider
from trt_build.errors import EngineError
from trt_build.machine.memory import available_memory
from trt_build.ort.engine import Engine


def cache_dtype(provider: Provider, kv_cache: str = FLOAT) -> np.dtype[Any]:
    """The dtype of keys and values in a cache that commands call `kv_cache`."""
    return np.dtype(np.int8 if kv_cache == INT8 else provider.float_type)


def cache_width(architecture: Architecture, kv_cache: str, scales: str) -> int:
    """The numbers of that dtype that a head's key or value of one position takes; `scales` says what those of int8 are
    for."""
    size = architecture.head_size
    return record_bytes(size) if (kv_cache, scales) == (INT8, PER_POSITION) else size


def kv_bytes_per_token(architecture: Architecture, provider: Provider, kv_cache: str, scales: str) -> int:
    """Bytes of the keys and values of one position in all layers."""
    numbers = 2 * architecture.num_layers * architecture.num_kv_heads * cache_width(architecture, kv_cache, scales)
    return numbers * cache_dtype(provider, kv_cache).itemsize


def kv_bytes_of(engine: Engine, kv_cache: str = FLOAT) -> int:
    """Bytes of the keys and values of one position of an engine."""
    manifest = engine.manifest
    return kv_bytes_per_token(manifest.architecture, PROVIDERS[manifest.provider], kv_cache, manifest.cache_scales)


def require_memory(engine: Engine, available: int | None = None, kv_cache: str = FLOAT) -> None:
    """Raise EngineError if the weights and the cache of one sequence exceed `available` bytes (None: ask the machine).

    Engines of a provider with its own memory, such as CUDA, are not checked.
    """
    manifest = engine.manifest
    if manifest.provider != "cpu":
        return
    have = available_memory() if available is None else available
    weights = engine.resident_bytes
    per_token = kv_bytes_of(engine, kv_cache)
    cache = per_token * manifest.max_sequence
    if weights + cache <= have:
        return
    fitting = (have - weights) // per_token
    remedy = (
        f"free memory, or build it with --max-sequence {fitting}, which fits"
        if fitting > 0
        else "free memory, or build a lower precision: the weights alone do not fit"
    )
    raise EngineError(
        f"loading {engine.folder} for sequences of {manifest.max_sequence} tokens: found {have / 1e9:.2f} GB of memory "
        f"available, expected {weights / 1e9:.2f} GB for the weights and {cache / 1e9:.2f} GB for keys and values; "
        f"{remedy}"
    )
