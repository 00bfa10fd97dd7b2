"""Stands for tensorrt_llm/layers/normalization.py."""

from __future__ import annotations

import torch
from torch.nn import functional

from tensorrt_llm._utils import absent
from tensorrt_llm.functional import Tensor
from tensorrt_llm.module import Module
from tensorrt_llm.parameter import Parameter


class LayerNorm(Module):
    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        eps: float = 1e-05,
        elementwise_affine: bool = True,
        bias: bool = True,
        dtype: str | None = None,
        tp_size: int = 1,
        tp_dim: int = -1,
    ) -> None:
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps, self.elementwise_affine, self.dtype = eps, elementwise_affine, dtype
        self.tp_size, self.tp_dim = tp_size, tp_dim
        has_bias = elementwise_affine and bias
        self.register_parameter(
            "weight", Parameter(shape=self.normalized_shape, dtype=dtype) if elementwise_affine else None
        )
        self.register_parameter("bias", Parameter(shape=self.normalized_shape, dtype=dtype) if has_bias else None)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float32() if self.weight else None
        bias = self.bias.float32() if self.bias else None
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RmsNorm(Module):
    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        num_groups: int = 1,
        eps: float = 1e-06,
        elementwise_affine: bool = True,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        absent(num_groups=num_groups > 1)
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.num_groups, self.eps, self.elementwise_affine, self.dtype = num_groups, eps, elementwise_affine, dtype
        self.register_parameter(
            "weight", Parameter(shape=self.normalized_shape, dtype=dtype) if elementwise_affine else None
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed * self.weight.float32() if self.weight else normed
