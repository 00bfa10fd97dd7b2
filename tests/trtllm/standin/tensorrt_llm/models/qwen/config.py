"""Stands for tensorrt_llm/models/qwen/config.py."""

from __future__ import annotations

from typing import Any

from tensorrt_llm.layers import MoeConfig
from tensorrt_llm.models.modeling_utils import PretrainedConfig


class QWenConfig(PretrainedConfig):
    def __init__(
        self,
        *,
        mlp_bias: bool = False,
        attn_bias: bool = True,
        rotary_base: float = 10000.0,
        rotary_scaling: dict[str, Any] | None = None,
        disable_weight_only_quant_plugin: bool = False,
        use_logn_attn: bool = False,
        moe: MoeConfig | dict[str, Any] | None = None,
        num_labels: int = 1,
        mlp_only_layers: list[int] | None = None,
        decoder_sparse_step: int = 1,
        **kwargs: Any,
    ) -> None:
        self.mlp_bias, self.attn_bias, self.use_logn_attn = mlp_bias, attn_bias, use_logn_attn
        self.rotary_base, self.rotary_scaling = rotary_base, rotary_scaling
        self.disable_weight_only_quant_plugin, self.num_labels = disable_weight_only_quant_plugin, num_labels
        self.mlp_only_layers, self.decoder_sparse_step = mlp_only_layers or [], decoder_sparse_step
        if moe is None:
            moe = MoeConfig(normalization_mode=MoeConfig.ExpertScaleNormalizationMode.NONE)
        self.moe = (MoeConfig.from_dict(moe) if isinstance(moe, dict) else moe).validate()
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"moe": self.moe.to_dict()}
