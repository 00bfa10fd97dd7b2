"""Runs an engine on ONNX Runtime: steps of several sequences over preallocated key/value buffers.

    session = Session(open_engine("engine"))
    cache = session.new_cache(slots=8)
    logits = session.step(cache, [Row(slot=0, token_ids=prompt), Row(slot=3, token_ids=[17])])     # float32 [2, V]

A row of a step appends tokens to the sequence in one slot of the cache and may ask for the logits of the last of them.
A chunk of a prompt, the next token of an answer, drafted tokens to verify and the rest of a prompt whose beginning is
in the cache are all rows, and one step takes any of them together. A step copies no keys or values, and computes
nothing for slots without a row.

    logits = session.run(cache, prompt)      # one sequence, in slot 0: float32 [V] of the last token
    logits = session.run(cache, [next_id])

Verification, serving and the demo all use this class, so what was verified is what is served. On CUDA the buffers are
on the device; a step copies token ids to it and rows of logits back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from export.exporter import DATA_FILE, GENERATING_GRAPH, INT8_CACHE_GRAPH, SCORING_GRAPH, SERVING_GRAPH
from export.onnx_graph import names
from export.provider import FLOAT, INT8
from trt_build.errors import EngineError, SequenceError
from trt_build.ort.cache import Cache
from trt_build.ort.device import Device, load_graph, open_device
from trt_build.ort.engine import Engine
from trt_build.ort.int8_cache.scales import check_int8_cache
from trt_build.ort.mapped_file import MappedFile
from trt_build.ort.memory import cache_dtype, cache_width, require_memory
from trt_build.ort.routing import Routing, in_checkpoint_order
from trt_build.ort.step_call import Row, StepCall, key_of, span_of

PREFILL_CHUNK_TOKENS = 128  # limits activation memory, and the time until a server next checks for cancellation

Floats = npt.NDArray[np.float32]
_NOTHING: Mapping[str, npt.NDArray[Any]] = MappingProxyType({})


class Session:
    """An engine's serving graph, loaded. `threads` None takes each physical core that this process may use;
    `device_index` is the number of the GPU; `content` is a graph in place of the stored one. `kv_cache` says how keys
    and values are stored, one of `export/provider.py: KV_CACHES`. Raises EngineError where the engine has no usable
    scales for that.

    An engine of an earlier format has no such graph: there each row of a step is computed by itself, and gives the
    logits of its last token only.
    """

    def __init__(
        self,
        engine: Engine,
        threads: int | None = None,
        device_index: int = 0,
        content: bytes | None = None,
        kv_cache: str = FLOAT,
    ) -> None:
        if engine.manifest.backend != "onnxruntime":
            raise EngineError(
                f"loading the engine {engine.folder}: built for {engine.manifest.backend}, "
                "this session runs onnxruntime engines"
            )
        if kv_cache == INT8:
            check_int8_cache(engine)
        require_memory(engine, kv_cache=kv_cache)
        self.engine, self.kv_cache = engine, kv_cache
        self.max_sequence = engine.manifest.max_sequence
        self.vocab_size = engine.manifest.architecture.vocab_size
        self.device = open_device(engine, device_index)
        self._has_serving_graph = engine.has_serving_graph
        # Whether one call takes different numbers of tokens of its rows.
        self.mixes_lengths = self._has_serving_graph and self.device.provider.mixes_lengths
        graph = SERVING_GRAPH if self._has_serving_graph else GENERATING_GRAPH
        if kv_cache == INT8:
            graph = INT8_CACHE_GRAPH
        # A GPU has a copy of the weights.
        self._weights = MappedFile(engine.folder / DATA_FILE) if self.device.kind == "cpu" else None
        self.backend = load_graph(engine, graph, self.device, threads, content)
        facts = engine.manifest.architecture
        self.routing: Routing | None = None  # None if a step cannot give router logits
        if facts.is_moe and self._has_serving_graph:
            self.routing = Routing(
                layers=facts.mixture_layers,
                expert_order=engine.manifest.expert_order,
                experts_per_token=facts.experts_per_token,
                dropped=engine.manifest.lacking_by_mixture,
                router=facts.router,
            )
        self._mask = self.device.place(np.ones((1, self.max_sequence), dtype=np.int64))
        self._logits = np.empty((1, self.vocab_size), dtype=np.float32)  # of as many rows as a step has asked for

    def new_cache(self, slots: int = 1) -> Cache:
        """Empty slots of max_sequence positions.

        Where sequences take different numbers of tokens, attention wants room for the padding of a row behind each
        sequence, though it writes nothing there: a cache of several slots has that many positions more.
        """
        facts = self.engine.manifest.architecture
        padding = PREFILL_CHUNK_TOKENS - 1 if slots > 1 and self.mixes_lengths else 0
        return Cache(
            self.device, self.backend.io_binding, layers=facts.num_layers, heads=facts.num_kv_heads,
            positions=self.max_sequence + padding, slots=slots,
            head_size=cache_width(facts, self.kv_cache, self.engine.manifest.cache_scales),
            dtype=cache_dtype(self.device.provider, self.kv_cache).name,
        )  # fmt: skip

    def step(
        self,
        cache: Cache,
        rows: Sequence[Row],
        router_logits: Floats | None = None,
        more: Mapping[str, npt.NDArray[Any]] = _NOTHING,
    ) -> Floats:
        """Append the tokens of every row to its slot. Returns the logits that the rows ask for, one row after the
        other, float32 [R, V]; they are valid until the next step.

        `router_logits` [M, T, E] gets the logits of every router for all T tokens of the rows, in the engine's expert
        order. `Routing.room` makes it. `more`: further outputs that the graph gives [T, ...] -> room for them.

        Logits may be NaN or infinite. Raises SequenceError, and changes nothing, for two rows of one slot, rows without
        tokens, ids outside the vocabulary, more tokens than a slot has room for, and router logits of another shape.
        Raises EngineError where somebody wrote into the file of the weights.
        """
        self._check(cache, rows)
        self._check_router_logits(rows, router_logits)
        num_logits = sum(row.num_logits for row in rows)
        if num_logits > len(self._logits):
            self._logits = np.empty((num_logits, self.vocab_size), dtype=np.float32)
        logits, done, tokens_done = self._logits[:num_logits], 0, 0
        for call in self._calls(rows):
            wanted, tokens = sum(row.num_logits for row in call), sum(len(row.token_ids) for row in call)
            if self._has_serving_graph:
                own = slice(tokens_done, tokens_done + tokens)
                outputs = {name: room[own] for name, room in more.items()}
                if router_logits is not None:
                    outputs |= {names.router_logits(mixture): room[own] for mixture, room in enumerate(router_logits)}
                self._run_together(cache, call, logits[done : done + wanted], outputs)
            else:
                self._run_alone(cache, call, logits[done : done + wanted])
            done += wanted
            tokens_done += tokens
            for row in call:
                cache.lengths[row.slot] += len(row.token_ids)
        if self._weights is not None:
            self._weights.require_unchanged()
        return logits

    def run(self, cache: Cache, token_ids: Sequence[int]) -> Floats:
        """Append tokens to the sequence in slot 0; returns the logits of the last token, float32 [V], valid until the
        next step.

        Raises SequenceError as `step` does, EngineError for logits that are not finite.
        """
        self._check(cache, [Row(slot=0, token_ids=token_ids)])
        for start in range(0, len(token_ids), PREFILL_CHUNK_TOKENS):
            logits = self.step(cache, [Row(slot=0, token_ids=token_ids[start : start + PREFILL_CHUNK_TOKENS])])[0]
        if not np.isfinite(logits.sum()):
            raise EngineError(
                f"running the engine {self.engine.folder}: its logits are not finite; check it with moeship verify"
            )
        return logits

    def _calls(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """The rows in the order in which they were given, as groups that the graph takes in one call."""
        if self.mixes_lengths and max(len(row.token_ids) for row in rows) <= PREFILL_CHUNK_TOKENS:
            yield rows
            return
        group: list[Row] = []
        for row in rows:
            joins = self._has_serving_graph and group and len(row.token_ids) == len(group[-1].token_ids) == 1
            if group and not (joins and row.slot == group[-1].slot + 1):
                yield group
                group = []
            group.append(row)
        yield group

    def _run_together(
        self, cache: Cache, rows: Sequence[Row], logits: Floats, outputs: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        """Compute rows in one call of the serving graph, which writes its `outputs` too."""
        if not outputs:
            call = self._step_call(cache, rows)
        else:
            # A binding of its own: a kept one would go on writing outputs in later steps.
            call = StepCall(rows, cache.new_binding(*span_of(rows)), mixes_lengths=self.mixes_lengths)
            call.bind_inputs()
            for name, out in outputs.items():
                call.binding.bind_output(name, "cpu", 0, out.dtype.type, out.shape, out.ctypes.data)
        call.fill(rows, cache.lengths)
        if self.device.kind != "cpu":
            call.bind_inputs()
        call.bind_logits(logits)
        self.backend.run_with_iobinding(call.binding)

    def _step_call(self, cache: Cache, rows: Sequence[Row]) -> StepCall:
        """The call that is kept for rows that take one token each, or else a new one."""
        key = key_of(rows)
        if key in cache.calls:
            return cache.calls[key]
        repeats = all(num_tokens == 1 for _, num_tokens, _ in key)
        binding = cache.new_binding(*span_of(rows)) if repeats else cache.binding(*span_of(rows))
        call = StepCall(rows, binding, mixes_lengths=self.mixes_lengths)
        call.bind_inputs()
        if repeats:
            cache.keep(key, call)
        return call

    def _run_alone(self, cache: Cache, rows: Sequence[Row], logits: Floats) -> None:
        """Compute one row by the graph for onnxruntime-genai."""
        [row] = rows
        if row.num_logits > 1:
            raise SequenceError(
                f"running the engine {self.engine.folder}: found {row.num_logits} positions whose logits are wanted, "
                f"expected at most 1, since format {self.engine.manifest.format_version} has no graph for more; build "
                "the engine again"
            )
        tokens = np.array([row.token_ids], dtype=np.int64)
        total = cache.lengths[row.slot] + tokens.shape[1]
        binding = cache.binding(row.slot, row.slot + 1)
        binding.bind_input(
            names.ATTENTION_MASK, self.device.kind, self.device.index, np.int64, (1, total), self._mask.data_ptr()
        )
        out = (logits if row.num_logits else np.empty((1, self.vocab_size), dtype=np.float32))[None]
        binding.bind_input(names.INPUT_IDS, "cpu", 0, np.int64, tokens.shape, tokens.ctypes.data)
        binding.bind_output(names.LOGITS, "cpu", 0, np.float32, out.shape, out.ctypes.data)
        self.backend.run_with_iobinding(binding)

    def _check(self, cache: Cache, rows: Sequence[Row]) -> None:
        if not rows or len({row.slot for row in rows}) < len(rows):
            raise SequenceError(
                f"running the engine: found {len(rows)} rows, expected at least one, each of another slot"
            )
        for row in rows:
            self._check_row(cache, row)

    def _check_router_logits(self, rows: Sequence[Row], router_logits: Floats | None) -> None:
        if router_logits is None:
            return
        if self.routing is None:
            raise SequenceError(
                f"running the engine {self.engine.folder}: found room for router logits, expected none: no graph of "
                "this engine gives them in a step"
            )
        expected = self.routing.room(sum(len(row.token_ids) for row in rows)).shape
        if router_logits.shape != expected:
            raise SequenceError(
                f"running the engine {self.engine.folder}: found room for router logits of shape "
                f"{list(router_logits.shape)}, expected {list(expected)}"
            )

    def _check_row(self, cache: Cache, row: Row) -> None:
        if not 0 <= row.slot < cache.num_slots:
            raise SequenceError(f"running the engine: found slot {row.slot}, expected 0 to {cache.num_slots - 1}")
        length, size = cache.lengths[row.slot], len(row.token_ids)
        if not size:
            raise SequenceError("running the engine: found no tokens, expected at least one")
        if not 0 <= row.num_logits <= size:
            raise SequenceError(
                f"running the engine: found {row.num_logits} positions whose logits are wanted, expected 0 to {size}, "
                "the number of tokens"
            )
        if length + size > self.max_sequence:
            raise SequenceError(
                f"running the engine: {size} tokens after {length} exceed its context of {self.max_sequence}; shorten "
                "the prompt or ask for fewer tokens"
            )
        low, high = int(min(row.token_ids)), int(max(row.token_ids))
        if low < 0 or high >= self.vocab_size:
            raise SequenceError(
                f"running the engine: token id {low if low < 0 else high} is outside its vocabulary of "
                f"{self.vocab_size}; encode the text with this engine's tokenizer"
            )


class ScoringSession:
    """An engine's scoring graph: logits of every position and the router's logits, without a cache. `device` None opens
    a device of the engine's provider; `content` is a graph in place of the stored one."""

    def __init__(
        self, engine: Engine, threads: int | None = None, device: Device | None = None, content: bytes | None = None
    ) -> None:
        self.engine = engine
        self._device = device or open_device(engine)
        self.backend = load_graph(engine, SCORING_GRAPH, self._device, threads, content)
        self._facts = engine.manifest.architecture
        outputs = [output.name for output in self.backend.get_outputs()]
        self._presents = [name for name in outputs if name.startswith(names.PRESENT_PREFIX)]

    def run(
        self, token_ids: Sequence[int], more: Mapping[str, npt.NDArray[Any]] = _NOTHING
    ) -> tuple[Floats, Floats | None]:
        """Logits [S, V], and the router's logits [M, S, E] of the M layers that have experts, in the checkpoint's
        expert order (None when dense). `more`: further outputs that the graph gives [1, S, ...] -> room for them."""
        binding, facts = self.backend.io_binding(), self._facts
        ids = np.asarray(token_ids, dtype=np.int64).reshape(1, -1)
        binding.bind_cpu_input(names.INPUT_IDS, ids)
        binding.bind_cpu_input(names.ATTENTION_MASK, np.ones_like(ids))
        empty = np.zeros((1, facts.num_kv_heads, 0, facts.head_size), dtype=self._device.provider.float_type)
        for layer in range(facts.num_layers):
            binding.bind_cpu_input(names.past_key(layer), empty)
            binding.bind_cpu_input(names.past_value(layer), empty)
        kept = self._bind_presents(binding, ids.size)
        logits = np.empty((ids.size, facts.vocab_size), dtype=np.float32)
        order = self.engine.manifest.expert_order
        routers = np.empty((facts.num_mixtures, ids.size, len(order)), dtype=np.float32)
        outputs = {names.LOGITS: logits[None], **{names.router_logits(m): out for m, out in enumerate(routers)}}
        for name, out in {**outputs, **more}.items():
            binding.bind_output(name, "cpu", 0, out.dtype.type, out.shape, out.ctypes.data)
        self.backend.run_with_iobinding(binding)
        del kept
        if not len(routers):
            return logits, None
        return logits, in_checkpoint_order(routers, order, self.engine.manifest.lacking_by_mixture)

    def _bind_presents(self, binding: Any, num_tokens: int) -> list[Any]:  # noqa: ANN401 - onnxruntime's IOBinding
        """Have the keys of all layers written to one buffer, and the values to another: a layer reads its own before
        the next is computed, and nobody reads them later. Those of 32 layers and 2,048 tokens are 1.3 GB. Returns the
        buffers, which must outlive the run."""
        shape = (1, self._facts.num_kv_heads, num_tokens, self._facts.head_size)
        buffers = [self._device.zeros(shape) for _ in ("keys", "values")]
        dtype = np.dtype(self._device.provider.float_type).type
        for number, name in enumerate(self._presents):
            pointer = buffers[number % 2].data_ptr()
            binding.bind_output(name, self._device.kind, self._device.index, dtype, shape, pointer)
        return buffers
