"""The forms of a decoder graph. They have the same weights and operations, and differ in how tokens lie in their
inputs and in the logits that they give.

GeneratingGraph   tokens [B, S] of equally long sequences; logits of the last position: what onnxruntime-genai runs
ScoringGraph      the same with the logits of every position and those of every router: what verification compares
ServingGraph      the tokens of all sequences one after the other, [T]; logits of the tokens that are asked for: one
                  step of several sequences that may be at different places and take different numbers of tokens
Int8ServingGraph  the same with keys and values in int8: with moeship's kernels in records that have their own scales
                  (kv_records.py), else by scales in a file (kv_scales.py)

In a serving graph only attention sees sequences: before it, tokens are placed at [B, S], where each sequence's tokens
come first and the rest is padding that no kernel reads; after it, they are taken out again. Everything else, the
experts above all, computes no padding. GroupQueryAttention's input `query_seqlens` says how many of the S places are
tokens; ONNX Runtime 1.32 has it for the CPU. Without it (`Provider.mixes_lengths` is false) every sequence of a step
must take one token, or there must be one sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ExportError
from export.onnx_graph import kv_records, names
from export.onnx_graph.graph import GraphBuilder
from export.onnx_graph.kernels import without_absent_end
from export.onnx_graph.kv_scales import QUANTISATION, key_scale, scale_initializers, value_scale
from export.provider import INT8, PER_POSITION

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx


class _MaskedGraph(GraphBuilder):
    """Tokens [B, S] and a mask [B, P+S] of ones."""

    def _sequence_facts(self) -> tuple[str, str]:
        from onnx import TensorProto

        one, axis = (
            self._nodes.constant("one", np.array(1, np.int64)),
            self._nodes.constant("axis_1", np.array([1], np.int64)),
        )
        lengths = self._nodes.add("ReduceSum", [names.ATTENTION_MASK, axis], "attention/lengths", keepdims=0,
                             noop_with_empty_axes=0)  # fmt: skip
        last = self._nodes.add("Sub", [lengths, one], "attention/last")
        self._nodes.add("Cast", [last], "attention/seqlens_k", output="attention/seqlens_k", to=TensorProto.INT32)
        shape = self._nodes.add("Shape", [names.ATTENTION_MASK], "attention/mask_shape", start=0)
        total = self._nodes.add("Gather", [shape, one], "attention/total", axis=0)
        self._nodes.add("Cast", [total], "attention/total_sequence_length", output="attention/total_sequence_length",
                   to=TensorProto.INT32)  # fmt: skip
        return "attention/seqlens_k", "attention/total_sequence_length"

    def _token_inputs(self) -> list[onnx.ValueInfoProto]:
        from onnx import TensorProto, helper

        value, int64 = helper.make_tensor_value_info, TensorProto.INT64
        return [
            value(names.INPUT_IDS, int64, [names.BATCH, names.SEQUENCE]),
            value(names.ATTENTION_MASK, int64, [names.BATCH, names.TOTAL]),
        ]


class GeneratingGraph(_MaskedGraph):
    """Gives the logits of the last position, [B, 1, V]."""

    def wanted(self, x: str) -> str:
        starts, ends, axes = (self._nodes.constant(f"last/{n}", np.array([v], np.int64)) for n, v in
                              (("start", -1), ("end", np.iinfo(np.int64).max), ("axis", 1)))  # fmt: skip
        return self._nodes.add("Slice", [x, starts, ends, axes], "last_position", float_type=self._nodes.float_types[x])

    def _logits_shape(self) -> list[str | int]:
        return [names.BATCH, 1, self.architecture.vocab_size]


class ScoringGraph(_MaskedGraph):
    """Gives the logits of every position, [B, S, V], and the router logits [B*S, E] of every layer with experts."""

    gives_router_logits = True

    def wanted(self, x: str) -> str:
        return x

    def _logits_shape(self) -> list[str | int]:
        return [names.BATCH, names.SEQUENCE, self.architecture.vocab_size]


class ServingGraph(GraphBuilder):
    """Tokens [T] of B sequences; each sequence takes at most S of them. The inputs beside them say which are whose:

    token_of_query   int64 [B, S]  the token at each place of a sequence; any token where there is padding
    query_of_token   int64 [T]     the place of each token, as a number of B*S
    new_lengths      int32 [B]     how many of the S places are tokens; 0 leaves a sequence as it is
    last_positions   int32 [B]     the length of each sequence after the step, less one
    total_length     int32         the length of the longest sequence after the step, at least
    logit_tokens     int64 [R]     the tokens whose logits are wanted

    Gives logits [R, V], and the router logits [T, E] of every layer with experts.
    """

    gives_router_logits = True

    def _sequence_facts(self) -> tuple[str, str]:
        return names.LAST_POSITIONS, names.TOTAL_LENGTH

    def _by_sequence(self, x: str) -> str:
        kind = self._nodes.float_types[x]
        return self._nodes.add("Gather", [x, names.TOKEN_OF_QUERY], f"{x}/by_sequence", float_type=kind, axis=0)

    def _by_token(self, x: str) -> str:
        facts, kind = self.architecture, self._nodes.float_types[x]
        shape = self._nodes.constant("attention/flat", np.array([-1, facts.num_heads * facts.head_size], np.int64))
        rows = self._nodes.add("Reshape", [x, shape], f"{x}/rows", float_type=kind, allowzero=0)
        return self._nodes.add("Gather", [rows, names.QUERY_OF_TOKEN], f"{x}/by_token", float_type=kind, axis=0)

    def _further_inputs(self, layer: int) -> list[str]:
        # the scales of keys and values, the weights of two norms, query_seqlens
        inputs = [*self._cache_scales(layer), "", "", names.NEW_LENGTHS]
        return inputs if self._provider.mixes_lengths else []

    def _cache_scales(self, layer: int) -> tuple[str, str]:  # noqa: ARG002 - of which layer
        """The names of the scales of keys and of values; empty where these are floats."""
        return "", ""

    def wanted(self, x: str) -> str:
        return self._nodes.add(
            "Gather", [x, names.LOGIT_TOKENS], "wanted", float_type=self._nodes.float_types[x], axis=0
        )

    def _token_inputs(self) -> list[onnx.ValueInfoProto]:
        from onnx import TensorProto, helper

        int32, int64, tokens, value = TensorProto.INT32, TensorProto.INT64, "tokens", helper.make_tensor_value_info
        lengths = [value(names.NEW_LENGTHS, int32, [names.BATCH])] if self._provider.mixes_lengths else []
        return [
            value(names.INPUT_IDS, int64, [tokens]),
            value(names.TOKEN_OF_QUERY, int64, [names.BATCH, names.SEQUENCE]),
            value(names.QUERY_OF_TOKEN, int64, [tokens]),
            *lengths,
            value(names.LAST_POSITIONS, int32, [names.BATCH]),
            value(names.TOTAL_LENGTH, int32, []),
            value(names.LOGIT_TOKENS, int64, ["wanted"]),
        ]

    def _logits_shape(self) -> list[str | int]:
        return ["wanted", self.architecture.vocab_size]


class Int8ServingGraph(ServingGraph):
    """A serving graph whose keys and values are codes of int8. Raises ExportError for a provider that `int8_cache` is
    false of, and for heads that moeship's attention does not take."""

    @property
    def _has_records(self) -> bool:
        """Whether moeship's own attention stores keys and values, and not ONNX Runtime's."""
        return self._provider.cache_scales == PER_POSITION

    def _attention_node(self, parts: list[str], sinks: str, path: str, layer: int, window: int, scale: float) -> str:
        if not self._has_records:
            return super()._attention_node(parts, sinks, path, layer, window, scale)
        facts = self.architecture
        inputs = [
            *parts, names.past_key(layer), names.past_value(layer), names.LAST_POSITIONS, names.NEW_LENGTHS,
            "rotary/cos_cache", "rotary/sin_cache", sinks,
        ]  # fmt: skip
        return self._nodes.add(
            "Attention", without_absent_end(inputs), path, domain=names.MOESHIP_DOMAIN,
            more_outputs=[names.present_key(layer), names.present_value(layer)],
            float_type=self._float_type, layout=kv_records.LAYOUT, num_heads=facts.num_heads,
            kv_num_heads=facts.num_kv_heads, head_size=facts.head_size, rotary_dim=facts.rotary_dim,
            positions=self._max_sequence, scale=scale, window=window,
        )  # fmt: skip

    @property
    def _cache_width(self) -> int:
        size = self.architecture.head_size
        return kv_records.record_bytes(size) if self._has_records else size

    def _cache_scales(self, layer: int) -> tuple[str, str]:
        return key_scale(layer), value_scale(layer)

    def _cache_attributes(self) -> dict[str, Any]:
        return {"k_quant_type": QUANTISATION, "v_quant_type": QUANTISATION, "kv_cache_bit_width": 8}

    @property
    def _cache_type(self) -> str:
        return INT8

    def _further_initializers(self) -> Iterable[onnx.TensorProto]:
        return () if self._has_records else scale_initializers(self.architecture)

    def _check_attention(self) -> None:
        super()._check_attention()
        if not self._provider.int8_cache:
            raise ExportError(
                f"planning the graph: found --kv int8 for the provider {self._provider.name}, whose caches moeship "
                "keeps in its float type; leave --kv out, or build for the provider cpu"
            )
        size = self.architecture.head_size
        if self._has_records and size > kv_records.LARGEST_HEAD:
            raise ExportError(
                f"planning the graph: found --kv int8 for the head size {size}, and moeship's attention takes up to "
                f"{kv_records.LARGEST_HEAD}; leave --kv out, or build with --kernels onnxruntime"
            )
