"""Packs a linear with AutoAWQ's WQLinear_GEMM, and dequantises it with its own code.

AutoAWQ's package needs a GPU to be imported, so that its folder is taken from the source archive (`pip download
--no-deps --no-binary :all: autoawq==0.2.9`), named by AUTOAWQ, and the two files are loaded alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

import torch

SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
_ROOT = Path(os.environ.get("AUTOAWQ", ""))


def _load(name: str) -> types.ModuleType:
    """A module of AutoAWQ by its path, without the package around it."""
    path = _ROOT / "awq" / Path(*name.split(".")[1:]).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


for package in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
    sys.modules.setdefault(package, types.ModuleType(package))
_helpers = types.ModuleType("awq.utils.module")
_helpers.try_import = lambda _: (None, "not needed")  # type: ignore[attr-defined]
sys.modules["awq.utils.module"] = _helpers
_devices = types.ModuleType("awq.utils.utils")
_devices.get_best_device = lambda: "cpu"  # type: ignore[attr-defined]
sys.modules["awq.utils.utils"] = _devices
_packing = _load("awq.utils.packing_utils")
_gemm = _load("awq.modules.linear.gemm")


def pack(
    weight: torch.Tensor, inputs: torch.Tensor, settings: dict[str, object]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Quantise `weight` [out, in]; `inputs` are not looked at. Returns the tensors of the linear by their endings, and
    the weight that AutoAWQ computes with, float16 [out, in]. The scales are those of awq/quantize/quantizer.py,
    `pseudo_quantize_tensor`."""
    del inputs
    size = int({**SETTINGS, **settings}["group_size"])  # type: ignore[call-overload]
    size = weight.shape[1] if size == -1 else size
    grouped = weight.half().reshape(-1, size)
    high, low = grouped.amax(dim=1, keepdim=True), grouped.amin(dim=1, keepdim=True)
    scales = (high - low).clamp(min=1e-5) / 15
    zeros = (-torch.round(low / scales)).clamp_(0, 15)
    quantised = (torch.clamp(torch.round(grouped / scales) + zeros, 0, 15) - zeros) * scales
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = quantised.reshape(weight.shape)
    packed = _gemm.WQLinear_GEMM.from_linear(
        linear, 4, size, False, scales.view(len(weight), -1).T.contiguous(), zeros.view(len(weight), -1).T.contiguous()
    )
    tensors = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    dequantised = _packing.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, size)
    return tensors, dequantised.T.contiguous()


def quantization_config(settings: dict[str, object]) -> dict[str, object]:
    """What config.json says of linears that were packed with these settings."""
    return {**SETTINGS, **settings, "modules_to_not_convert": None}
