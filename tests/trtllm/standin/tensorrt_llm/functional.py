"""Stands for tensorrt_llm/functional.py: the enumerations of layers' arguments, and operations on eager tensors."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch.nn import functional

from tensorrt_llm.world import exchange, this_rank

Tensor = torch.Tensor


class AttentionMaskType(IntEnum):
    padding = 0
    causal = 1


class LayerNormType(IntEnum):
    LayerNorm = 0
    RmsNorm = 1


class SideStreamIDType(IntEnum):
    disable = 0
    moe = 1


class PositionEmbeddingType(IntEnum):
    learned_absolute = 0
    rope_gptj = 1
    rope_gpt_neox = 2

    def is_rope(self) -> bool:
        return self in (PositionEmbeddingType.rope_gptj, PositionEmbeddingType.rope_gpt_neox)

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def from_string(name: str) -> PositionEmbeddingType:
        try:
            return PositionEmbeddingType[name]
        except KeyError:
            raise ValueError(f"Unsupported position embedding type: {name}") from None


def allreduce(tensor: Tensor, group: Sequence[int]) -> Tensor:
    """The sum over the group's ranks, in their order."""
    first, *others = exchange(tensor, group)
    total = first.clone()
    for other in others:
        total += other
    return total


def allgather(tensor: Tensor, group: Sequence[int], gather_dim: int = 0) -> Tensor:
    return torch.cat(exchange(tensor, group), dim=gather_dim)


def send(tensor: Tensor, tgt: int) -> Tensor:
    world, rank = this_rank()
    world.send(tensor, rank, tgt)
    return tensor


def recv(tensor: Tensor, src: int) -> Tensor:
    """What the rank `src` sends, of `tensor`'s shape."""
    world, rank = this_rank()
    received = world.receive(src, rank)
    assert received.shape == tensor.shape, f"received {tuple(received.shape)}, expected {tuple(tensor.shape)}"
    return received


def embedding(
    ids: Tensor, weight: Tensor, tp_size: int, tp_group: Sequence[int] | None, sharding_dim: int, tp_rank: int | None
) -> Tensor:
    """Rows of a table that is whole, or cut along the vocabulary (0) or the hidden size (1)."""
    if tp_size == 1 or tp_group is None:
        return weight[ids]
    if sharding_dim == 1:
        return allgather(weight[ids], tp_group, gather_dim=-1)
    assert tp_rank is not None, "Rank cannot be none for tensor parallelism on vocab dim"
    local = ids - tp_rank * weight.shape[0]
    mine = (local >= 0) & (local < weight.shape[0])
    return allreduce(weight[local.clamp(0, weight.shape[0] - 1)] * mine[:, None], tp_group)


def gather_last_token_logits(hidden_states: Tensor, last_token_ids: Tensor | None) -> Tensor:
    """The rows [T, H] of the packed hidden states that logits are asked for, counted from 1; None: all."""
    return hidden_states if last_token_ids is None else hidden_states[last_token_ids - 1]


def topk(input: Tensor, k: int, dim: int, largest: bool = True, prefer_plugin: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest values along the last axis and their places. The plugin TopkLastDim takes the lowest index among
    equals: its sort is stable (cpp/tensorrt_llm/kernels/topkLastDim.cu, moeTopKFuncs.cuh)."""
    if not (largest and prefer_plugin and dim in (-1, input.ndim - 1)):
        raise NotImplementedError("only the plugin TopkLastDim is stood in for")
    ordered, places = input.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :k], places[..., :k]


def is_gated_activation(activation: str) -> bool:
    return activation in ("swiglu", "geglu")


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


# What the MoE plugin takes (tensorrt_llm/layers/moe.py); of a gated one the function that the gate passes through.
# The plugin's GELU is the tanh approximation (cpp/tensorrt_llm/cutlass_extensions/.../epilogue_helpers.h).
MOE_ACTIVATIONS = {
    "gelu": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "relu": functional.relu,
    "silu": functional.silu,
    "swiglu": functional.silu,
    "geglu": _gelu_tanh,
}
