"""Stands for tensorrt_llm/models/llama/model.py as Mixtral uses it: RMSNorm, grouped heads, a mixture for the MLP, and
pipeline parallelism by sending hidden states to the next rank."""

from __future__ import annotations

from typing import Any

from tensorrt_llm._utils import absent, pad_vocab_size
from tensorrt_llm.functional import Tensor, recv, send
from tensorrt_llm.layers import (
    MOE,
    Attention,
    AttentionMaskType,
    ColumnLinear,
    Embedding,
    PositionEmbeddingType,
    RmsNorm,
)
from tensorrt_llm.models.llama.config import LLaMAConfig
from tensorrt_llm.models.modeling_utils import DecoderLayerList, DecoderModelForCausalLM
from tensorrt_llm.module import Module


class LLaMADecoderLayer(Module):
    def __init__(self, config: LLaMAConfig, layer_idx: int) -> None:
        super().__init__()
        absent(dense=not config.moe.has_moe())
        mapping = config.mapping
        self.input_layernorm = RmsNorm(config.hidden_size, eps=config.norm_epsilon, dtype=config.dtype)
        self.attention = Attention(
            local_layer_idx=layer_idx - mapping.pp_layers(config.num_hidden_layers)[0],
            hidden_size=config.hidden_size,
            attention_head_size=config.head_size,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            dtype=config.dtype,
            attention_mask_type=AttentionMaskType.causal,
            bias=config.attn_bias,
            position_embedding_type=PositionEmbeddingType.rope_gpt_neox,
            rotary_embedding_base=config.rotary_base,
            rotary_embedding_scaling=config.rotary_scaling,
            tp_group=mapping.tp_group,
            tp_size=mapping.tp_size,
            tp_rank=mapping.tp_rank,
            quant_mode=config.quant_mode,
        )
        self.mlp = MOE(
            moe_config=config.moe,
            mapping=mapping,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            dtype=config.dtype,
            bias=config.mlp_bias,
            tp_group=mapping.tp_group,
            tp_size=mapping.tp_size,
            quant_mode=config.quant_mode,
        )
        self.post_layernorm = RmsNorm(config.hidden_size, eps=config.norm_epsilon, dtype=config.dtype)

    def forward(self, hidden_states: Tensor, use_cache: bool = False, **kwargs: Any) -> Any:
        attended = self.attention(self.input_layernorm(hidden_states), use_cache=use_cache, **kwargs)
        attended, present = attended if use_cache else (attended, None)
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_layernorm(hidden_states))
        return (hidden_states, present) if use_cache else hidden_states


class LLaMAModel(Module):
    def __init__(self, config: LLaMAConfig, layer: type[Module] = LLaMADecoderLayer) -> None:
        super().__init__()
        self.mapping = config.mapping
        if self.mapping.is_first_pp_rank():
            self.vocab_embedding = Embedding(config.vocab_size, config.hidden_size, dtype=config.dtype)
        self.layers = DecoderLayerList(layer, config)
        if self.mapping.is_last_pp_rank():
            self.ln_f = RmsNorm(config.hidden_size, eps=config.norm_epsilon, dtype=config.dtype)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        attention_mask: Tensor | None = None,
        kv_cache_params: Any = None,
        attention_params: Any = None,
        hidden_states: Tensor | None = None,
    ) -> Any:
        if self.mapping.is_first_pp_rank():
            hidden_states = self.vocab_embedding(input_ids)
        else:
            hidden_states = recv(hidden_states, self.mapping.prev_pp_rank())
        output = self.layers(
            hidden_states,
            use_cache=use_cache,
            attention_mask=attention_mask,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
        )
        hidden_states, presents = output if use_cache else (output, ())
        if self.mapping.is_last_pp_rank():
            hidden_states = self.ln_f(hidden_states)
        else:
            hidden_states = send(hidden_states, self.mapping.next_pp_rank())
        return (hidden_states, tuple(presents)) if use_cache else hidden_states


class LLaMAForCausalLM(DecoderModelForCausalLM):
    config_class = LLaMAConfig

    def __init__(self, config: LLaMAConfig) -> None:
        mapping, lm_head = config.mapping, None
        if mapping.is_last_pp_rank():
            lm_head = ColumnLinear(
                config.hidden_size,
                pad_vocab_size(config.vocab_size, mapping.tp_size),
                bias=False,
                dtype=config.dtype,
                tp_group=mapping.tp_group,
                tp_size=mapping.tp_size,
                gather_output=True,
            )
        super().__init__(config, LLaMAModel(config), lm_head)
