"""Small granitemoe checkpoints for tests, in both spellings: random ones, and any Mixtral told as a granitemoe.

Made with numpy and the safetensors library, none of it with moeship or transformers.

    write_granitemoe_checkpoint(tmp_path / "mixture", seed=2, spelling="packed", num_experts=5, experts_per_token=2)
    tell_mixtral_as_granitemoe(mixtral_folder, tmp_path / "same")
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from mixtral_checkpoints import (
    DTYPES,
    Array,
    MixtralSizes,
    packed,
    published_config,
    random_tensors,
    write_llama_tokenizer,
)
from safetensors.numpy import load_file, save_file

# Those of ibm-granite/granite-3.0-1b-a400m-base.
SCALARS = {
    "embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22, "logits_scaling": 6.0,
}  # fmt: skip
_NAMES = {
    "published": (
        (".mlp.gate.weight", ".block_sparse_moe.router.layer.weight"),
        (".mlp.experts.gate_up_proj", ".block_sparse_moe.input_linear.weight"),
        (".mlp.experts.down_proj", ".block_sparse_moe.output_linear.weight"),
    ),
    "packed": (
        (".mlp.gate.weight", ".block_sparse_moe.router.weight"),
        (".mlp.experts.", ".block_sparse_moe.experts."),
    ),
}


def write_granitemoe_checkpoint(
    folder: Path, *, seed: int, spelling: str = "published", config: dict[str, Any] | None = None, **sizes: Any
) -> Path:
    """config.json with `config` laid over it, model.safetensors and the tokenizer; returns `folder`."""
    facts = MixtralSizes(**sizes)
    tensors = packed(random_tensors(facts, np.random.default_rng(seed)))
    write_llama_tokenizer(folder)
    values = _told(published_config(facts)) | SCALARS | (config or {})
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    stored = {name: values.astype(DTYPES[facts.dtype]) for name, values in tensors.items()}
    save_file(_spelled(stored, spelling), folder / "model.safetensors")
    return folder


def tell_mixtral_as_granitemoe(source: Path, folder: Path) -> Path:
    """The same model: what the four scalars do is taken back in the weights, all of it by powers of two."""
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text())
    scalars = {
        "embedding_multiplier": 8.0, "attention_multiplier": 0.125, "residual_multiplier": 0.25, "logits_scaling": 4.0,
    }  # fmt: skip
    # 1/sqrt(D) is no power of two for every D; q takes what is left, in float32.
    queries = (config["num_attention_heads"] / config["hidden_size"]) ** 0.5 / scalars["attention_multiplier"]
    factors = {
        "embed_tokens": 1 / scalars["embedding_multiplier"], "q_proj": queries, "lm_head": scalars["logits_scaling"],
        "o_proj": 1 / scalars["residual_multiplier"], "down_proj": 1 / scalars["residual_multiplier"],
    }  # fmt: skip
    tensors = load_file(source / "model.safetensors")
    for name, values in (packed(tensors) if any(".w1." in name for name in tensors) else tensors).items():
        factor = next((factor for module, factor in factors.items() if module in name), 1.0)
        tensors[name] = values.astype(np.float32) * np.float32(factor)
    tensors = {name: values for name, values in tensors.items() if ".block_sparse_moe." not in name}
    save_file(_spelled(tensors, "published"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_told(config) | scalars | {"dtype": "float32"}, indent=2))
    return folder


def _told(config: dict[str, Any]) -> dict[str, Any]:
    """A Mixtral's config.json in granitemoe's words."""
    no_keys = ("head_dim", "sliding_window", "router_jitter_noise")
    told = {key: value for key, value in config.items() if key not in no_keys or (key == "head_dim" and value)}
    return told | {"model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"], "attention_bias": False}


def _spelled(tensors: dict[str, Array], spelling: str) -> dict[str, Array]:
    renamed = {}
    for name, values in tensors.items():
        for old, new in _NAMES[spelling]:
            name = name.replace(old, new)
        renamed[name] = values
    return renamed
