"""Packs a linear with GPTQModel: its quantiser, its packing, and its dequantisation in torch."""

from __future__ import annotations

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "version": 1}


def pack(
    weight: torch.Tensor, inputs: torch.Tensor, settings: dict[str, object]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Quantise `weight` [out, in] for `inputs` [n, in]. Returns the tensors of the linear by their endings, and the
    weight that GPTQModel computes with, float16 [out, in]."""
    chosen = {**SETTINGS, **settings}
    bits, group_size = int(chosen["bits"]), int(chosen["group_size"])
    sym, ordered = bool(chosen["sym"]), bool(chosen["desc_act"])
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.float().clone()
    config = QuantizeConfig(bits=bits, group_size=group_size, desc_act=ordered, sym=sym, act_group_aware=False)
    quantiser = GPTQ(linear, config)
    quantiser.quantizer.configure(perchannel=True)
    quantiser.add_batch(inputs[None].float(), linear(inputs[None].float()))
    quantised, scales, zeros, g_idx, *_ = quantiser.quantize(blocksize=128)
    linear.weight.data = quantised.float()
    packed = TorchLinear(
        bits=bits, group_size=group_size, sym=sym, desc_act=ordered, in_features=weight.shape[1],
        out_features=weight.shape[0], bias=False, pack_dtype=torch.int32,
    )  # fmt: skip
    packed.pack_original(linear, scales, zeros, g_idx)
    packed.eval()
    if chosen["version"] == 1:
        convert_gptq_v2_to_v1_format_module(packed, config)
    tensors = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    if chosen["version"] == 1:
        convert_gptq_v1_to_v2_format_module(packed, bits, torch.int32)
    return tensors, packed.dequantize_weight().T.contiguous()


def quantization_config(settings: dict[str, object]) -> dict[str, object]:
    """What config.json says of linears that were packed with these settings."""
    chosen = {**SETTINGS, **settings}
    version = chosen.pop("version")
    return {**chosen, "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "pack_dtype": "int32"}
