"""Small random qwen3_moe and qwen2_moe checkpoints for tests, in both spellings.

Made with numpy and the safetensors library, none of it with moeship.

    write_qwen_checkpoint(tmp_path / "mixture", "qwen3_moe", seed=2, config={"mlp_only_layers": [0]}, num_experts=5)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import normal
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

DENSE_SIZE, SHARED_SIZE = 104, 88  # F of a dense layer's MLP and of a shared expert, unless a config says otherwise
_CLASSES = {"qwen3_moe": "Qwen3MoeForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}
_MIXTURE_KEYS = (
    "moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step",
    "mlp_only_layers", "shared_expert_intermediate_size", "router_aux_loss_coef", "output_router_logits",
)  # fmt: skip
_MATRICES = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj.", ".block_sparse_moe.": ".mlp."}


def write_qwen_checkpoint(
    folder: Path,
    family: str,
    *,
    seed: int,
    spelling: str = "published",
    config: dict[str, Any] | None = None,
    **sizes: Any,
) -> Path:
    """config.json with `config` laid over it, model.safetensors and a tokenizer; returns `folder`. qwen2_moe's class
    takes the head size from the width alone."""
    own = {"hidden_size": 96, "head_dim": None} if family == "qwen2_moe" else {"ffn_size": 40}
    facts = MixtralSizes(**{**own, **sizes})
    rng = np.random.default_rng(seed)
    values = qwen_config(published_config(facts), family) | (config or {})
    tensors = random_tensors(facts, rng)
    stored = packed(tensors) if spelling == "packed" else published(tensors)
    for layer in range(facts.num_layers):
        stored |= _more(family, f"model.layers.{layer}", stored, values, rng)
        if has_mlp(values, layer):
            stored = {name: one for name, one in stored.items() if not name.startswith(f"model.layers.{layer}.mlp.")}
            stored |= mlp(f"model.layers.{layer}.mlp", facts.hidden_size, values["intermediate_size"], rng)
    write_llama_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    save_file({name: one.astype(DTYPES[facts.dtype]) for name, one in stored.items()}, folder / "model.safetensors")
    return folder


def _more(
    family: str, layer: str, tensors: dict[str, Array], config: dict[str, Any], rng: np.random.Generator
) -> dict[str, Array]:
    """What a layer has beside a Mixtral's tensors."""
    attention = f"{layer}.self_attn"
    if family == "qwen3_moe":
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return {
            f"{attention}.{of}_norm.weight": (1 + 0.3 * rng.standard_normal(size)).astype(np.float32) for of in "qk"
        }
    widths = {of: len(tensors[f"{attention}.{of}_proj.weight"]) for of in "qkv"}
    biases = {f"{attention}.{of}_proj.bias": normal(rng, 1, width)[0] for of, width in widths.items()}
    hidden = config["hidden_size"]
    shared = mlp(f"{layer}.mlp.shared_expert", hidden, config["shared_expert_intermediate_size"], rng)
    return {**biases, **shared, f"{layer}.mlp.shared_expert_gate.weight": normal(rng, 1, hidden) / np.sqrt(hidden)}


def mlp(name: str, hidden: int, width: int, rng: np.random.Generator) -> dict[str, Array]:
    """The matrices of an MLP."""
    return {
        f"{name}.gate_proj.weight": normal(rng, width, hidden) / np.float32(np.sqrt(hidden)),
        f"{name}.up_proj.weight": normal(rng, width, hidden) / np.float32(np.sqrt(hidden)),
        f"{name}.down_proj.weight": normal(rng, hidden, width) / np.float32(np.sqrt(width)),
    }


def has_mlp(config: dict[str, Any], layer: int) -> bool:
    """Whether a layer has an MLP in place of experts."""
    listed = config.get("mlp_only_layers") or []
    return layer in listed or (layer + 1) % config.get("decoder_sparse_step", 1) != 0


