"""Small flex_olmo checkpoints for tests, in both spellings: random ones, and the weights of a trained Mixtral.

Made with numpy, the safetensors library and transformers' Mixtral, none of it with moeship.

    write_flex_olmo_checkpoint(tmp_path / "mixture", seed=2, spelling="packed", num_experts=5, experts_per_token=2)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from mixtral_checkpoints import (
    DTYPES,
    MixtralSizes,
    packed,
    published_config,
    random_tensors,
    write_llama_tokenizer,
)
from olmoe_checkpoints import olmoe_config, published
from safetensors.numpy import load_file, save_file


def write_flex_olmo_checkpoint(
    folder: Path, *, seed: int, spelling: str = "published", config: dict[str, Any] | None = None, **sizes: Any
) -> Path:
    """config.json with `config` laid over it, model.safetensors and a tokenizer; returns `folder`. The norms have
    factors that are far from 1, and from each other."""
    facts = MixtralSizes(**{"hidden_size": 96, "head_dim": None, **sizes})
    rng = np.random.default_rng(seed)
    tensors = random_tensors(facts, rng)
    for layer in range(facts.num_layers):
        name = f"model.layers.{layer}"
        for module in ("post_attention_layernorm", "post_feedforward_layernorm"):
            values = (0.7 + 0.2 * rng.standard_normal(facts.hidden_size)).astype(np.float32)
            tensors[f"{name}.{module}.weight"] = values
        del tensors[f"{name}.input_layernorm.weight"]
        for letter in "qk":
            width = len(tensors[f"{name}.self_attn.{letter}_proj.weight"])
            values = (1 + 0.3 * rng.standard_normal(width)).astype(np.float32)
            tensors[f"{name}.self_attn.{letter}_norm.weight"] = values
    write_llama_tokenizer(folder)
    head_dim = {} if facts.head_dim is None else {"head_dim": facts.head_dim}
    values = flex_olmo_config(published_config(facts)) | head_dim | (config or {})
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    stored = {name: values.astype(DTYPES[facts.dtype]) for name, values in tensors.items()}
    save_file(packed(stored) if spelling == "packed" else published(stored), folder / "model.safetensors")
    return folder


def tell_mixtral_as_flex_olmo(source: Path, folder: Path, **more: Any) -> Path:
    """A trained Mixtral's weights in a flex_olmo with normalised weights of experts; `more` are further keys. Where a
    Mixtral divides an input by its size, the next matrices are divided by the mean size over a text. The norms have
    the factors that give outputs, queries and keys about their size in the Mixtral: so it still predicts its text."""
    config = json.loads((source / "config.json").read_text())
    tensors, sizes = load_file(source / "model.safetensors"), sizes_in_mixtral(source)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        attention, mixture = f"{name}.self_attn", f"{name}.block_sparse_moe"
        for norm, stem, outputs in (
            ("input_layernorm", attention, ("o_proj",)), ("post_attention_layernorm", mixture, (".w2",))
        ):  # fmt: skip
            factors = tensors.pop(f"{name}.{norm}.weight") / sizes[f"{name}.{norm}"]
            for module in [module for module in tensors if module.startswith(f"{stem}.")]:
                if not module.removesuffix(".weight").endswith(outputs):
                    tensors[module] = tensors[module] * factors
        for letter in "qk":
            width = len(tensors[f"{attention}.{letter}_proj.weight"])
            tensors[f"{attention}.{letter}_norm.weight"] = np.full(width, sizes[f"{attention}.{letter}_proj"])
        for norm, module in (("attention", f"{attention}.o_proj"), ("feedforward", f"{name}.mlp")):
            tensors[f"{name}.post_{norm}_layernorm.weight"] = np.full(config["hidden_size"], sizes[module])
    folder.mkdir(parents=True)
    for file in source.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    stored = {name: values.astype(np.float32) for name, values in tensors.items()}
    save_file(published(stored), folder / "model.safetensors")
    told = flex_olmo_config(config) | {"norm_topk_prob": True} | more
    (folder / "config.json").write_text(json.dumps(told, indent=2))
    return folder


def sizes_in_mixtral(source: Path) -> dict[str, float]:
    """Module of a Mixtral -> over a text, the root of the mean square of a layer's norms' inputs, and of the outputs
    of the other modules."""
    import torch
    from tokenizers import Tokenizer
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(source, dtype=torch.float32)
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "o_proj", "layernorm", ".mlp")):

            def keep(_module: object, inputs: Any, output: Any, name: str = name) -> None:
                values = inputs[0] if name.endswith("layernorm") else output
                found[name] = float(values.square().mean().sqrt())

            module.register_forward_hook(keep)
    ids = Tokenizer.from_file(str(source / "tokenizer.json")).encode((source.parent / "train.py").read_text()).ids[:512]
    with torch.no_grad():
        model(torch.tensor([ids]))
    return found


def flex_olmo_config(config: dict[str, Any]) -> dict[str, Any]:
    """A Mixtral's config.json in flex_olmo's words."""
    told = {key: value for key, value in olmoe_config(config).items() if key != "clip_qkv"}
    return told | {"model_type": "flex_olmo", "architectures": ["FlexOlmoForCausalLM"], "pad_token_id": None}
