"""Runs an engine on ONNX Runtime: prefill and decode over preallocated key/value buffers.

    session = Session(open_engine("engine"))
    cache = session.new_cache()
    logits = session.run(cache, prompt_ids)      # float32 [V] of the last position
    logits = session.run(cache, [next_id])

The cache's buffers are bound once, as both past and present, so a step writes its S new positions in place and copies
nothing. Verification, serving and the demo all use this class, so what was verified is what is served. On CUDA the
buffers and the mask are on the device; a step copies token ids to the device and one row of logits back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from export.exporter import SCORING_GRAPH, SERVING_GRAPH
from export.onnx_graph import names
from trt_build.engine import Engine
from trt_build.engine_memory import require_memory
from trt_build.errors import EngineError, SequenceError
from trt_build.ort.device import Device, load_graph, open_device

PREFILL_CHUNK_TOKENS = 128  # limits activation memory, and the time until a server next checks for cancellation


class Cache:
    """Key and value buffers of one sequence, each [1, G, C, D] in the provider's float type on its device, and the
    number of positions that they hold."""

    def __init__(self, session: Session) -> None:
        facts = session.engine.manifest.architecture
        shape = (1, facts.num_kv_heads, session.max_sequence, facts.head_size)
        self.length = 0
        self.binding = session.backend.io_binding()
        self._buffers = []
        for layer in range(facts.num_layers):
            for past, present in (
                (names.past_key(layer), names.present_key(layer)),
                (names.past_value(layer), names.present_value(layer)),
            ):
                buffer = session.device.zeros(shape)
                self._buffers.append(buffer)
                self.binding.bind_ortvalue_input(past, buffer)
                self.binding.bind_ortvalue_output(present, buffer)

    def reset(self) -> None:
        """Set the number of positions to 0; the buffers stay allocated."""
        self.length = 0


class Session:
    """An engine's serving graph, loaded. `threads` None lets ONNX Runtime use every physical core; `device_index` is
    the number of the GPU."""

    def __init__(self, engine: Engine, threads: int | None = None, device_index: int = 0) -> None:
        if engine.manifest.backend != "onnxruntime":
            raise EngineError(
                f"loading the engine {engine.folder}: built for {engine.manifest.backend}, "
                "this session runs onnxruntime engines"
            )
        require_memory(engine)
        self.engine = engine
        self.max_sequence = engine.manifest.max_sequence
        self.vocab_size = engine.manifest.architecture.vocab_size
        self.device = open_device(engine, device_index)
        self.backend = load_graph(engine, SERVING_GRAPH, self.device, threads)
        self._mask = self.device.place(np.ones((1, self.max_sequence), dtype=np.int64))
        self._logits = np.zeros((1, 1, self.vocab_size), dtype=np.float32)

    def new_cache(self) -> Cache:
        """An empty cache of max_sequence positions."""
        return Cache(self)

    def run(self, cache: Cache, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens to a sequence; returns the logits of the last token, float32 [V], valid until the next run.

        Raises SequenceError for no tokens, ids outside the vocabulary, or more tokens than the cache has room for,
        EngineError for logits that are not finite.
        """
        ids = np.asarray(token_ids, dtype=np.int64).reshape(1, -1)
        self._check(cache, ids)
        for start in range(0, ids.shape[1], PREFILL_CHUNK_TOKENS):
            self._step(cache, ids[:, start : start + PREFILL_CHUNK_TOKENS])
        if not np.isfinite(self._logits.sum()):
            raise EngineError(
                f"running the engine {self.engine.folder}: its logits are not finite; check it with moeship verify"
            )
        return self._logits[0, 0]

    def _step(self, cache: Cache, ids: npt.NDArray[np.int64]) -> None:
        total = cache.length + ids.shape[1]
        ids = np.ascontiguousarray(ids)
        binding, device = cache.binding, self.device
        binding.bind_input(names.INPUT_IDS, "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        binding.bind_input(names.ATTENTION_MASK, device.kind, device.index, np.int64, (1, total), self._mask.data_ptr())
        binding.bind_output(names.LOGITS, "cpu", 0, np.float32, self._logits.shape, self._logits.ctypes.data)
        self.backend.run_with_iobinding(binding)
        cache.length = total

    def _check(self, cache: Cache, ids: npt.NDArray[np.int64]) -> None:
        if not ids.size:
            raise SequenceError("running the engine: found no tokens, expected at least one")
        if cache.length + ids.size > self.max_sequence:
            raise SequenceError(
                f"running the engine: {ids.size} tokens after {cache.length} exceed its context of "
                f"{self.max_sequence}; shorten the prompt or ask for fewer tokens"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise SequenceError(
                f"running the engine: token id {low if low < 0 else high} is outside its vocabulary of "
                f"{self.vocab_size}; encode the text with this engine's tokenizer"
            )


class ScoringSession:
    """An engine's scoring graph: logits of every position and the router's logits, without a cache. `device` None opens
    a device of the engine's provider."""

    def __init__(self, engine: Engine, threads: int | None = None, device: Device | None = None) -> None:
        self.engine = engine
        device = device or open_device(engine)
        self._backend = load_graph(engine, SCORING_GRAPH, device, threads)
        facts = engine.manifest.architecture
        self._empty = np.zeros((1, facts.num_kv_heads, 0, facts.head_size), dtype=device.provider.float_type)
        self._layers = facts.num_layers
        self._routers = [names.router_logits(number) for number in range(facts.num_mixtures)]
        places = np.empty(len(engine.manifest.expert_order), dtype=np.int64)
        places[list(engine.manifest.expert_order)] = np.arange(len(places))
        self._place_of_expert = places

    def run(self, token_ids: Sequence[int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """Logits [S, V], and the router's logits [L, S, E] of the layers that have experts, in the checkpoint's expert
        order (None when dense)."""
        ids = np.asarray(token_ids, dtype=np.int64).reshape(1, -1)
        feeds: dict[str, Any] = {names.INPUT_IDS: ids, names.ATTENTION_MASK: np.ones_like(ids)}
        for layer in range(self._layers):
            feeds[names.past_key(layer)] = feeds[names.past_value(layer)] = self._empty
        logits, *routers = self._backend.run([names.LOGITS, *self._routers], feeds)
        routed = np.stack(routers)[:, :, self._place_of_expert] if routers else None
        return logits[0], routed