def qwen_config(config: dict[str, Any], family: str) -> dict[str, Any]:
    """A Mixtral's config.json in the words that were published with Qwen3-30B-A3B and Qwen1.5-MoE-A2.7B."""
    no_keys = ("router_jitter_noise", "num_local_experts", *([] if config.get("head_dim") else ["head_dim"]))
    told = {key: value for key, value in config.items() if key not in no_keys}
    told |= {"model_type": family, "architectures": [_CLASSES[family]], "num_experts": config["num_local_experts"]}
    told |= {"moe_intermediate_size": config["intermediate_size"], "intermediate_size": DENSE_SIZE}
    told |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "rms_norm_eps": 1e-6, "rope_scaling": None}
    told |= {"use_sliding_window": False, "max_window_layers": config["num_hidden_layers"]}
    if family == "qwen3_moe":
        return told | {"attention_bias": False, "norm_topk_prob": True}
    shared = {"shared_expert_intermediate_size": SHARED_SIZE, "sliding_window": 32768}
    return told | {"norm_topk_prob": False, **shared}


def tell_mixtral_as_qwen3(source: Path, folder: Path, **more: Any) -> Path:
    """A trained Mixtral's weights in a qwen3_moe; `more` are further keys. The norms of queries and keys have the
    factors that give them about the size that they have in the Mixtral, so the model still predicts its text."""
    from olmoe_checkpoints import sizes_of

    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    head_size = config["head_dim"] if config.get("head_dim") else config["hidden_size"] // config["num_attention_heads"]
    for name, values in sizes_of(source).items():
        tensors[name.replace("_proj", "_norm") + ".weight"] = values[:head_size]
    folder.mkdir(parents=True)
    for file in source.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(published(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(qwen_config(config, "qwen3_moe") | more, indent=2))
    return folder


def split_into_experts(mixture: Path, folder: Path) -> list[Path]:
    """The experts of a qwen3_moe or a qwen2_moe in the published spelling, each as a dense Qwen folder/e0, e1 ..."""
    config, tensors = json.loads((mixture / "config.json").read_text()), load_file(mixture / "model.safetensors")
    family = config["model_type"].removesuffix("_moe")
    told = {key: value for key, value in config.items() if key not in _MIXTURE_KEYS}
    told |= {"model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"]}
    told |= {"intermediate_size": config["moe_intermediate_size"]}
    if not config.get("head_dim"):
        told["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    made = []
    for expert in range(config["num_experts"]):
        one = folder / f"e{expert}"
        one.mkdir(parents=True)
        for file in mixture.glob("*token*"):
            (one / file.name).write_bytes(file.read_bytes())
        own = f".mlp.experts.{expert}."
        stored = {name.replace(own, ".mlp."): values for name, values in tensors.items()
                  if own in name or ".mlp." not in name}  # fmt: skip
        save_file(stored, one / "model.safetensors")
        (one / "config.json").write_text(json.dumps(told, indent=2))
        made.append(one)
    return made


def published(tensors: dict[str, Array]) -> dict[str, Array]:
    """A Mixtral's tensors under the names of Qwen's files."""
    renamed = {}
    for name, values in tensors.items():
        for old, new in _MATRICES.items():
            name = name.replace(old, new)
        renamed[name] = values
    return renamed


def tell_mixtral_as_qwen2(source: Path, folder: Path, **more: Any) -> Path:
    """A trained Mixtral's weights in a qwen2_moe with normalised weights of experts; `more` are further keys. Each
    layer's first expert is its shared expert too, with small shares, and biases are small, so the model still predicts
    its text."""
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    stored, rng, hidden = published(tensors), np.random.default_rng(5), config["hidden_size"]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}.mlp"
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            own = stored[f"{name}.experts.0.{matrix}.weight"]
            stored[f"{name}.shared_expert.{matrix}.weight"] = own * 0.2 if matrix == "down_proj" else own.copy()
        stored[f"{name}.shared_expert_gate.weight"] = normal(rng, 1, hidden) / np.float32(np.sqrt(hidden))
        for of in "qkv":
            attention = f"model.layers.{layer}.self_attn.{of}_proj"
            stored[f"{attention}.bias"] = 0.1 * normal(rng, 1, len(stored[f"{attention}.weight"]))[0]
    folder.mkdir(parents=True)
    for file in source.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(stored, folder / "model.safetensors")
    told = qwen_config(config, "qwen2_moe") | {"norm_topk_prob": True}
    told |= {"shared_expert_intermediate_size": config["intermediate_size"], **more}
    (folder / "config.json").write_text(json.dumps(told, indent=2))
    return folder
