"""Small random Mixtral checkpoints for tests, in both spellings, and a tokenizer of Llama's kind.

Made with numpy, the safetensors library and the tokenizers library, none of it with moeship or transformers, so that
a test compares independent things.

    write_mixtral_checkpoint(tmp_path / "mixture", seed=2, spelling="packed", num_experts=5, experts_per_token=2)

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
from checkpoints import normal
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

Array = npt.NDArray[Any]
SPELLINGS = ("published", "packed")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_CORPUS = [
    "the quick brown fox jumps over the lazy dog and the dog looks at the fox",
    "def main() -> None: return the value of the first word in the list of words",
    "naïve café, über die Brücke",
] * 4


@dataclass(frozen=True, kw_only=True)
class MixtralSizes:
    """Sizes of a small Mixtral; the defaults are unequal so that no swapped axis fits. `config` are further keys."""

    hidden_size: int = 80
    num_layers: int = 2
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int | None = 16
    ffn_size: int = 56
    vocab_size: int = 371
    num_experts: int = 5
    experts_per_token: int = 2
    max_positions: int = 640
    dtype: str = "float32"
    tied: bool = False


def write_llama_tokenizer(folder: Path) -> Tokenizer:
    """A BPE of pieces with marked spaces, bytes as tokens of their own, and a start token before every prompt."""
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=365, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    settings = json.loads(tokenizer.to_str())
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def write_mixtral_checkpoint(
    folder: Path, *, seed: int, spelling: str = "published", config: dict[str, Any] | None = None, **sizes: Any
) -> Path:
    """config.json with `config` laid over it, model.safetensors and the tokenizer; returns `folder`."""
    facts = MixtralSizes(**sizes)
    tensors = random_tensors(facts, np.random.default_rng(seed))
    write_llama_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(published_config(facts) | (config or {}), indent=2))
    stored = {name: values.astype(DTYPES[facts.dtype]) for name, values in tensors.items()}
    save_file(packed(stored) if spelling == "packed" else stored, folder / "model.safetensors")
    return folder


def published_config(sizes: MixtralSizes) -> dict[str, Any]:
    """config.json with the keys that were published with Mixtral-8x7B."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": sizes.ffn_size,
        "max_position_embeddings": sizes.max_positions,
        "model_type": "mixtral",
        "num_attention_heads": sizes.num_heads,
        "num_experts_per_tok": sizes.experts_per_token,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_kv_heads,
        "num_local_experts": sizes.num_experts,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": sizes.tied,
        "torch_dtype": sizes.dtype,
        "transformers_version": "4.36.0.dev0",
        "use_cache": True,
        "vocab_size": sizes.vocab_size,
    }


def packed(tensors: dict[str, Array]) -> dict[str, Array]:
    """Tensors of the published spelling as transformers 5 packs them."""
    result: dict[str, Array] = {}
    experts: dict[str, dict[tuple[int, str], Array]] = {}
    for name, values in tensors.items():
        layer, _, rest = name.partition(".block_sparse_moe.")
        if not rest:
            result[name] = values
        elif rest == "gate.weight":
            result[f"{layer}.mlp.gate.weight"] = values
        else:
            _, expert, matrix, _ = rest.split(".")
            experts.setdefault(layer, {})[int(expert), matrix] = values
    for layer, found in experts.items():
        numbers = sorted({expert for expert, _ in found})
        gate_up = [np.concatenate([found[e, "w1"], found[e, "w3"]]) for e in numbers]
        result[f"{layer}.mlp.experts.gate_up_proj"] = np.stack(gate_up)
        result[f"{layer}.mlp.experts.down_proj"] = np.stack([found[e, "w2"] for e in numbers])
    return result


def random_tensors(sizes: MixtralSizes, rng: np.random.Generator) -> dict[str, Array]:
    """Every tensor in the published spelling, float32."""

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Array:
        return normal(rng, rows, columns) * np.float32(gain / np.sqrt(columns))

    def norm() -> Array:
        return (1 + 0.1 * rng.standard_normal(hidden)).astype(np.float32)

    hidden, width = sizes.hidden_size, sizes.ffn_size
    head_size = sizes.head_dim or hidden // sizes.num_heads
    queries, keys = sizes.num_heads * head_size, sizes.num_kv_heads * head_size
    tensors = {"model.embed_tokens.weight": matrix(sizes.vocab_size, hidden, np.sqrt(hidden))}
    for layer in range(sizes.num_layers):
        name = f"model.layers.{layer}"
        tensors[f"{name}.input_layernorm.weight"] = norm()
        for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
            tensors[f"{name}.self_attn.{letter}_proj.weight"] = matrix(rows, hidden)
        tensors[f"{name}.self_attn.o_proj.weight"] = matrix(hidden, queries)
        tensors[f"{name}.post_attention_layernorm.weight"] = norm()
        tensors[f"{name}.block_sparse_moe.gate.weight"] = matrix(sizes.num_experts, hidden, 1.5)
        for expert in range(sizes.num_experts):
            stem = f"{name}.block_sparse_moe.experts.{expert}"
            tensors[f"{stem}.w1.weight"] = matrix(width, hidden)
            tensors[f"{stem}.w2.weight"] = matrix(hidden, width, 1.5)
            tensors[f"{stem}.w3.weight"] = matrix(width, hidden)
    tensors["model.norm.weight"] = norm()
    if not sizes.tied:
        tensors["lm_head.weight"] = matrix(sizes.vocab_size, hidden, 2.0)
    return tensors
