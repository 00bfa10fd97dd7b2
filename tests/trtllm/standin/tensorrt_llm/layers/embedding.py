"""Stands for tensorrt_llm/layers/embedding.py."""

from __future__ import annotations

from collections.abc import Sequence

from tensorrt_llm.functional import Tensor, embedding
from tensorrt_llm.module import Module
from tensorrt_llm.parameter import Parameter


class Embedding(Module):
    """A table [V, H]; with a tp_group cut along the vocabulary (sharding_dim 0, rounded up) or the hidden size (1)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: str | None = None,
        tp_size: int = 1,
        tp_group: Sequence[int] | None = None,
        sharding_dim: int = 0,
        tp_rank: int | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.tp_size, self.tp_group, self.sharding_dim, self.tp_rank = tp_size, tp_group, sharding_dim, tp_rank
        shape = (num_embeddings, embedding_dim // tp_size)
        if sharding_dim == 0:
            shape = (-(-num_embeddings // tp_size), embedding_dim)
        self.weight = Parameter(shape=shape, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Token ids [T] to [T, H]."""
        weight = self.weight.float32()
        return embedding(x, weight, self.tp_size, self.tp_group, self.sharding_dim, self.tp_rank)
