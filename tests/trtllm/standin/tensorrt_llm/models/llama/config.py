"""Stands for tensorrt_llm/models/llama/config.py."""

from __future__ import annotations

from typing import Any

from tensorrt_llm.layers import MoeConfig
from tensorrt_llm.models.modeling_utils import PretrainedConfig


class LLaMAConfig(PretrainedConfig):
    def __init__(
        self,
        *,
        mlp_bias: bool = False,
        attn_bias: bool = False,
        rotary_base: float = 10000.0,
        rotary_scaling: dict[str, Any] | None = None,
        residual_mlp: bool = False,
        disable_weight_only_quant_plugin: bool = False,
        moe: MoeConfig | dict[str, Any] | None = None,
        remove_duplicated_kv_heads: bool = False,
        embedding_multiplier: float = 1.0,
        attention_multiplier: float = 1.0,
        residual_multiplier: float = 1.0,
        output_multiplier_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.mlp_bias, self.attn_bias, self.residual_mlp = mlp_bias, attn_bias, residual_mlp
        self.rotary_base, self.rotary_scaling = rotary_base, rotary_scaling
        self.disable_weight_only_quant_plugin = disable_weight_only_quant_plugin
        self.remove_duplicated_kv_heads = remove_duplicated_kv_heads
        self.embedding_multiplier, self.attention_multiplier = embedding_multiplier, attention_multiplier
        self.residual_multiplier, self.output_multiplier_scale = residual_multiplier, output_multiplier_scale
        moe = MoeConfig() if moe is None else MoeConfig.from_dict(moe) if isinstance(moe, dict) else moe
        self.moe = moe.validate()
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"moe": self.moe.to_dict()}
