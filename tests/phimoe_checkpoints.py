"""Small random phimoe checkpoints for tests, in both spellings, and a trained Mixtral's weights in a phimoe.

Made with numpy and the safetensors library, none of it with moeship.

    write_phimoe_checkpoint(tmp_path / "mixture", seed=2, spelling="packed", num_experts=5)
"""

from __future__ import annotations

import json
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

BIASES = {"attention_bias": True, "lm_head_bias": True}


def write_phimoe_checkpoint(
    folder: Path, *, seed: int, spelling: str = "published", config: dict[str, Any] | None = None, **sizes: Any
) -> Path:
    """config.json with `config` laid over it, model.safetensors and a tokenizer; returns `folder`. The files have the
    biases that the config names. The width's default is a multiple of the head size's, as the class takes it."""
    facts = MixtralSizes(**{"hidden_size": 96, "head_dim": None, "experts_per_token": 2, **sizes})
    values = phimoe_config(published_config(facts)) | (config or {})
    rng = np.random.default_rng(seed)
    tensors = with_biases(random_tensors(facts, rng), rng, values)
    write_llama_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    stored = {name: values.astype(DTYPES[facts.dtype]) for name, values in tensors.items()}
    save_file(spelled(stored, spelling), folder / "model.safetensors")
    return folder


def with_biases(tensors: dict[str, Array], rng: np.random.Generator, config: dict[str, Any]) -> dict[str, Array]:
    """A Mixtral's tensors with random biases of norms, and of attention and head where the config has them."""
    found = dict(tensors)
    for name, values in tensors.items():
        attention = config["attention_bias"] and ".self_attn." in name
        if "norm." in name or attention:
            found[name.replace(".weight", ".bias")] = 0.2 * rng.standard_normal(len(values))
    if config["lm_head_bias"]:
        found["lm_head.bias"] = 0.2 * rng.standard_normal(len(tensors["model.embed_tokens.weight"]))
    return {name: values.astype(np.float32) for name, values in found.items()}


def spelled(tensors: dict[str, Array], spelling: str) -> dict[str, Array]:
    """A Mixtral's tensors in phimoe's names of a spelling."""
    if spelling != "packed":
        return tensors
    return {name.replace(".mlp.gate.", ".mlp.router."): values for name, values in packed(tensors).items()}


def phimoe_config(config: dict[str, Any]) -> dict[str, Any]:
    """A Mixtral's config.json in phimoe's words."""
    told = {key: value for key, value in config.items() if key != "head_dim"}
    return told | {
        "model_type": "phimoe", "architectures": ["PhimoeForCausalLM"], "num_experts_per_tok": 2,
        "router_jitter_noise": 0.3, "input_jitter_noise": 0.01, **BIASES,
    }  # fmt: skip


def longrope(half: int, *, original: int) -> dict[str, Any]:
    """A scaling as the published model has it, for heads of 2 * `half` dimensions."""
    return {
        "type": "longrope", "short_factor": [1 + 0.1 * place for place in range(half)],
        "long_factor": [2 + 0.3 * place for place in range(half)], "short_mscale": 1.24, "long_mscale": 1.24,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def tell_mixtral_as_phimoe(source: Path, folder: Path) -> Path:
    """A trained Mixtral's weights in a phimoe, with small biases. LayerNorms subtract the mean. The Mixtral's residual
    has a small one, so the model still predicts its text."""
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    folder.mkdir(parents=True)
    for file in source.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    told = with_biases(tensors, np.random.default_rng(1), BIASES)
    told |= {name: 0.02 * values for name, values in told.items() if name.endswith(".bias")}
    save_file(told, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(phimoe_config(config), indent=2))
    return folder
