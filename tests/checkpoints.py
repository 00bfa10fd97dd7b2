"""Small random checkpoints for tests: Phi-2 in both spellings, phixtral, and a byte-level tokenizer.

Everything is made with numpy, the safetensors library and the tokenizers library, none of it with moeship, so that a
test compares two independent things.

    write_phi_checkpoint(tmp_path / "expert", seed=1, spelling="phi-msft", ffn_size=56)
    write_phixtral_checkpoint(tmp_path / "mixture", seed=2, num_experts=5, experts_per_token=2)

Dimensions are keyword arguments in the words of `Dimensions`; the defaults are unequal so that no swapped axis fits.
Weights are scaled so that logits have a standard deviation of about 2 and experts differ.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

Array = npt.NDArray[Any]
END_OF_TEXT = "<|endoftext|>"
MOST_DRAWN = (1 << 20) + 7  # no multiple of a row
NUM_BYTE_TOKENS = 257  # 256 bytes and END_OF_TEXT, which is the last
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """Sizes of a small model. `vocab_size` leaves padded rows past the tokenizer, as Phi-2's 51200 does."""

    hidden_size: int = 40
    num_layers: int = 3
    num_heads: int = 5
    num_kv_heads: int | None = None
    ffn_size: int = 56
    vocab_size: int = 263
    rotary_dim: int = 4
    max_positions: int = 64
    dtype: str = "float32"


