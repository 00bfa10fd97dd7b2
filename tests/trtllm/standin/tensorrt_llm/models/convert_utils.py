"""Stands for tensorrt_llm/models/convert_utils.py and the preprocessing of weights in models/modeling_utils.py: what a
checkpoint's tensors become when it is loaded, before they meet the parameters."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch

from tensorrt_llm._utils import str_dtype_to_torch
from tensorrt_llm.quantization.functional import (
    preprocess_weights_for_mixed_gemm,
    symmetric_quantize_last_axis_of_batched_matrix,
)
from tensorrt_llm.quantization.mode import QuantAlgo

Weights = dict[str, torch.Tensor]

# Whatever has one of these in its name, be it a part of another word.
_QUANTISED_NAMES = ("qkv.weight", "dense.weight", "fc.weight", "proj.weight", "gate.weight")


def weight_only_quantize_dict(weights: Weights, quant_algo: str, exclude_modules: Sequence[str] | None) -> Weights:
    """Quantise what is not yet int8, and add the scales beside it. Patterns are compared with tensors' names here,
    where quantize() compares them with modules'."""
    patterns = ["*shared_expert_gate.weight"] if exclude_modules is None else exclude_modules
    quant_type = torch.quint4x2 if quant_algo == QuantAlgo.W4A16 else torch.int8
    for name, weight in list(weights.items()):
        excluded = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        if excluded or weight.dtype == torch.int8 or not any(part in name for part in _QUANTISED_NAMES):
            continue
        turned = weight.transpose(-1, -2).contiguous()
        weights[name], scale = symmetric_quantize_last_axis_of_batched_matrix(turned, quant_type)
        weights[name.replace(".weight", ".per_channel_scale")] = scale
    return weights


def _preprocess_awq(weights: Weights, config: Any) -> Weights:
    """int8 [.., out / 2, in] to the kernels' layout as [.., in, out / 4] of the model's dtype, scales and the factors
    before them turned likewise; a bias that each rank of a row would add becomes zero on all but the first."""
    dtype = str_dtype_to_torch(config.dtype)
    for name, tensor in list(weights.items()):
        if name.endswith("weight") and tensor.dtype == torch.int8:
            packed = preprocess_weights_for_mixed_gemm(tensor.transpose(-1, -2), torch.quint4x2, torch.float16)
            weights[name] = packed.view(dtype)
        elif name.endswith("weights_scaling_factor"):
            weights[name] = tensor.transpose(-1, -2).contiguous().to(dtype)
        elif name.endswith("prequant_scaling_factor"):
            weights[name] = (tensor[0] if tensor.dim() == 2 else tensor).reshape(1, -1)
        elif config.mapping.tp_rank > 0 and name.endswith(("attention.dense.bias", "mlp.proj.bias")):
            weights[name] = torch.zeros_like(tensor)
    return weights


def preprocess_weights(weights: Weights, config: Any) -> Weights:
    """The tensors of a rank file as the model's parameters want them."""
    quant_algo = config.quantization.quant_algo
    if quant_algo == QuantAlgo.W4A16_AWQ:
        return _preprocess_awq(weights, config)
    if quant_algo in (QuantAlgo.W4A16, QuantAlgo.W8A16):
        return weight_only_quantize_dict(weights, quant_algo, config.quantization.exclude_modules)
    return weights
