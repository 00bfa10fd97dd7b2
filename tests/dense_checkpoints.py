"""Small random dense Mistral, Llama, Qwen2 and Qwen3 checkpoints for tests. Made with numpy and the safetensors
library, none of it with moeship or transformers.

    write_dense_checkpoint(tmp_path / "expert", seed=2, family="mistral", hidden_size=96)
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
    published_config,
    random_tensors,
    write_llama_tokenizer,
)
from safetensors.numpy import save_file

_MIXTURE_KEYS = ("num_experts_per_tok", "num_local_experts", "output_router_logits", "router_aux_loss_coef")
_MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_ARCHITECTURES = {
    "mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip


def write_dense_checkpoint(
    folder: Path, *, seed: int, family: str = "mistral", config: dict[str, Any] | None = None, **sizes: Any
) -> Path:
    """config.json with `config` laid over it, model.safetensors and the tokenizer; returns `folder`. A Qwen2 takes its
    head size from the width alone."""
    own = {"hidden_size": 96, "head_dim": None} if family == "qwen2" else {}
    facts = MixtralSizes(num_experts=1, experts_per_token=1, **{**own, **sizes})
    rng = np.random.default_rng(seed)
    write_llama_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(dense_config(facts, family) | (config or {}), indent=2))
    tensors = dense_tensors(random_tensors(facts, rng))
    tensors |= _qwens_own(family, facts, rng)
    save_file(
        {name: values.astype(DTYPES[facts.dtype]) for name, values in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def dense_config(sizes: MixtralSizes, family: str) -> dict[str, Any]:
    """config.json with the keys that were published with Mistral-7B or Llama 3."""
    config = {key: value for key, value in published_config(sizes).items() if key not in _MIXTURE_KEYS}
    config |= {"model_type": family, "architectures": [_ARCHITECTURES[family]], "rope_theta": 10000.0}
    if family == "llama":
        del config["sliding_window"]
        config |= {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    if family in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": sizes.num_layers}
        config |= {"rms_norm_eps": 1e-6, **({"attention_bias": False} if family == "qwen3" else {})}
    if config["head_dim"] is None:
        del config["head_dim"]
    return config


def _qwens_own(family: str, facts: MixtralSizes, rng: np.random.Generator) -> dict[str, Array]:
    """What a Qwen has beside a Llama's tensors: biases of queries, keys and values, or norms of each head."""
    size = facts.head_dim or facts.hidden_size // facts.num_heads
    widths = {"q": facts.num_heads * size, "k": facts.num_kv_heads * size, "v": facts.num_kv_heads * size}
    found: dict[str, Array] = {}
    for layer in range(facts.num_layers):
        name = f"model.layers.{layer}.self_attn"
        if family == "qwen2":
            found |= {f"{name}.{of}_proj.bias": normal(rng, 1, width)[0] for of, width in widths.items()}
        elif family == "qwen3":
            found |= {f"{name}.{of}_norm.weight": 1 + 0.3 * normal(rng, 1, size)[0] for of in "qk"}
    return found


def dense_tensors(tensors: dict[str, Array]) -> dict[str, Array]:
    """The tensors of a Mixtral of one expert, in the published spelling, as those of a dense model."""
    renamed = {}
    for name, values in tensors.items():
        layer, _, rest = name.partition(".block_sparse_moe.")
        if rest != "gate.weight":
            renamed[f"{layer}.mlp.{_MATRICES[rest.split('.')[2]]}.weight" if rest else name] = values
    return renamed
