"""Writes the golden matrices of tests/export/formats: packed by the field's own tools (ci/packers/README.md).

    python ci/packers/golden.py FOLDER [METHOD...]

One file a method. A case NAME has the packed tensors NAME.weight's linear stores, the dequantised matrix under
`NAME.expected`, and its quantization_config in the file's metadata, as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

_INT = {"format": "int-quantized"}
_FLOAT = {"format": "float-quantized", "type": "float", "num_bits": 8, "symmetric": True}
# Method -> the packages that made it, and its cases: name, shape [out, in], settings.
CASES = {
    "gptq": (
        ["gptqmodel", "torch"],
        [
            *(
                (f"int{bits}_{kind}_{form}", (32, 128), {"bits": bits, "group_size": 32, "sym": sym, "version": number})
                for bits in (2, 3, 4, 8)
                for kind, sym in (("sym", True), ("asym", False))
                for form, number in (("v1", 1), ("v2", 2))
            ),
            ("int4_group64", (32, 192), {"group_size": 64, "sym": False}),
            ("int4_group128", (32, 256), {"group_size": 128}),
            ("int4_whole_row", (32, 96), {"group_size": -1}),
            ("int4_ordered", (32, 256), {"group_size": 64, "sym": False, "desc_act": True}),
            ("int3_ordered", (32, 128), {"group_size": 32, "sym": False, "desc_act": True, "bits": 3}),
        ],
    ),
    "awq": (
        ["torch"],  # and AutoAWQ's source, whose version ci/packers/awq.py names
        [
            ("group32", (32, 128), {"group_size": 32}),
            ("group64", (64, 128), {"group_size": 64}),
            ("group128", (32, 256), {"group_size": 128}),
            ("whole_row", (32, 96), {"group_size": -1}),
        ],
    ),
    "ct": (
        ["compressed-tensors", "torch"],
        [
            ("int4_group32", (32, 128), {"group_size": 32, "symmetric": True}),
            ("int4_group128_half", (32, 256), {"symmetric": True, "scales": "float16"}),
            ("int4_asymmetric", (40, 128), {"group_size": 64, "symmetric": False}),
            ("int4_channel", (32, 96), {"strategy": "channel", "symmetric": True}),
            ("int8_packed", (32, 64), {"num_bits": 8, "strategy": "channel", "symmetric": True}),
            ("int8_channel", (32, 64), {"num_bits": 8, "strategy": "channel", "symmetric": True, **_INT}),
            ("int8_asymmetric", (32, 64), {"num_bits": 8, "strategy": "channel", "symmetric": False, **_INT}),
            ("int8_tensor", (32, 64), {"num_bits": 8, "strategy": "tensor", "symmetric": True, **_INT}),
            ("float8_tensor", (32, 64), {"strategy": "tensor", **_FLOAT}),
            ("float8_channel", (32, 64), {"strategy": "channel", **_FLOAT}),
            ("float8_block", (64, 96), {"strategy": "block", "block_structure": [16, 32], **_FLOAT}),
        ],
    ),
    "ct_ordered": (
        ["compressed-tensors", "torch"],
        [("group32", (32, 128), {"group_size": 32}), ("group64", (48, 256), {"group_size": 64})],
    ),
    "bnb": (
        ["bitsandbytes", "torch"],
        [
            ("nf4", (32, 128), {}),
            ("nf4_nested", (48, 640), {"nested": True}),
            ("nf4_bfloat16", (32, 192), {"dtype": "bfloat16", "nested": True}),
            ("fp4", (32, 128), {"kind": "fp4"}),
            ("fp4_block128", (32, 128), {"kind": "fp4", "block": 128, "nested": True}),
            ("int8", (32, 128), {"kind": "int8"}),
        ],
    ),
}


def main(folder: Path, methods: list[str]) -> None:
    for method in methods or CASES:
        packages, cases = CASES[method]
        module = importlib.import_module(method)
        tensors: dict[str, torch.Tensor] = {}
        settings = {}
        for number, (name, shape, chosen) in enumerate(cases):
            generator = torch.Generator().manual_seed(number)
            weight = torch.randn(shape, generator=generator) * 0.05 + 0.02 * torch.randn(
                shape[0], 1, generator=generator
            )
            inputs = torch.randn(512, shape[1], generator=generator) * torch.rand(shape[1], generator=generator) * 2
            parts, expected = module.pack(weight, inputs, chosen)
            tensors |= {f"{name}.{ending}": part.contiguous() for ending, part in parts.items()}
            tensors[f"{name}.expected"] = expected.contiguous()
            settings[name] = module.quantization_config(chosen)
        made_by = {package: version(package) for package in packages}
        save_file(
            tensors, folder / f"{method}.safetensors",
            {"cases": json.dumps(settings), "made_by": json.dumps(made_by)},
        )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
