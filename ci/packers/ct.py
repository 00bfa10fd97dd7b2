"""Packs a linear with the package compressed-tensors, and decompresses it with the same."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams

SETTINGS: dict[str, Any] = {"format": "pack-quantized", "num_bits": 4, "strategy": "group", "group_size": 128}


def _args(settings: dict[str, Any]) -> QuantizationArgs:
    chosen = {**SETTINGS, **settings}
    chosen.pop("format")
    chosen.pop("scales", None)
    if chosen["strategy"] != "group":
        chosen["group_size"] = None
    return QuantizationArgs(**chosen)


def pack(
    weight: torch.Tensor, inputs: torch.Tensor, settings: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Quantise `weight` [out, in]; `inputs` are not looked at. Returns the tensors of the linear by their endings, and
    the decompressed weight."""
    del inputs
    args = _args(settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    rows, columns = weight.shape
    if args.strategy == "group":
        blocks, shape = weight.reshape(rows, -1, args.group_size), (rows, -1)
    elif args.strategy == "channel":
        blocks, shape = weight.reshape(rows, 1, columns), (rows, 1)
    elif args.strategy == "block":
        high, wide = args.block_structure
        blocks = weight.reshape(rows // high, high, columns // wide, wide).transpose(1, 2).flatten(2)
        shape = (rows // high, columns // wide)
    else:
        blocks, shape = weight.reshape(1, 1, -1), (1,)
    scales, zeros = calculate_qparams(blocks.amin(dim=-1), blocks.amax(dim=-1), args)
    kind = getattr(torch, settings.get("scales", "bfloat16"))
    state = {"weight": weight.to(kind), "weight_scale": scales.reshape(shape).to(kind),
             "weight_zero_point": zeros.reshape(shape)}  # fmt: skip
    compressor = BaseCompressor.get_value_from_registry({**SETTINGS, **settings}["format"])
    packed = compressor.compress(state, scheme)
    return packed, compressor.decompress(packed, scheme)["weight"]


def quantization_config(settings: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of linears that were packed with these settings."""
    weights = _args(settings).model_dump(mode="json")
    written = {**SETTINGS, **settings}["format"]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": written, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "quantization_status": "compressed", "kv_cache_scheme": None,
    }  # fmt: skip
