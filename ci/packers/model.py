"""Packs the linears of a whole model, and writes the model as the packer dequantises it (ci/packers/README.md).

    python ci/packers/model.py METHOD CHECKPOINT OUTPUT [SETTINGS as JSON]

OUTPUT is the packed checkpoint, OUTPUT-as-floats the same model in float32. Embedding, head, router and norms stay as
they are. The inputs that a quantiser looks at are random.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LINEARS = (".Wqkv", ".out_proj", ".fc1", ".fc2", "_proj", ".dense", ".w1", ".w2", ".w3")


def main(method: str, source: Path, output: Path, settings: dict[str, object]) -> None:
    module = importlib.import_module(method.replace("-", "_"))
    packed: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for name, tensor in load_file(source / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if not (stem.endswith(LINEARS) and tensor.ndim == 2 and name.endswith(".weight")):
            packed[name], floats[name] = tensor, tensor.float()
            continue
        sizes = torch.rand(tensor.shape[1], generator=generator)
        inputs = torch.randn(512, tensor.shape[1], generator=generator) * sizes
        parts, expected = module.pack(tensor.float(), inputs, settings)
        packed |= {f"{stem}.{ending}": part.contiguous() for ending, part in parts.items()}
        floats[name] = expected.float().contiguous()
    config = json.loads((source / "config.json").read_text())
    for folder, tensors, more in (
        (output, packed, {"quantization_config": module.quantization_config(settings)}),
        (output.with_name(f"{output.name}-as-floats"), floats, {}),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, folder)
        (folder / "config.json").write_text(json.dumps({**config, **more}, indent=2, default=str) + "\n")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4] if len(sys.argv) > 4 else "{}"))
