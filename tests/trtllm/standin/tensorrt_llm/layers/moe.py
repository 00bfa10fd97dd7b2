"""Stands for tensorrt_llm/layers/moe.py and the plugin behind it: a router in float32, and this rank's experts.

Experts are cut in blocks among moe_ep_size ranks and each along its width among moe_tp_size; one sum over the tensor
parallel group joins both. Of a gated activation `fc` holds the linear half first, then the half that the activation
sees. The plugin adds proj's bias on the first rank of moe_tp alone.
Source of the plugin's behaviour: cpp/tensorrt_llm/plugins/mixtureOfExperts/mixtureOfExpertsPlugin.cpp,
cpp/tensorrt_llm/kernels/cutlass_kernels/moe_gemm/moe_kernels.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

import torch

from tensorrt_llm._utils import absent, activations
from tensorrt_llm.functional import MOE_ACTIVATIONS, SideStreamIDType, Tensor, allreduce, is_gated_activation, topk
from tensorrt_llm.layers.linear import RowLinear
from tensorrt_llm.layers.mlp import MLP
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.module import Module
from tensorrt_llm.parameter import Parameter
from tensorrt_llm.quantization.functional import dequantize_channelwise, dequantize_groupwise
from tensorrt_llm.quantization.mode import GroupwiseQuantAlgo, QuantMode


@dataclass
class MoeConfig:
    class ExpertScaleNormalizationMode(IntEnum):
        NONE = 0
        RENORMALIZE = 1
        SPARSE_MIXER = 2
        DEVICE_LIMITED = 3
        DEVICE_LIMITED_RENORM = 4

    num_experts: int = 0
    shared_expert_intermediate_size: int = 0
    top_k: int = 0
    normalization_mode: ExpertScaleNormalizationMode = ExpertScaleNormalizationMode.RENORMALIZE
    sparse_mixer_epsilon: float = 0.01
    tp_mode: int = 0
    device_limited_n_group: int = 0
    device_limited_topk_group: int = 0
    device_limited_routed_scaling_factor: float = 1.0

    def validate(self) -> MoeConfig:
        if (self.num_experts == 0) != (self.top_k == 0):
            raise ValueError("Both or neither MoeConfig's num_experts and top_k must be set to 0")
        return self

    def has_moe(self) -> bool:
        return self.num_experts > 1

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> MoeConfig:
        return cls(**config)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class MOEWeightWrapper(Module):
    """One matrix of every expert of this rank: [experts, out, in], or as quant_mode packs it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts_per_node: int,
        quant_mode: QuantMode,
        groupwise_quant_algo: int,
        group_size: int,
        dtype: str,
        weight_dtype: str,
        has_bias: bool,
        wrapper_tllm_to_externel_key_dict: dict[str, Any],
        tp_size: int,
        tp_dim: int,
    ) -> None:
        super().__init__()
        self.quant_mode, self.group_size = quant_mode, group_size
        self._matrices: Tensor | None = None

        def parameter(name: str, *shape: int, dtype: str = dtype, where: bool = True) -> None:
            full = (experts_per_node, *shape)
            self.register_parameter(name, Parameter(shape=full, dtype=dtype) if where else None)

        per_group = quant_mode.has_per_group_scaling()
        self.bits = 8 if quant_mode.is_int8_weight_only() else 4
        if per_group:
            groups = in_features // group_size
            parameter("weight", in_features, out_features // 4)
            parameter("weights_scaling_factor", groups, out_features)
            parameter("zero", groups, out_features, where=bool(groupwise_quant_algo & GroupwiseQuantAlgo.ZERO))
        elif quant_mode.is_weight_only():
            parameter("weight", in_features, out_features * self.bits // 8, dtype=weight_dtype)
        else:
            parameter("weight", out_features, in_features, dtype=weight_dtype)
        parameter("per_channel_scale", out_features, where=quant_mode.is_weight_only() and not per_group)
        parameter("bias", out_features, where=has_bias)
        scaled = per_group and groupwise_quant_algo & GroupwiseQuantAlgo.PRE_QUANT_SCALE
        shared = Parameter(shape=(1, in_features), dtype=dtype) if scaled else None  # all experts share one
        self.register_parameter("prequant_scaling_factor", shared)

    def matrices(self) -> Tensor:
        """float32 [experts, in, out], made once: of packed weights what their bytes say."""
        if self._matrices is None:
            if self.quant_mode.has_per_group_scaling():
                zero = self.zero.value if self.zero else None
                self._matrices = dequantize_groupwise(
                    self.weight.value, self.weights_scaling_factor.value, zero, self.group_size
                )
            elif self.quant_mode.is_weight_only():
                self._matrices = dequantize_channelwise(self.weight.value, self.per_channel_scale.value, self.bits)
            else:
                self._matrices = self.weight.float32().transpose(1, 2)
        return self._matrices

    def scaled(self, x: Tensor) -> Tensor:
        return x if self.prequant_scaling_factor is None else x * self.prequant_scaling_factor.float32()


class MixtureOfExperts(Module):
    def __init__(
        self,
        moe_config: MoeConfig,
        hidden_size: int,
        ffn_hidden_size: int,
        hidden_act: str,
        mapping: Mapping = Mapping(),
        bias: bool = True,
        dtype: str | None = None,
        tp_group: Sequence[int] | None = None,
        tp_size: int = 1,
        quant_mode: QuantMode = QuantMode(0),
        use_all_reduce: bool = True,
        pre_quant_scale: bool = False,
        zero: bool = False,
        use_w4a8_awq: bool = False,
        use_int8_weight: bool = False,
        group_size: int = -1,
        static_routing: bool = False,
    ) -> None:
        super().__init__()
        self.moe_config, self.hidden_size, self.ffn_hidden_size = moe_config, hidden_size, ffn_hidden_size
        self.hidden_act, self.mapping, self.bias, self.dtype = hidden_act, mapping, bias, dtype
        self.tp_group, self.tp_size, self.quant_mode = tp_group, tp_size, quant_mode
        self.use_all_reduce, self.static_routing = use_all_reduce, static_routing
        self.pre_quant_scale, self.zero, self.group_size = pre_quant_scale, zero, group_size
        self.use_w4a8_awq, self.use_int8_weight = use_w4a8_awq, use_int8_weight
        self._check()
        self.experts_per_node = moe_config.num_experts // mapping.moe_ep_size
        self.expert_inter_size = ffn_hidden_size // mapping.moe_tp_size
        # Routing decides which experts are used: never in half precision, never cut.
        self.router = RowLinear(
            hidden_size, moe_config.num_experts, bias=False, dtype="float32", tp_group=None, tp_size=1,
            strict_dtype=True,
        )  # fmt: skip
        width = self.expert_inter_size * (2 if is_gated_activation(hidden_act) else 1)
        self.fc = self._wrapper(hidden_size, width, 0)
        self.proj = self._wrapper(self.expert_inter_size, hidden_size, 1)

    def _check(self) -> None:
        if self.use_int8_weight and self.group_size > 0:
            raise NotImplementedError("INT8-GPTQ is not implemented for MoE.")
        absent(static_routing=self.static_routing, use_w4a8_awq=self.use_w4a8_awq)
        mapping, experts = self.mapping, self.moe_config.num_experts
        if mapping.has_moe_ep() and experts % mapping.moe_ep_size:
            raise ValueError(
                f"MixtureOfExperts - Number of experts {experts} is not a multiple of EP size {mapping.moe_ep_size}"
            )
        if mapping.has_moe_tp() and self.ffn_hidden_size % mapping.moe_tp_size:
            raise ValueError(
                f"MixtureOfExperts - FFN Hidden Size {self.ffn_hidden_size} is not a multiple of TP size "
                f"{mapping.moe_tp_size}"
            )

    def _wrapper(self, in_features: int, out_features: int, tp_dim: int) -> MOEWeightWrapper:
        algorithm = self.zero * GroupwiseQuantAlgo.ZERO + self.pre_quant_scale * GroupwiseQuantAlgo.PRE_QUANT_SCALE
        weight_dtype = "int8" if self.quant_mode.is_weight_only() else self.dtype
        return MOEWeightWrapper(
            in_features, out_features, self.experts_per_node, self.quant_mode, algorithm, self.group_size, self.dtype,
            weight_dtype, self.bias, {}, self.mapping.moe_tp_size, tp_dim,
        )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        lora_layer_params: Any = None,
        all_reduce_params: Any = None,
        last_local_layer_residual: Tensor | None = None,
        side_stream_id: SideStreamIDType = SideStreamIDType.disable,
        static_routing_input: Tensor | None = None,
    ) -> Tensor:
        """[T, H] to [T, H]."""
        experts, shares = self.route(self.router(hidden_states.float()))
        output = self.apply_experts(hidden_states, experts, shares)
        if self.use_all_reduce and self.tp_size > 1 and self.tp_group is not None:
            output = allreduce(output, self.tp_group)
        return output

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [T, E] to the experts chosen and their shares, both [T, K]; of equals the lowest index first."""
        mode, modes = self.moe_config.normalization_mode, MoeConfig.ExpertScaleNormalizationMode
        absent(normalization_mode=mode not in (modes.NONE, modes.RENORMALIZE))
        scores = logits.softmax(dim=-1) if mode == modes.NONE else logits
        chosen, experts = topk(scores, self.moe_config.top_k, dim=-1)
        return experts, chosen if mode == modes.NONE else chosen.softmax(dim=-1)

    def apply_experts(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """This rank's part of the sum over the experts: what its own give, [T, H]."""
        activation, gated = MOE_ACTIVATIONS[self.hidden_act], is_gated_activation(self.hidden_act)
        fc, proj = self.fc.matrices(), self.proj.matrices()
        output = torch.zeros_like(x)
        for place, expert in enumerate(self.mapping.ep_experts(self.moe_config.num_experts)):
            tokens, rank = torch.where(experts == expert)
            inner = self.fc.scaled(x[tokens]) @ fc[place]
            if self.bias:
                inner = inner + self.fc.bias.float32()[place]
            if gated:
                linear, gate = inner.chunk(2, dim=-1)
                inner = linear * activation(gate)
            else:
                inner = activation(inner)
            result = self.proj.scaled(activations(inner)) @ proj[place]
            if self.bias and self.mapping.moe_tp_rank == 0:
                result = result + self.proj.bias.float32()[place]
            output.index_add_(0, tokens, activations(result) * shares[tokens, rank, None])
        return output


MOE = MixtureOfExperts


class SharedMoE(MOE):
    """A mixture with an expert that all tokens go through, times the sigmoid of its gate; one sum over the ranks."""

    def __init__(
        self,
        moe_config: MoeConfig,
        hidden_size: int,
        ffn_hidden_size: int,
        hidden_act: str,
        mapping: Mapping = Mapping(),
        bias: bool = True,
        dtype: str | None = None,
        tp_group: Sequence[int] | None = None,
        tp_size: int = 1,
        quant_mode: QuantMode = QuantMode(0),
        use_shared_gate: bool = False,
        use_side_stream: bool = False,
    ) -> None:
        super().__init__(
            moe_config=moe_config, hidden_size=hidden_size, ffn_hidden_size=ffn_hidden_size, hidden_act=hidden_act,
            mapping=mapping, bias=bias, dtype=dtype, tp_group=tp_group, tp_size=tp_size, quant_mode=quant_mode,
            use_all_reduce=False,
        )  # fmt: skip
        absent(use_shared_gate=not use_shared_gate)
        self.use_shared_gate, self.use_side_stream = use_shared_gate, use_side_stream
        self.shared_expert = MLP(
            hidden_size, moe_config.shared_expert_intermediate_size, hidden_act, bias=False, dtype=dtype,
            tp_group=tp_group, tp_size=tp_size, quant_mode=quant_mode, is_expert=True,
        )  # fmt: skip
        self.shared_expert_gate = RowLinear(hidden_size, 1, bias=False, dtype=dtype, tp_group=None, tp_size=1)

    def forward(self, hidden_states: Tensor, lora_layer_params: Any = None, **kwargs: Any) -> Tensor:
        """[T, H] to [T, H]."""
        beside = self.shared_expert_gate(hidden_states).sigmoid() * self.shared_expert(hidden_states)
        output = super().forward(hidden_states) + beside
        return allreduce(output, self.tp_group) if self.tp_size > 1 and self.tp_group is not None else output
