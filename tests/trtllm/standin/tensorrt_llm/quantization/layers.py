"""Stands for tensorrt_llm/quantization/layers.py: the linears that quantize() puts in place of plain ones.

All of them round sizes up to what their kernels take, times the ranks, and then ask the checkpoint for the larger
tensors. The group-wise ones hand the bias to the product: each rank of a row linear adds it, before the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensorrt_llm._utils import absent
from tensorrt_llm.functional import Tensor, allreduce
from tensorrt_llm.layers.linear import Linear, RowLinear
from tensorrt_llm.parameter import Parameter
from tensorrt_llm.quantization.functional import dequantize_channelwise, dequantize_groupwise
from tensorrt_llm.quantization.mode import QuantMode


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class _Channelwise:
    """Packed codes and a scale for each output: what both per-channel linears have."""

    def make_channelwise(self, quant_mode: QuantMode, dtype: str | None) -> None:
        self.quant_mode = quant_mode
        self.weight_only_quant_mode = 1 if quant_mode.is_int8_weight_only() else 2
        columns = self.out_features // self.weight_only_quant_mode
        self.weight = Parameter(shape=(self.in_features, columns), dtype="int8", prefer_managed=True)
        self.per_channel_scale = Parameter(shape=(self.out_features,), dtype=dtype)
        self._matrix: Tensor | None = None

    def multiply(self, x: Tensor) -> Tensor:
        if self._matrix is None:
            bits = 8 // self.weight_only_quant_mode
            self._matrix = dequantize_channelwise(self.weight.value, self.per_channel_scale.value, bits)
        return x @ self._matrix


class WeightOnlyQuantLinear(_Channelwise, Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: str | None = None,
        tp_group: Sequence[int] | None = None,
        tp_size: int = 1,
        tp_rank: int = 0,
        gather_output: bool = True,
        quant_mode: QuantMode = QuantMode.use_weight_only(),
        transa: bool = False,
        transb: bool = False,
        is_qkv: bool = False,
        prefer_managed_weight: bool = True,
    ) -> None:
        absent(transa=transa, transb=transb)
        multiple = 64 * tp_size
        super().__init__(
            _padded(in_features, multiple), _padded(out_features, multiple), bias=bias, dtype=dtype,
            tp_group=tp_group, tp_size=tp_size, gather_output=gather_output, is_qkv=is_qkv,
            prefer_managed_weight=prefer_managed_weight,
        )  # fmt: skip
        self.tp_rank, self.transa, self.transb = tp_rank, transa, transb
        self.make_channelwise(quant_mode, dtype)


WeightOnlyQuantColumnLinear = WeightOnlyQuantLinear


class WeightOnlyQuantRowLinear(_Channelwise, RowLinear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: str | None = None,
        tp_group: Sequence[int] | None = None,
        tp_size: int = 1,
        tp_rank: int = 0,
        quant_mode: QuantMode = QuantMode.use_weight_only(),
        prefer_managed_weight: bool = True,
        is_expert: bool = False,
    ) -> None:
        multiple = 64 * tp_size
        super().__init__(
            _padded(in_features, multiple), _padded(out_features, multiple), bias=bias, dtype=dtype,
            tp_group=tp_group, tp_size=tp_size, prefer_managed_weight=prefer_managed_weight, is_expert=is_expert,
        )  # fmt: skip
        self.tp_rank = tp_rank
        self.make_channelwise(quant_mode, dtype)


class _Groupwise:
    """int4 codes in a tensor of the model's dtype, a scale and perhaps a zero point for each group of inputs."""

    def make_groupwise(self, group_size: int, pre_quant_scale: bool, zero: bool, dtype: str | None) -> None:
        if group_size not in (64, 128):
            raise ValueError(f"group_size {group_size} is neither 64 nor 128")
        self.group_size, self.pre_quant_scale = group_size, pre_quant_scale
        self.weight = Parameter(shape=(self.in_features, self.out_features // 4), dtype=dtype, prefer_managed=True)
        scales = (self.in_features // group_size, self.out_features)
        self.weights_scaling_factor = Parameter(shape=scales, dtype=dtype)
        self.register_parameter("zero", Parameter(shape=scales, dtype=dtype) if zero else None)
        before = Parameter(shape=(1, self.in_features), dtype=dtype) if pre_quant_scale else None
        self.register_parameter("prequant_scaling_factor", before)
        self._matrix: Tensor | None = None

    def multiply_and_add_bias(self, x: Tensor) -> Tensor:
        if self._matrix is None:
            zero = self.zero.value if self.zero else None
            scale = self.weights_scaling_factor.value
            self._matrix = dequantize_groupwise(self.weight.value, scale, zero, self.group_size)
        if self.prequant_scaling_factor is not None:
            x = x * self.prequant_scaling_factor.float32()
        x = x @ self._matrix
        return x if self.bias is None else x + self.bias.float32()


class WeightOnlyGroupwiseQuantLinear(_Groupwise, Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int = 128,
        pre_quant_scale: bool = False,
        zero: bool = False,
        bias: bool = False,
        dtype: str | None = None,
        tp_group: Sequence[int] | None = None,
        tp_size: int = 1,
        tp_rank: int = 0,
        gather_output: bool = True,
        use_w4a8_awq: bool = False,
        use_int8_weight: bool = False,
        is_qkv: bool = False,
        prefer_managed_weight: bool = True,
    ) -> None:
        absent(use_w4a8_awq=use_w4a8_awq, use_int8_weight=use_int8_weight)
        multiple = max(64, group_size) * tp_size
        super().__init__(
            _padded(in_features, multiple), _padded(out_features, multiple), bias=bias, dtype=dtype,
            tp_group=tp_group, tp_size=tp_size, gather_output=gather_output, is_qkv=is_qkv,
            prefer_managed_weight=prefer_managed_weight,
        )  # fmt: skip
        self.tp_rank = tp_rank
        self.make_groupwise(group_size, pre_quant_scale, zero, dtype)

    def forward(self, x: Tensor, lora_runtime_params: Any = None) -> Tensor:
        return self.collect(self.multiply_and_add_bias(x))


WeightOnlyGroupwiseQuantColumnLinear = WeightOnlyGroupwiseQuantLinear


class WeightOnlyGroupwiseQuantRowLinear(_Groupwise, RowLinear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int = 128,
        pre_quant_scale: bool = False,
        zero: bool = False,
        bias: bool = False,
        dtype: str | None = None,
        tp_group: Sequence[int] | None = None,
        tp_size: int = 1,
        tp_rank: int = 0,
        use_w4a8_awq: bool = False,
        use_int8_weight: bool = False,
        prefer_managed_weight: bool = True,
    ) -> None:
        absent(use_w4a8_awq=use_w4a8_awq, use_int8_weight=use_int8_weight)
        multiple = max(64, group_size) * tp_size
        super().__init__(
            _padded(in_features, multiple), _padded(out_features, multiple), bias=bias, dtype=dtype,
            tp_group=tp_group, tp_size=tp_size, prefer_managed_weight=prefer_managed_weight,
        )  # fmt: skip
        self.tp_rank = tp_rank
        self.make_groupwise(group_size, pre_quant_scale, zero, dtype)

    def forward(self, x: Tensor, lora_runtime_params: Any = None, all_reduce_params: Any = None) -> Tensor:
        x = self.multiply_and_add_bias(x)
        return allreduce(x, self.tp_group) if self.is_parallel() else x
