"""What rank files mean, said by other code than reads them: the reference, with dequantised weights where they are
quantised.

Codes and scales are made here, in torch, by the rules that config.json's quant_algo stands for; a matrix that is cut
along its input may have scales of its own in each cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch_reference import load_reference
from trtllm.ranks import FloatArray

from export.families import Model
from export.quantize.grid import quantize_blocks

Tensor = torch.Tensor
Rounding = Callable[[Tensor, int], Tensor]  # a matrix [out, in], and among how many ranks its input is cut


def logits_of(reference: Any, token_ids: Sequence[int]) -> FloatArray:
    """float32 [T, V] of a reference model."""
    with torch.inference_mode():
        logits: FloatArray = reference(torch.tensor([list(token_ids)])).logits[0].numpy()
    return logits


def answer_of(reference: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The likeliest tokens after a prompt by transformers' own generate, whatever end token comes."""
    ids = torch.tensor([list(prompt)])
    settings = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = reference.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return output[0, len(prompt) :].tolist()


def channelwise(bits: int, dtype: torch.dtype = torch.float16) -> Rounding:
    """One scale for an output: the largest magnitude over 2^(bits - 1), kept in `dtype`; in each cut where it is cut
    before it is quantised. Halves are rounded away from zero."""
    end = 2 ** (bits - 1)

    def rounded(weight: Tensor, cuts: int) -> Tensor:
        parts = []
        for part in weight.double().chunk(cuts, dim=-1):
            scale = part.abs().amax(dim=-1, keepdim=True) / end
            ratio = part / scale
            codes = ((ratio.abs() + 0.5).floor() * ratio.sign()).clamp(-end, end - 1)
            parts.append(codes.float() * scale.to(dtype).float())
        return torch.cat(parts, dim=-1)

    return rounded


def groupwise(group_size: int, dtype: torch.dtype = torch.float16) -> Rounding:
    """Codes and scales that moeship's own quantiser chooses for groups along the input, the scales kept in `dtype`."""

    def rounded(weight: Tensor, cuts: int) -> Tensor:  # a cut lies between groups
        codes, scales = quantize_blocks(weight.float().numpy(), 4, group_size)
        kept = torch.from_numpy(scales).to(dtype).float().repeat_interleave(group_size, dim=-1)
        return (torch.from_numpy(codes).float() - 8) * kept

    return rounded


def reference_with(model: Model, rounding: Rounding, tp_size: int = 1, moe_tp_size: int = 1) -> Any:
    """The reference with every matrix of attention and experts rounded; router, embedding, norms, head and biases as
    they are."""
    reference = load_reference(model)
    with torch.no_grad():
        for layer in reference.model.layers:
            attention, mixture = layer.self_attn, layer.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                linear.weight.copy_(rounding(linear.weight, 1))
            output = attention.dense if hasattr(attention, "dense") else attention.o_proj
            output.weight.copy_(rounding(output.weight, tp_size))
            first, second = _matrices(mixture)
            first.copy_(rounding(first, 1))
            second.copy_(rounding(second, moe_tp_size))
            if hasattr(mixture, "shared_expert"):
                beside = mixture.shared_expert
                for linear in (beside.gate_proj, beside.up_proj):
                    linear.weight.copy_(rounding(linear.weight, 1))
                beside.down_proj.weight.copy_(rounding(beside.down_proj.weight, tp_size))
    return reference


def _matrices(mixture: Any) -> tuple[Tensor, Tensor]:
    if hasattr(mixture, "fc1"):
        return mixture.fc1["weight"], mixture.fc2["weight"]
    return mixture.experts.gate_up_proj, mixture.experts.down_proj
