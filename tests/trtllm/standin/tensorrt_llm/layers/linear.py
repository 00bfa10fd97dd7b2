"""Stands for tensorrt_llm/layers/linear.py: a column linear cuts the outputs among the ranks, a row linear the
inputs, whose sum over the ranks gets the bias once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import functional

from tensorrt_llm._utils import absent
from tensorrt_llm.functional import Tensor, allgather, allreduce
from tensorrt_llm.module import Module
from tensorrt_llm.parameter import Parameter


class LinearBase(Module):
    """Keeps what the subclasses were given; in_features and out_features are this rank's share."""

    def __init__(
        self,
        local_in_features: int,
        local_out_features: int,
        bias: bool,
        dtype: str | None,
        tp_group: Sequence[int] | None,
        tp_size: int,
        strict_dtype: bool,
        prefer_managed_weight: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = local_in_features, local_out_features, dtype
        self.tp_group, self.tp_size = tp_group, tp_size
        self.strict_dtype = dtype if strict_dtype else None
        self.prefer_managed_weight = prefer_managed_weight
        self.weight = Parameter(shape=(local_out_features, local_in_features), dtype=dtype, prefer_managed=True)
        self.register_parameter("bias", Parameter(shape=(local_out_features,), dtype=dtype) if bias else None)

    def multiply(self, x: Tensor) -> Tensor:
        """x [T, in] times this rank's weight, [T, out]."""
        return functional.linear(x, self.weight.float32())

    def is_parallel(self) -> bool:
        return self.tp_size > 1 and self.tp_group is not None


class Linear(LinearBase):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: str | None = None,
        tp_group: Sequence[int] | None = None,
        tp_size: int = 1,
        gather_output: bool = True,
        share_weight: Parameter | None = None,
        strict_dtype: bool = False,
        pad_lda: int = 0,
        pad_ldc: int = 0,
        prefer_managed_weight: bool = True,
        is_qkv: bool = False,
    ) -> None:
        absent(pad_lda=pad_lda, pad_ldc=pad_ldc, share_weight=share_weight)
        super().__init__(
            in_features, out_features // tp_size, bias, dtype, tp_group, tp_size, strict_dtype, prefer_managed_weight
        )
        self.gather_output, self.is_qkv = gather_output, is_qkv
        self.share_weight, self.pad_lda, self.pad_ldc = share_weight, pad_lda, pad_ldc

    def forward(self, x: Tensor, lora_runtime_params: Any = None) -> Tensor:
        return self.collect(self.add_bias(self.multiply(x)))

    def add_bias(self, x: Tensor) -> Tensor:
        return x if self.bias is None else x + self.bias.float32()

    def collect(self, x: Tensor) -> Tensor:
        return allgather(x, self.tp_group, gather_dim=-1) if self.gather_output and self.is_parallel() else x


ColumnLinear = Linear


class RowLinear(LinearBase):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: str | None = None,
        tp_group: Sequence[int] | None = None,
        tp_size: int = 1,
        strict_dtype: bool = False,
        pad_lda: int = 0,
        prefer_managed_weight: bool = True,
        is_expert: bool = False,
    ) -> None:
        absent(pad_lda=pad_lda, biased_expert=is_expert and bias)
        super().__init__(
            in_features // tp_size, out_features, bias, dtype, tp_group, tp_size, strict_dtype, prefer_managed_weight
        )
        self.pad_lda, self.is_expert = pad_lda, is_expert

    def forward(self, x: Tensor, lora_runtime_params: Any = None, all_reduce_params: Any = None) -> Tensor:
        x = self.multiply(x)
        if self.is_parallel() and not self.is_expert:  # who adds an expert's output to others sums over the ranks
            x = allreduce(x, self.tp_group)
        return x if self.bias is None else x + self.bias.float32()
