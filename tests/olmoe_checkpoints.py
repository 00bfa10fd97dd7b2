"""Small random olmoe checkpoints for tests, in both spellings.

Made with numpy and the safetensors library, none of it with moeship.

    write_olmoe_checkpoint(tmp_path / "mixture", seed=2, spelling="packed", num_experts=5, experts_per_token=2)
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

_MATRICES = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj.", ".block_sparse_moe.": ".mlp."}


def write_olmoe_checkpoint(
    folder: Path, *, seed: int, spelling: str = "published", config: dict[str, Any] | None = None, **sizes: Any
) -> Path:
    """config.json with `config` laid over it, model.safetensors and a tokenizer; returns `folder`. The class takes the
    head size from the width alone, so the width's default is a multiple of it."""
    facts = MixtralSizes(**{"hidden_size": 96, "head_dim": None, **sizes})
    rng = np.random.default_rng(seed)
    tensors = random_tensors(facts, rng)
    for layer in range(facts.num_layers):
        for letter in "qk":
            name = f"model.layers.{layer}.self_attn.{letter}_"
            width = len(tensors[f"{name}proj.weight"])
            tensors[f"{name}norm.weight"] = (1 + 0.3 * rng.standard_normal(width)).astype(np.float32)
    write_llama_tokenizer(folder)
    values = olmoe_config(published_config(facts)) | (config or {})
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    stored = {name: values.astype(DTYPES[facts.dtype]) for name, values in tensors.items()}
    save_file(packed(stored) if spelling == "packed" else published(stored), folder / "model.safetensors")
    return folder


def tell_mixtral_as_olmoe(source: Path, folder: Path, **more: Any) -> Path:
    """A trained Mixtral's weights in an olmoe with normalised weights of experts; `more` are further keys. The norms
    of queries and keys have the factors that give them about the size that they have in the Mixtral, so the model
    still predicts its text."""
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    for name, values in sizes_of(source).items():
        tensors[name.replace("_proj", "_norm") + ".weight"] = values
    folder.mkdir(parents=True)
    for file in source.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(published(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(olmoe_config(config) | {"norm_topk_prob": True} | more, indent=2))
    return folder


def sizes_of(source: Path) -> dict[str, Array]:
    """Module of queries or keys of a Mixtral -> the root of the mean square of its outputs over a text, for each of
    them the same, float32 [rows]."""
    import torch
    from tokenizers import Tokenizer
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(source, dtype=torch.float32)
    found: dict[str, Array] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj")):

            def keep(_module: object, _inputs: object, output: torch.Tensor, name: str = name) -> None:
                size = float(output.square().mean().sqrt())
                found[name] = np.full(output.shape[-1], size, np.float32)

            module.register_forward_hook(keep)
    ids = Tokenizer.from_file(str(source / "tokenizer.json")).encode((source.parent / "train.py").read_text()).ids[:512]
    with torch.no_grad():
        model(torch.tensor([ids]))
    return found


def olmoe_config(config: dict[str, Any]) -> dict[str, Any]:
    """A Mixtral's config.json in olmoe's words."""
    no_keys = ("head_dim", "sliding_window", "router_jitter_noise", "num_local_experts")
    told = {key: value for key, value in config.items() if key not in no_keys}
    told |= {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "num_experts": config["num_local_experts"]}
    return told | {"attention_bias": False, "clip_qkv": None, "norm_topk_prob": False}


def published(tensors: dict[str, Array]) -> dict[str, Array]:
    """Tensors of a Mixtral under the names of olmoe's files."""
    renamed = {}
    for name, values in tensors.items():
        for old, new in _MATRICES.items():
            name = name.replace(old, new)
        renamed[name] = values
    return renamed
