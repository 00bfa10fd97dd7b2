"""Stands for tensorrt_llm/layers/__init__.py."""

from tensorrt_llm.functional import AttentionMaskType, PositionEmbeddingType
from tensorrt_llm.layers.attention import Attention, AttentionParams, KeyValueCacheParams
from tensorrt_llm.layers.embedding import Embedding
from tensorrt_llm.layers.linear import ColumnLinear, Linear, RowLinear
from tensorrt_llm.layers.mlp import MLP
from tensorrt_llm.layers.moe import MOE, MixtureOfExperts, MoeConfig, SharedMoE
from tensorrt_llm.layers.normalization import LayerNorm, RmsNorm

__all__ = [
    "MLP", "MOE", "Attention", "AttentionMaskType", "AttentionParams", "ColumnLinear", "Embedding",
    "KeyValueCacheParams", "LayerNorm", "Linear", "MixtureOfExperts", "MoeConfig", "PositionEmbeddingType", "RmsNorm",
    "RowLinear", "SharedMoE",
]  # fmt: skip
