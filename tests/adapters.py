"""Small random LoRA adapters for tests, in the files that PEFT's save_pretrained writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from mixtral_checkpoints import DTYPES
from safetensors.numpy import load_file, save_file

MODULES = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")


def write_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int,
    rank: int = 4,
    modules: tuple[str, ...] = MODULES,
    dtype: str = "float32",
    ranks: dict[str, int] | None = None,
    **settings: Any,
) -> Path:
    """An adapter of every layer's `modules` of the checkpoint `base`; `ranks` has other ranks of single modules, by
    their names. Returns `folder`."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith(modules):
            continue
        own = next((value for word, value in (ranks or {}).items() if module.endswith(word)), rank)
        rows, columns = weight.shape
        for letter, shape in (("A", (own, columns)), ("B", (rows, own))):
            values = rng.standard_normal(shape) / np.sqrt(shape[1])
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = values.astype(DTYPES[dtype])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    words = {module.split(".")[-1] for module in modules}
    values = {
        "base_model_name_or_path": str(base), "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": 6, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA",
        "r": rank, "rank_pattern": ranks or {}, "alpha_pattern": {}, "target_modules": sorted(words),
        "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values | settings))
    return folder
