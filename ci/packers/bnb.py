"""Packs a linear with bitsandbytes, and dequantises it with the same."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as functional
import torch

SETTINGS: dict[str, Any] = {"kind": "nf4", "nested": False, "dtype": "float16", "block": 64}


def pack(
    weight: torch.Tensor, inputs: torch.Tensor, settings: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Quantise `weight` [out, in]; `inputs` are not looked at. Returns the tensors of the linear by their endings, and
    the weight that bitsandbytes computes with."""
    del inputs
    chosen = {**SETTINGS, **settings}
    if chosen["kind"] == "int8":
        codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
        return {"weight": codes, "SCB": largest}, functional.int8_vectorwise_dequant(codes, largest)
    values = weight.to(getattr(torch, chosen["dtype"]))
    codes, state = functional.quantize_4bit(
        values, blocksize=chosen["block"], compress_statistics=chosen["nested"], quant_type=chosen["kind"]
    )
    parts = {f"weight.{ending}": tensor for ending, tensor in state.as_dict(packed=True).items()}
    return {"weight": codes, **parts}, functional.dequantize_4bit(codes, state)


def quantization_config(settings: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of linears that were packed with these settings."""
    chosen = {**SETTINGS, **settings}
    four = chosen["kind"] != "int8"
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four,
        "bnb_4bit_quant_type": chosen["kind"] if four else "fp4", "bnb_4bit_use_double_quant": chosen["nested"],
        "bnb_4bit_compute_dtype": "float16", "llm_int8_threshold": 6.0,
    }  # fmt: skip
