"""Stands for tensorrt_llm/layers/attention.py: causal attention with rotary positions over a key/value cache.

One sequence a call, packed: hidden states are [T, H] of its T new tokens. The cache of a layer is (keys, values), each
[heads, positions, head_size]. Rotary tables are the model's, computed from its config and handed down in
AttentionParams, while how many dimensions of a head turn is the layer's own knowledge; they must agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from tensorrt_llm._utils import absent, activations
from tensorrt_llm.functional import AttentionMaskType, LayerNormType, PositionEmbeddingType, Tensor
from tensorrt_llm.layers.linear import ColumnLinear, RowLinear
from tensorrt_llm.layers.normalization import RmsNorm
from tensorrt_llm.module import Module
from tensorrt_llm.parameter import Parameter
from tensorrt_llm.quantization.mode import QuantMode

Past = tuple[Tensor, Tensor]


class AttentionParams:
    """Lengths of the sequences, and the rotary tables that the model fills in."""

    def __init__(
        self,
        sequence_length: Tensor | None = None,
        context_lengths: Tensor | None = None,
        host_context_lengths: Tensor | None = None,
        max_context_length: int | None = None,
        host_request_types: Tensor | None = None,
    ) -> None:
        self.sequence_length, self.context_lengths = sequence_length, context_lengths
        self.host_context_lengths, self.max_context_length = host_context_lengths, max_context_length
        self.host_request_types = host_request_types
        self.rotary_inv_freq: Tensor | None = None
        self.embed_positions_for_gpt_attention: Tensor | None = None


class KeyValueCacheParams:
    """What the layers before have kept: `past_key_value` holds one Past or None for each layer."""

    def __init__(self, past_key_value: Sequence[Past | None] | None = None) -> None:
        self.past_key_value = past_key_value

    def get_first_past_key_value(self) -> Past | None:
        return None if self.past_key_value is None else self.past_key_value[0]

    def fill_none_tensor_list(self, list_size: int) -> None:
        if self.past_key_value is None:
            self.past_key_value = tuple([None] * list_size)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """[heads, T, head_size] with its first dimensions turned, halves paired; table float32 [T, 2, rotary / 2] of
    cosines and sines."""
    half = table.shape[-1]
    cosine, sine = table[:, 0], table[:, 1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)


def scaled(frequencies: Tensor, scaling: dict[str, Any] | None) -> Tensor:
    """Frequencies scaled as RopeEmbeddingUtils in tensorrt_llm/functional.py scales them."""
    kind = None if scaling is None else scaling.get("type", scaling.get("rope_type"))
    if scaling is None or kind is None:
        return frequencies
    if kind == "linear":
        return frequencies / scaling.get("factor", 1.0)
    assert kind == "llama3", f"rotary_scaling of kind {kind} is not computed here"
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    length, factor = scaling.get("original_max_position_embeddings", 8192), scaling.get("factor", 8.0)
    result = []
    for frequency in frequencies.tolist():
        wave = 2 * math.pi / frequency
        smooth = (length / wave - low) / (high - low)
        between = (1 - smooth) * frequency / factor + smooth * frequency
        result.append(frequency if wave < length / high else frequency / factor if wave > length / low else between)
    return torch.tensor(result, dtype=frequencies.dtype)


class Attention(Module):
    def __init__(
        self,
        *,
        local_layer_idx: int,
        hidden_size: int,
        num_attention_heads: int,
        num_kv_heads: int | None = None,
        max_position_embeddings: int = 1024,
        num_layers: int = 1,
        apply_query_key_layer_scaling: bool = False,
        attention_head_size: int | None = None,
        qk_layernorm: bool = False,
        layernorm_type: LayerNormType = LayerNormType.LayerNorm,
        layernorm_share: bool = True,
        inner_layernorm: bool = False,
        eps: float = 1e-05,
        attention_mask_type: AttentionMaskType = AttentionMaskType.padding,
        bias: bool = True,
        dtype: str | None = None,
        position_embedding_type: PositionEmbeddingType = PositionEmbeddingType.learned_absolute,
        rotary_embedding_base: float = 10000.0,
        rotary_embedding_base_local: float = 1.0,
        rotary_embedding_scaling: dict[str, Any] | None = None,
        rotary_embedding_percentage: float = 1.0,
        rope_scaling_short_factors: Any = None,
        rope_scaling_long_factors: Any = None,
        rope_scaling_short_mscale: Any = None,
        rope_scaling_long_mscale: Any = None,
        original_max_position_embeddings: int = 1024,
        tp_group: Sequence[int] | None = None,
        tp_size: int = 1,
        tp_rank: int = 0,
        quant_mode: QuantMode = QuantMode(0),
        q_scaling: float = 1.0,
        cross_attention: bool = False,
        relative_attention: bool = False,
        max_distance: int = 0,
        num_buckets: int = 0,
        dense_bias: bool | None = None,
        clip_qkv: float | None = None,
        alibi_bias_max: int = 8,
        skip_cross_kv: bool = False,
        max_attn_value: float = 0.0,
        block_sparse_params: Any = None,
        use_implicit_relative_attention: bool = False,
        reorder: bool = False,
        enable_qkv: bool = True,
        cp_group: Sequence[int] = [0],
        cp_size: int = 1,
        cp_rank: int = 0,
        max_seqlen_for_logn_scaling: int = 8192,
        use_logn_scaling: bool = False,
        is_local: bool = False,
    ) -> None:
        super().__init__()
        assert num_attention_heads % tp_size == 0, "num_attention_heads must be divisible by tp_size"
        absent(
            cp_size=cp_size > 1, clip_qkv=clip_qkv, inner_layernorm=inner_layernorm, cross_attention=cross_attention,
            qk_layernorm=qk_layernorm and (layernorm_type != LayerNormType.RmsNorm or not layernorm_share),
            relative_attention=relative_attention, is_local=is_local, use_logn_scaling=use_logn_scaling,
        )  # fmt: skip
        self.local_layer_idx, self.hidden_size, self.q_scaling = local_layer_idx, hidden_size, q_scaling
        self.attention_head_size = attention_head_size or hidden_size // num_attention_heads
        self.num_attention_heads = num_attention_heads // tp_size
        self.num_attention_kv_heads = -(-(num_kv_heads or num_attention_heads) // tp_size)
        self.attention_mask_type, self.position_embedding_type = attention_mask_type, position_embedding_type
        self.rotary_embedding_dim = 0
        if position_embedding_type.is_rope():
            self.rotary_embedding_dim = int(self.attention_head_size * rotary_embedding_percentage)
        queries = tp_size * self.num_attention_heads * self.attention_head_size
        keys = tp_size * self.num_attention_kv_heads * self.attention_head_size
        self.qk_layernorm = qk_layernorm
        if qk_layernorm:  # one of each for all heads
            self.q_layernorm = RmsNorm(self.attention_head_size, eps=eps, dtype=dtype)
            self.k_layernorm = RmsNorm(self.attention_head_size, eps=eps, dtype=dtype)
        self.qkv = ColumnLinear(
            hidden_size, queries + 2 * keys, bias=bias, dtype=dtype, tp_group=tp_group, tp_size=tp_size,
            gather_output=False, is_qkv=True,
        )  # fmt: skip
        self.dense = RowLinear(
            queries, hidden_size, bias=bias if dense_bias is None else dense_bias, dtype=dtype, tp_group=tp_group,
            tp_size=tp_size,
        )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        attention_packed_mask: Tensor | None = None,
        use_cache: bool = False,
        spec_decoding_params: Any = None,
        mrope_params: Any = None,
        kv_cache_params: KeyValueCacheParams | None = None,
        attention_params: AttentionParams | None = None,
        encoder_output: Tensor | None = None,
        position_embedding: Tensor | None = None,
        norm_before_bmm1: bool = False,
        lora_layer_params: Any = None,
        cross_kv_cache_gen: Tensor | None = None,
        cross_kv_reuse: Tensor | None = None,
        all_reduce_params: Any = None,
        skip_attn: Any = None,
    ) -> Tensor | tuple[Tensor, Past]:
        """[T, H] to [T, H], and the layer's cache with the new positions where use_cache is set."""
        assert self.attention_mask_type == AttentionMaskType.causal, "Plugin only support masked MHA."
        past = kv_cache_params.get_first_past_key_value() if kv_cache_params else None
        sizes = [self.num_attention_heads, self.num_attention_kv_heads, self.num_attention_kv_heads]
        heads = self.qkv(hidden_states).unflatten(-1, (sum(sizes), self.attention_head_size)).transpose(0, 1)
        query, key, value = heads.split(sizes)
        if self.qk_layernorm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        seen = past[0].shape[1] if past else 0
        table = self._table(attention_params, seen, len(hidden_states))
        query, key = activations(rotate(query, table)), activations(rotate(key, table))
        if past:
            key, value = torch.cat([past[0], key], dim=1), torch.cat([past[1], value], dim=1)
        output = self.dense(activations(self._attend(query, key, value, seen)), all_reduce_params=all_reduce_params)
        return (output, (key, value)) if use_cache else output

    def _table(self, params: AttentionParams | None, seen: int, count: int) -> Tensor:
        absent(positions=self.position_embedding_type != PositionEmbeddingType.rope_gpt_neox)
        table = params and params.embed_positions_for_gpt_attention
        assert table is not None, "rotary_inv_freq and embed_positions_for_gpt_attention must be provided."
        assert 2 * table.shape[-1] == self.rotary_embedding_dim, (
            f"the layer turns {self.rotary_embedding_dim} dimensions, the model's rotary table has "
            f"{2 * table.shape[-1]}"
        )
        assert seen + count <= len(table), f"{seen + count} positions, the rotary table has {len(table)}"
        return table[seen : seen + count]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, seen: int) -> Tensor:
        """Heads [n, T, D] over [g, P + T, D], each group of queries over its own key head; [T, n * D]."""
        group = self.num_attention_heads // self.num_attention_kv_heads
        key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
        scores = query @ key.transpose(1, 2) / (math.sqrt(self.attention_head_size) * self.q_scaling)
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(seen + 1)
        weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
        return (weights @ value).transpose(0, 1).flatten(1)

    @staticmethod
    def create_attention_const_params(model: Module, config: Any) -> None:
        """Register the rotary tables of a model, from its config's rotary_pct (or rotary_dim) and rotary_base."""
        if not config.position_embedding_type.is_rope():
            return
        dimensions = getattr(config, "rotary_dim", int(config.head_size * getattr(config, "rotary_pct", 1.0)))
        exponents = torch.arange(0, dimensions, 2, dtype=torch.float64) / dimensions
        frequencies = 1.0 / (getattr(config, "rotary_base", 10000.0) ** exponents).float()
        frequencies = scaled(frequencies, getattr(config, "rotary_scaling", None))
        angles = torch.arange(config.max_position_embeddings).float()[:, None] * frequencies
        table = torch.stack([angles.cos(), angles.sin()], dim=1)
        for name, value in (("rotary_inv_freq", frequencies), ("embed_positions_for_gpt_attention", table)):
            model.register_parameter(name, Parameter(value, dtype="float32", is_buffer=True))

    @staticmethod
    def fill_attention_params(model: Any, attention_params: AttentionParams | None) -> AttentionParams | None:
        if model.position_embedding_type.is_rope():
            attention_params = attention_params or AttentionParams()
            attention_params.rotary_inv_freq = model.rotary_inv_freq.value
            attention_params.embed_positions_for_gpt_attention = model.embed_positions_for_gpt_attention.value
        return attention_params
