"""Packs a linear whose groups are in the order of activation, with compressed-tensors 0.9, which still has that order.

Later versions refuse `actorder: group`. 0.9 also writes the structure of blocks as text, which its settings here show.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils.helpers import calculate_qparams


def _args(settings: dict[str, Any]) -> QuantizationArgs:
    return QuantizationArgs(num_bits=4, strategy="group", actorder="group", symmetric=True, **settings)


def pack(
    weight: torch.Tensor, inputs: torch.Tensor, settings: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Quantise `weight` [out, in] in groups of the input features in descending order of their squares in `inputs`.
    Returns the tensors of the linear by their endings, and the decompressed weight."""
    args = _args(settings)
    order = torch.argsort(inputs.square().mean(dim=0), descending=True)
    groups = torch.empty(len(order), dtype=torch.int32)
    groups[order] = (torch.arange(len(order)) // args.group_size).to(torch.int32)
    blocks = weight[:, order].reshape(len(weight), -1, args.group_size)
    scales, zeros = calculate_qparams(blocks.amin(dim=-1), blocks.amax(dim=-1), args)
    scales = scales.to(torch.bfloat16)
    compressor = PackedQuantizationCompressor()
    packed = compressor.compress_weight(weight.to(torch.bfloat16), scales, args, zeros, groups)
    packed |= {"weight_scale": scales, "weight_g_idx": groups}
    return packed, compressor.decompress_weight(packed, args)


def quantization_config(settings: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of linears that were packed with these settings."""
    weights = _args(settings).model_dump(mode="json")
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "quantization_status": "compressed",
    }  # fmt: skip
