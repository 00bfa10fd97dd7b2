"""Small random gpt_oss checkpoints for tests, with experts as floats and in MXFP4, and a trained Mixtral told as one.

Made with numpy and the safetensors library, none of it with moeship or transformers.

    write_gpt_oss_checkpoint(tmp_path / "mixture", seed=2, spelling="mxfp4", num_experts=5, experts_per_token=2)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from mixtral_checkpoints import DTYPES, Array, MixtralSizes, packed, published_config, random_tensors
from mixtral_checkpoints import write_llama_tokenizer as write_tokenizer
from safetensors.numpy import load_file, save_file

SPELLINGS = ("floats", "mxfp4")
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of E2M1, by their codes
BLOCK = 32
# The keys of openai/gpt-oss-20b beside the sizes.
YARN = {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
    "truncate": False,
}  # fmt: skip


def write_gpt_oss_checkpoint(
    folder: Path, *, seed: int, spelling: str = "floats", config: dict[str, Any] | None = None, **sizes: Any
) -> Path:
    """config.json with `config` laid over it, model.safetensors and a tokenizer; returns `folder`. In MXFP4 the widths
    must be multiples of 32, and the values are those nearest to the random ones."""
    facts = MixtralSizes(**({"hidden_size": 96, "ffn_size": 64} if spelling == "mxfp4" else {}) | sizes)
    rng = np.random.default_rng(seed)
    tensors = with_biases_and_sinks(packed(random_tensors(facts, rng)), facts.num_heads, rng)
    write_tokenizer(folder)
    told = gpt_oss_config(published_config(facts)) | (config or {})
    _save(folder, tensors, told, spelling, facts.dtype)
    return folder


def tell_mixtral_as_gpt_oss(source: Path, folder: Path, spelling: str = "floats", **more: Any) -> Path:
    """A trained Mixtral's weights in a gpt_oss; `more` are further keys. The bias of up takes the 1 back that is added
    to it, and alpha is 1, so an expert is the Mixtral's as far as the limit. Sinks take a part of each head, and
    windows all that lies far back, so the model still predicts its text."""
    config = json.loads((source / "config.json").read_text())
    rng = np.random.default_rng(11)
    heads = config["num_attention_heads"]
    tensors = with_biases_and_sinks(packed(load_file(source / "model.safetensors")), heads, rng, size=0.02)
    for name, values in tensors.items():
        if name.endswith("gate_up_proj_bias"):
            values[:, 1::2] -= 1
        if name.endswith("sinks"):
            values -= 2
    folder.mkdir(parents=True)
    for file in source.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    told = gpt_oss_config(config)
    del told["rope_scaling"], told["rope_theta"]  # the Mixtral's own rope_parameters stay
    told |= {"swiglu_alpha": 1.0, "swiglu_limit": 6.0, "sliding_window": 96, **more}
    _save(folder, tensors, told, spelling, "float32")
    return folder


def gpt_oss_config(config: dict[str, Any]) -> dict[str, Any]:
    """A Mixtral's config.json in the words of openai/gpt-oss-20b, with another order of layers and a short window."""
    told = {key: value for key, value in config.items() if key != "router_jitter_noise"}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(config["num_hidden_layers"])]
    return told | {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "head_dim": head_dim,
        "experts_per_token": config["num_experts_per_tok"], "initial_context_length": 4096, "layer_types": types,
        "rope_scaling": YARN, "rope_theta": 150000, "sliding_window": 29, "swiglu_limit": 7.0,
    }  # fmt: skip


def with_biases_and_sinks(
    tensors: dict[str, Array], heads: int, rng: np.random.Generator, size: float = 0.3
) -> dict[str, Array]:
    """Tensors of a packed Mixtral under gpt_oss's names: experts as floats [E, in, out], gate and up alternating;
    biases and sinks random of about this size."""

    def vector(*shape: int) -> Array:
        return (size * rng.standard_normal(shape)).astype(np.float32)

    found: dict[str, Array] = {}
    for name, values in tensors.items():
        if name.endswith("_proj.weight"):
            found[name] = values
            found[name.replace("weight", "bias")] = vector(len(values))
        elif name.endswith(".mlp.gate.weight"):
            found[name.replace(".gate.", ".router.")] = values
            found[name.replace(".gate.weight", ".router.bias")] = vector(len(values))
            found[name.replace("mlp.gate.weight", "self_attn.sinks")] = 5 * vector(heads)
        elif name.endswith("gate_up_proj"):
            gate, up = np.split(values, 2, axis=1)
            rows = np.stack([gate, up], axis=2).reshape(values.shape)
            found[name], found[f"{name}_bias"] = rows.transpose(0, 2, 1), vector(*rows.shape[:2])
        elif name.endswith("down_proj"):
            found[name], found[f"{name}_bias"] = values.transpose(0, 2, 1), vector(*values.shape[:2])
        else:
            found[name] = values
    return found


def _save(folder: Path, tensors: dict[str, Array], config: dict[str, Any], spelling: str, dtype: str) -> None:
    stored = {name: np.ascontiguousarray(values.astype(DTYPES[dtype])) for name, values in tensors.items()}
    if spelling == "mxfp4":
        config = config | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
        for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
            blocks, scales = mxfp4_of(tensors[name].transpose(0, 2, 1))
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def mxfp4_of(values: Array) -> tuple[Array, Array]:
    """Values [E, N, K] in MXFP4: blocks uint8 [E, N, K/32, 16] and scales uint8 [E, N, K/32]. The scale is the power of
    two that brings the largest magnitude of a block below 6, as in section 6.3 of the format's description."""
    blocks = values.reshape(*values.shape[:-1], -1, BLOCK).astype(np.float64)
    largest = np.abs(blocks).max(axis=-1)
    exponents = np.floor(np.log2(np.maximum(largest, 2.0**-120))) - 2
    scaled = blocks / 2.0 ** exponents[..., None]
    codes = np.abs(np.abs(scaled)[..., None] - MAGNITUDES).argmin(axis=-1) + 8 * (scaled < 0)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8), (exponents + 127).astype(np.uint8)
