"""Stands for tensorrt_llm/layers/mlp.py: an MLP whose first matrix holds the linear half first, then the half that the
activation sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensorrt_llm._utils import absent, activations
from tensorrt_llm.functional import MOE_ACTIVATIONS, Tensor
from tensorrt_llm.layers.linear import ColumnLinear, RowLinear
from tensorrt_llm.module import Module
from tensorrt_llm.quantization.mode import QuantMode


class MLP(Module):
    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        hidden_act: str,
        bias: bool = True,
        dtype: str | None = None,
        tp_group: Sequence[int] | None = None,
        tp_size: int = 1,
        quant_mode: QuantMode = QuantMode(0),
        inner_layernorm: bool = False,
        eps: float = 1e-05,
        is_expert: bool = False,
    ) -> None:
        super().__init__()
        absent(hidden_act=hidden_act != "swiglu", inner_layernorm=inner_layernorm)
        self.fc = ColumnLinear(
            hidden_size, 2 * ffn_hidden_size, bias=bias, dtype=dtype, tp_group=tp_group, tp_size=tp_size,
            gather_output=False,
        )  # fmt: skip
        self.proj = RowLinear(
            ffn_hidden_size, hidden_size, bias=bias, dtype=dtype, tp_group=tp_group, tp_size=tp_size,
            is_expert=is_expert,
        )  # fmt: skip
        self.hidden_size, self.ffn_hidden_size, self.hidden_act = hidden_size, ffn_hidden_size, hidden_act
        self.dtype, self.bias, self.tp_group, self.tp_size = dtype, bias, tp_group, tp_size
        self.quant_mode, self.eps, self.is_expert = quant_mode, eps, is_expert

    def forward(
        self, hidden_states: Tensor, lora_layer_params: Any = None, gegelu_limit: float | None = None
    ) -> Tensor:
        """[T, H] to [T, H], of an expert this rank's part of it."""
        linear, gate = self.fc(hidden_states).chunk(2, dim=-1)
        return self.proj(activations(linear * MOE_ACTIVATIONS[self.hidden_act](gate)))