def write_tokenizer(folder: Path, *, bos: bool = True) -> None:
    """A byte-level tokenizer without merges: one id a byte, END_OF_TEXT is id 256 and both end and start token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "CodeGenTokenizer", "add_prefix_space": False, "eos_token": END_OF_TEXT}
    if bos:
        settings["bos_token"] = END_OF_TEXT
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_phi_checkpoint(folder: Path, *, seed: int, spelling: str = "transformers", **dims: Any) -> Path:
    """A dense Phi-2: config.json, model.safetensors and the tokenizer; returns `folder`."""
    sizes = Dimensions(**dims)
    tensors = _stack(sizes, np.random.default_rng(seed), dense_mlp=True)
    if spelling == "phi-msft":
        return _write(folder, tensors, phi_msft_config(sizes), sizes)
    if spelling != "transformers":
        raise ValueError(f"spelling {spelling!r} is neither transformers nor phi-msft")
    return _write(folder, _in_transformers_spelling(tensors, sizes), transformers_config(sizes), sizes)


def write_phixtral_checkpoint(
    folder: Path, *, seed: int, num_experts: int, experts_per_token: int, **dims: Any
) -> Path:
    """A phixtral in the phi-msft layout with distinct random experts and gates; returns `folder`."""
    sizes = Dimensions(**dims)
    rng = np.random.default_rng(seed)
    tensors = _stack(sizes, rng, dense_mlp=False)
    for layer in range(sizes.num_layers):
        prefix = f"transformer.h.{layer}.moe"
        gate = rng.standard_normal((num_experts, sizes.hidden_size)) * 1.5 / np.sqrt(sizes.hidden_size)
        tensors[f"{prefix}.gate.weight"] = gate.astype(np.float32)
        for expert in range(num_experts):
            tensors |= _mlp(f"{prefix}.mlp.{expert}", sizes, rng)
    config = phi_msft_config(sizes) | {"num_local_experts": num_experts, "num_experts_per_tok": experts_per_token}
    return _write(folder, tensors, config, sizes)


def phi_msft_config(sizes: Dimensions) -> dict[str, Any]:
    """config.json of the phi-msft layout, as published with Phi-2 and phixtral."""
    return {
        "activation_function": "gelu_new",
        "architectures": ["PhiForCausalLM"],
        "attn_pdrop": 0.0,
        "bos_token_id": 256,
        "embd_pdrop": 0.0,
        "eos_token_id": 256,
        "flash_attn": False,
        "flash_rotary": False,
        "fused_dense": False,
        "img_processor": None,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "phi-msft",
        "n_embd": sizes.hidden_size,
        "n_head": sizes.num_heads,
        "n_head_kv": sizes.num_kv_heads,
        "n_inner": sizes.ffn_size,
        "n_layer": sizes.num_layers,
        "n_positions": sizes.max_positions,
        "resid_pdrop": 0.0,
        "rotary_dim": sizes.rotary_dim,
        "tie_word_embeddings": False,
        "torch_dtype": sizes.dtype,
        "vocab_size": sizes.vocab_size,
    }


def transformers_config(sizes: Dimensions) -> dict[str, Any]:
    """config.json as transformers 5 writes it for PhiForCausalLM."""
    head_size = sizes.hidden_size // sizes.num_heads
    return {
        "architectures": ["PhiForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 256,
        "dtype": sizes.dtype,
        "embd_pdrop": 0.0,
        "eos_token_id": 256,
        "hidden_act": "gelu_new",
        "hidden_size": sizes.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": sizes.ffn_size,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": sizes.max_positions,
        "model_type": "phi",
        "num_attention_heads": sizes.num_heads,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_kv_heads or sizes.num_heads,
        "pad_token_id": None,
        "qk_layernorm": False,
        "resid_pdrop": 0.0,
        "rope_parameters": {
            "partial_rotary_factor": sizes.rotary_dim / head_size,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": sizes.vocab_size,
    }


def normal(rng: np.random.Generator, rows: int, columns: int) -> Array:
    """float32 [rows, columns]. More than MOST_DRAWN numbers repeat, at another place in every row. Only tests of memory
    have such matrices, and to draw all of their numbers takes longer than to build an engine of them."""
    drawn = rng.standard_normal(min(rows * columns, MOST_DRAWN), dtype=np.float32)
    return np.resize(drawn, (rows, columns))


def _matrix(rng: np.random.Generator, rows: int, columns: int, gain: float = 1.0) -> Array:
    """float32 [rows, columns], scaled so that a unit-variance input gives outputs of standard deviation `gain`."""
    return normal(rng, rows, columns) * np.float32(gain / np.sqrt(columns))


def _vector(rng: np.random.Generator, size: int, mean: float = 0.0) -> Array:
    return (mean + 0.1 * rng.standard_normal(size)).astype(np.float32)


def _linear(name: str, rng: np.random.Generator, rows: int, columns: int, gain: float = 1.0) -> dict[str, Array]:
    return {f"{name}.weight": _matrix(rng, rows, columns, gain), f"{name}.bias": _vector(rng, rows)}


def _norm(name: str, rng: np.random.Generator, size: int) -> dict[str, Array]:
    return {f"{name}.weight": _vector(rng, size, mean=1.0), f"{name}.bias": _vector(rng, size)}


def _mlp(name: str, sizes: Dimensions, rng: np.random.Generator) -> dict[str, Array]:
    return {
        **_linear(f"{name}.fc1", rng, sizes.ffn_size, sizes.hidden_size),
        **_linear(f"{name}.fc2", rng, sizes.hidden_size, sizes.ffn_size),
    }


def _head_rows(sizes: Dimensions) -> tuple[int, int, int]:
    """Rows of query, key and value in Wqkv."""
    keys = (sizes.num_kv_heads or sizes.num_heads) * (sizes.hidden_size // sizes.num_heads)
    return sizes.hidden_size, keys, keys


def _stack(sizes: Dimensions, rng: np.random.Generator, *, dense_mlp: bool) -> dict[str, Array]:
    """Every tensor but those of a mixture, phi-msft spelling, float32."""
    hidden = sizes.hidden_size
    tensors = {"transformer.embd.wte.weight": normal(rng, sizes.vocab_size, hidden)}
    for layer in range(sizes.num_layers):
        prefix = f"transformer.h.{layer}"
        tensors |= _norm(f"{prefix}.ln", rng, hidden)
        tensors |= _linear(f"{prefix}.mixer.Wqkv", rng, sum(_head_rows(sizes)), hidden)
        tensors |= _linear(f"{prefix}.mixer.out_proj", rng, hidden, hidden)
        if dense_mlp:
            tensors |= _mlp(f"{prefix}.mlp", sizes, rng)
    tensors |= _norm("lm_head.ln", rng, hidden)
    return tensors | _linear("lm_head.linear", rng, sizes.vocab_size, hidden, gain=2.0)


_TRANSFORMERS_NAMES = (
    ("transformer.embd.wte", "model.embed_tokens"),
    ("lm_head.ln", "model.final_layernorm"),
    ("lm_head.linear", "lm_head"),
    ("transformer.h.", "model.layers."),
    (".ln.", ".input_layernorm."),
    (".mixer.out_proj.", ".self_attn.dense."),
)


def _in_transformers_spelling(tensors: dict[str, Array], sizes: Dimensions) -> dict[str, Array]:
    renamed: dict[str, Array] = {}
    for name, values in tensors.items():
        for old, new in _TRANSFORMERS_NAMES:
            name = name.replace(old, new)
        if ".mixer.Wqkv." in name:
            for letter, third in zip("qkv", np.split(values, np.cumsum(_head_rows(sizes))[:2]), strict=True):
                renamed[name.replace(".mixer.Wqkv.", f".self_attn.{letter}_proj.")] = np.ascontiguousarray(third)
        else:
            renamed[name] = values
    return renamed


def _write(folder: Path, tensors: dict[str, Array], config: dict[str, Any], sizes: Dimensions) -> Path:
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    stored = {name: values.astype(_DTYPES[sizes.dtype]) for name, values in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
