"""The phixtral network for TensorRT-LLM 1.2: Phi-2's parallel block with the MoE plugin in place of its MLP.

    trtllm-build --checkpoint_dir CHECKPOINT --model_cls_file phixtral.py --model_cls_name PhixtralForCausalLM ...

In a layer, n = input_layernorm(x) and the output is x + attention(n) + mlp(n). Attention, head and experts have biases,
the router has none. The router chooses the K largest logits first and then computes their softmax (RENORMALIZE).

Importing this file registers the architecture PhixtralForCausalLM. Every Python process that reads the config.json of
such a checkpoint or engine has to import it. trtllm-build loads this file alone, under the module name `models`, so it
imports nothing but TensorRT-LLM. There is no pipeline parallelism, LoRA or prompt tuning.
Source of the layers' arguments: tensorrt_llm/models/phi/model.py, tensorrt_llm/models/phi3/model.py,
tensorrt_llm/layers/attention.py, tensorrt_llm/layers/moe.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensorrt_llm.functional import AttentionMaskType, Tensor
from tensorrt_llm.layers.attention import Attention, AttentionParams, KeyValueCacheParams
from tensorrt_llm.layers.embedding import Embedding
from tensorrt_llm.layers.linear import ColumnLinear
from tensorrt_llm.layers.moe import MOE, MoeConfig
from tensorrt_llm.layers.normalization import LayerNorm
from tensorrt_llm.models import MODEL_MAP
from tensorrt_llm.models.modeling_utils import DecoderLayerList, DecoderModelForCausalLM, PretrainedConfig
from tensorrt_llm.module import Module

ARCHITECTURE = "PhixtralForCausalLM"


class PhixtralConfig(PretrainedConfig):
    """The configuration of a phixtral: the fields of the base class, of the mixture and of the rotary embedding. The
    rotary fields have no default, since a missing rotary_pct would rotate all of each head. Raises TypeError if one is
    missing."""

    def __init__(
        self,
        *,
        moe: MoeConfig | dict[str, Any],
        rotary_pct: float,
        rotary_base: float,
        rotary_scaling: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        self.moe = (MoeConfig.from_dict(moe) if isinstance(moe, dict) else moe).validate()
        self.rotary_base = rotary_base
        self.rotary_scaling = rotary_scaling
        super().__init__(rotary_pct=rotary_pct, **kwargs)  # the base class derives rotary_embedding_dim from rotary_pct

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, as plain JSON values."""
        output: dict[str, Any] = super().to_dict()
        output["moe"] = self.moe.to_dict()
        return output


class PhixtralDecoderLayer(Module):
    """One layer: attention and experts in parallel. `layer_idx` is the index of the layer in the whole model."""

    def __init__(self, config: PhixtralConfig, layer_idx: int) -> None:
        super().__init__()
        mapping = config.mapping
        self.input_layernorm = LayerNorm(
            normalized_shape=config.hidden_size, eps=config.norm_epsilon, dtype=config.dtype
        )
        self.attention = Attention(
            local_layer_idx=layer_idx - mapping.pp_layers(config.num_hidden_layers)[0],
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            attention_head_size=config.head_size,
            attention_mask_type=AttentionMaskType.causal,
            bias=True,
            dense_bias=True,
            dtype=config.dtype,
            position_embedding_type=config.position_embedding_type,
            rotary_embedding_base=config.rotary_base,
            rotary_embedding_scaling=config.rotary_scaling,
            rotary_embedding_percentage=config.rotary_pct,
            tp_group=mapping.tp_group,
            tp_size=mapping.tp_size,
            tp_rank=mapping.tp_rank,
            quant_mode=config.quant_mode,
        )
        self.mlp = MOE(
            moe_config=config.moe,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            mapping=mapping,
            bias=True,
            dtype=config.dtype,
            tp_group=mapping.tp_group,
            tp_size=mapping.tp_size,
            quant_mode=config.quant_mode,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        kv_cache_params: KeyValueCacheParams | None = None,
        attention_params: AttentionParams | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The layer's output [T, H] for hidden states [T, H], and the layer's cache if `use_cache` is set."""
        normed = self.input_layernorm(hidden_states)
        attended = self.attention(
            normed,
            attention_mask=attention_mask,
            use_cache=use_cache,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
            norm_before_bmm1=True,  # scaling after the product would overflow float16 with Phi-2's scores
        )
        presents = None
        if use_cache:
            attended, presents = attended
        hidden_states = hidden_states + attended + self.mlp(normed)
        return (hidden_states, presents) if use_cache else hidden_states


class PhixtralModel(Module):
    """The embedding, the layers and the final norm."""

    def __init__(self, config: PhixtralConfig) -> None:
        super().__init__()
        # With use_parallel_embedding the library divides the embedding itself, before weights are loaded.
        self.vocab_embedding = Embedding(
            num_embeddings=config.vocab_size, embedding_dim=config.hidden_size, dtype=config.dtype
        )
        self.layers = DecoderLayerList(PhixtralDecoderLayer, config)
        self.ln_f = LayerNorm(normalized_shape=config.hidden_size, eps=config.norm_epsilon, dtype=config.dtype)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,  # noqa: ARG002 - the attention plugin computes positions itself
        use_cache: bool = False,
        attention_mask: Tensor | None = None,
        kv_cache_params: KeyValueCacheParams | None = None,
        attention_params: AttentionParams | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """The normed hidden states [T, H] for token ids [T], and the layers' caches if `use_cache` is set."""
        hidden_states = self.layers(
            self.vocab_embedding(input_ids),
            use_cache=use_cache,
            attention_mask=attention_mask,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
        )
        presents: Sequence[Tensor] = ()
        if use_cache:
            hidden_states, presents = hidden_states
        hidden_states = self.ln_f(hidden_states)
        return (hidden_states, tuple(presents)) if use_cache else hidden_states


class PhixtralForCausalLM(DecoderModelForCausalLM):
    """The model of one rank. Raises ValueError for a mapping with pipeline or context parallelism."""

    config_class = PhixtralConfig

    def __init__(self, config: PhixtralConfig) -> None:
        mapping = config.mapping
        if mapping.pp_size > 1 or mapping.cp_size > 1:
            raise ValueError(
                f"making {ARCHITECTURE}: found pp_size {mapping.pp_size} and cp_size {mapping.cp_size}, expected 1 of "
                "both; phixtral is cut by tensor and expert parallelism alone, convert it with tp_size and moe_ep_size"
            )
        padded_vocab_size = -(-config.vocab_size // mapping.tp_size) * mapping.tp_size
        lm_head = ColumnLinear(
            in_features=config.hidden_size,
            out_features=padded_vocab_size,
            bias=True,
            dtype=config.dtype,
            tp_group=mapping.tp_group,
            tp_size=mapping.tp_size,
            gather_output=True,
        )
        super().__init__(config, PhixtralModel(config), lm_head)


MODEL_MAP[ARCHITECTURE] = PhixtralForCausalLM
