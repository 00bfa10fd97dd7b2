"""Stands for tensorrt_llm/models/qwen/model.py as qwen2_moe and qwen3_moe use it: norms of each head's queries and keys
or biases of queries, keys and values, and experts in every layer, with one beside them in a qwen2_moe.

What config.json says of layers without experts is kept and not looked at; attention gets no epsilon and has its own.
"""

from __future__ import annotations

from tensorrt_llm._utils import absent, pad_vocab_size
from tensorrt_llm.functional import LayerNormType
from tensorrt_llm.layers import MOE, Attention, AttentionMaskType, ColumnLinear, RmsNorm, SharedMoE
from tensorrt_llm.models.llama.model import LLaMADecoderLayer, LLaMAModel
from tensorrt_llm.models.modeling_utils import DecoderModelForCausalLM
from tensorrt_llm.models.qwen.config import QWenConfig
from tensorrt_llm.module import Module


class QWenDecoderLayer(LLaMADecoderLayer):
    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        Module.__init__(self)
        absent(qwen_type=config.qwen_type not in ("qwen2_moe", "qwen3_moe"), dense=not config.moe.has_moe())
        mapping, normed = config.mapping, config.qwen_type == "qwen3_moe"
        self.input_layernorm = RmsNorm(config.hidden_size, eps=config.norm_epsilon, dtype=config.dtype)
        self.attention = Attention(
            local_layer_idx=layer_idx - mapping.pp_layers(config.num_hidden_layers)[0],
            hidden_size=config.hidden_size,
            attention_head_size=config.head_size,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_seqlen_for_logn_scaling=config.seq_length,
            max_position_embeddings=config.max_position_embeddings,
            dtype=config.dtype,
            attention_mask_type=AttentionMaskType.causal,
            bias=config.attn_bias,
            position_embedding_type=config.position_embedding_type,
            rotary_embedding_base=config.rotary_base,
            rotary_embedding_scaling=config.rotary_scaling,
            tp_rank=mapping.tp_rank,
            tp_group=mapping.tp_group,
            tp_size=mapping.tp_size,
            quant_mode=config.quant_mode,
            use_logn_scaling=config.use_logn_attn,
            dense_bias=False,
            qk_layernorm=normed,
            layernorm_type=LayerNormType.RmsNorm if normed else LayerNormType.LayerNorm,
        )
        mixture, more = MOE, {}
        if config.qwen_type == "qwen2_moe":
            mixture, more = SharedMoE, {"use_shared_gate": True, "use_side_stream": True}
            config.moe.shared_expert_intermediate_size = config.moe_shared_expert_intermediate_size
        self.mlp = mixture(
            moe_config=config.moe,
            mapping=mapping,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.moe_intermediate_size,
            hidden_act=config.hidden_act,
            dtype=config.dtype,
            bias=config.mlp_bias,
            tp_group=mapping.tp_group,
            tp_size=mapping.tp_size,
            quant_mode=config.quant_mode,
            **more,
        )
        self.post_layernorm = RmsNorm(config.hidden_size, eps=config.norm_epsilon, dtype=config.dtype)


class QWenModel(LLaMAModel):
    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config, QWenDecoderLayer)


class QWenForCausalLM(DecoderModelForCausalLM):
    config_class = QWenConfig

    def __init__(self, config: QWenConfig) -> None:
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
        super().__init__(config, QWenModel(config), lm_head)
