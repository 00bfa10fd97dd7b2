"""Write a checkpoint of a published model's exact names, shapes, dtype and sharding, with random weights.

    python benchmarks/synthetic_checkpoint.py --like phixtral-4x2_8 --output DIR [--layers N] [--vocab N] [--seed S]
    python benchmarks/synthetic_checkpoint.py --like mixtral-8x7b --layers 4 --output DIR
    python benchmarks/synthetic_checkpoint.py --like qwen3-30b-a3b --layers 2 --output DIR

For measuring builds, memory and speed without a download: nothing can be said of quality with it. Matrices are normal
with variance 1 / input features, so that activations and logits keep the scale of a trained model's; norms are ones,
biases and sinks zeros. The experts of gpt-oss are in MXFP4. The tokenizer is that of examples/tiny-phixtral. Values
come from one pool of 16 million draws, read from a place that hangs on the tensor's name, so that writing runs at the
disk's speed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.architecture import Architecture, QueryKeyValue, Router, Scales, SwiGlu
from export.checkpoint.safetensors_header import numpy_dtype
from export.checkpoint.shard_writer import PlannedTensor, write_sharded
from export.command import run_command
from export.families import families
from export.files.output import require_space, staged_directory
from export.merge.outputs import phixtral_config
from export.rotary import RotaryScaling

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-phixtral" / "experts" / "code"
SHARD_BYTES = 5_000_000_000
POOL_ELEMENTS = 1 << 24
MXFP4_BLOCK = 32
MAGNITUDES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)  # of a code of MXFP4 without its sign
# config.json of mlabonne/phixtral-4x2_8 and 2x2_8.
PHIXTRAL = Architecture(
    family="phixtral",
    hidden_size=2560,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_size=80,
    ffn_size=10240,
    vocab_size=51200,
    num_experts=4,
    experts_per_token=2,
    rotary_dim=32,
    rope_base=10000.0,
    norm_epsilon=1e-5,
    max_positions=2048,
    bos_token_id=None,
    eos_token_ids=(0,),  # of the example's tokenizer
    source_dtype="float16",
)
# config.json of mistralai/Mixtral-8x7B-v0.1.
MIXTRAL = Architecture(
    family="mixtral",
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    ffn_size=14336,
    vocab_size=32000,
    num_experts=8,
    experts_per_token=2,
    rotary_dim=128,
    rope_base=1e6,
    norm_epsilon=1e-5,
    max_positions=32768,
    bos_token_id=None,
    eos_token_ids=(0,),  # of the example's tokenizer
    source_dtype="bfloat16",
)
# config.json of mistralai/Mistral-7B-v0.1.
MISTRAL = replace(MIXTRAL, family="mistral", num_experts=0, experts_per_token=0, rope_base=1e4, sliding_window=4096)
# config.json of allenai/OLMoE-1B-7B-0924.
OLMOE = replace(
    MIXTRAL,
    family="olmoe",
    hidden_size=2048,
    num_layers=16,
    num_heads=16,
    num_kv_heads=16,
    ffn_size=1024,
    vocab_size=50304,
    num_experts=64,
    experts_per_token=8,
    rope_base=1e4,
    max_positions=4096,
    router=Router(normalise=False),
    qkv=QueryKeyValue(norm="width"),
)
# config.json of Qwen/Qwen3-30B-A3B.
QWEN3 = replace(
    MIXTRAL,
    family="qwen3_moe",
    hidden_size=2048,
    num_layers=48,
    num_kv_heads=4,
    ffn_size=768,
    vocab_size=151936,
    num_experts=128,
    experts_per_token=8,
    norm_epsilon=1e-6,
    max_positions=40960,
    qkv=QueryKeyValue(norm="head"),
)
# config.json of ibm-granite/granite-3.1-3b-a800m-base.
GRANITE = replace(
    MIXTRAL,
    family="granitemoe",
    hidden_size=1536,
    num_heads=24,
    head_size=64,
    rotary_dim=64,
    ffn_size=512,
    vocab_size=49155,
    num_experts=40,
    experts_per_token=8,
    rope_base=1e7,
    norm_epsilon=1e-6,
    max_positions=131072,
    tied_head=True,
    scales=Scales(embedding=12.0, residual=0.22, attention=0.015625, logits=6.0),
)
# config.json of openai/gpt-oss-20b.
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
GPT_OSS = replace(
    MIXTRAL,
    family="gpt_oss",
    hidden_size=2880,
    num_layers=24,
    num_heads=64,
    head_size=64,
    rotary_dim=64,
    ffn_size=2880,
    vocab_size=201088,
    num_experts=32,
    experts_per_token=4,
    rope_base=150000.0,
    rotary_scaling=RotaryScaling(
        kind="yarn", factor=32.0, original_positions=4096, attention_factor=0.1 * math.log(32) + 1, truncate=False
    ),
    max_positions=131072,
    sliding_window=128,
    full_layers=tuple(range(1, 24, 2)),
    attention_bias=True,
    swiglu=SwiGlu(alpha=1.702, beta=1.0, limit=7.0),
)
MODELS = {
    "mistral-7b": MISTRAL,
    "phixtral-4x2_8": PHIXTRAL,
    "phixtral-2x2_8": replace(PHIXTRAL, num_experts=2),
    "mixtral-8x7b": MIXTRAL,
    "olmoe-1b-7b": OLMOE,
    "qwen3-30b-a3b": QWEN3,
    "granite-3.1-3b-a800m": GRANITE,
    "gpt-oss-20b": GPT_OSS,
}
# Keys of config.json beside a Mixtral's.
MORE_KEYS = {
    "granitemoe": {"attention_bias": False},
    "gpt_oss": {
        "attention_bias": True, "initial_context_length": 4096, "rope_scaling": YARN, "swiglu_limit": 7.0,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
        },
    },
    "olmoe": {"norm_topk_prob": False, "clip_qkv": None},
    "qwen3_moe": {
        "norm_topk_prob": True, "intermediate_size": 6144, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "use_sliding_window": False,
    },
}  # fmt: skip
DTYPES = {"float16": "F16", "bfloat16": "BF16"}

logger = logging.getLogger(__name__)


def draws(seed: int) -> Callable[[PlannedTensor], Iterator[npt.NDArray[Any]]]:
    """A function that yields the values of a tensor in chunks."""
    pool = np.random.default_rng(seed).standard_normal(POOL_ELEMENTS, dtype=np.float32)
    pools: dict[tuple[str, int], npt.NDArray[Any]] = {}

    def chunks(tensor: PlannedTensor) -> Iterator[npt.NDArray[Any]]:
        count, dtype = tensor.num_elements, numpy_dtype(tensor.dtype)
        if (constant := _constant(tensor)) is not None:
            yield np.full(count, constant, dtype=dtype)
            return
        key = tensor.dtype, _features(tensor)
        if key not in pools:
            scaled = pool / np.sqrt(key[1])
            pools[key] = mxfp4_pairs(scaled, mxfp4_exponent(key[1])) if tensor.dtype == "U8" else scaled.astype(dtype)
        place = zlib.crc32(tensor.name.encode()) % len(pools[key])
        while count:
            piece = pools[key][place : place + count]
            yield piece
            count, place = count - len(piece), 0

    return chunks


def _constant(tensor: PlannedTensor) -> float | None:
    """The value that all of a tensor has; None for a matrix."""
    if tensor.name.endswith("_scales"):
        return mxfp4_exponent(_features(tensor)) + 127
    if len(tensor.shape) == 1 or tensor.name.endswith("_bias"):
        return 1.0 if tensor.name.endswith(("ln.weight", "norm.weight")) else 0.0
    return None


def _features(tensor: PlannedTensor) -> int:
    """The number of input features of a matrix; the variance of its values is the inverse of that; 1 for an
    embedding."""
    if tensor.name.endswith(("wte.weight", "embed_tokens.weight")):
        return 1
    return tensor.shape[2] * MXFP4_BLOCK if tensor.name.endswith(("_blocks", "_scales")) else tensor.shape[-1]


def mxfp4_exponent(features: int) -> int:
    """The exponent of the scale of every block: the largest magnitude is between 1.5 and 3 standard deviations."""
    return math.floor(math.log2(3 / max(MAGNITUDES) / math.sqrt(features)))


def mxfp4_pairs(values: npt.NDArray[np.float32], exponent: int) -> npt.NDArray[np.uint8]:
    """Bytes of the nearest codes of two values each, the first in the low bits."""
    scaled = np.ldexp(values, -exponent)
    between = np.convolve(MAGNITUDES, (0.5, 0.5), "valid").astype(np.float32)
    codes = np.searchsorted(between, np.abs(scaled)).astype(np.uint8) | (scaled < 0).astype(np.uint8) << 3
    return codes[0::2] | codes[1::2] << 4


def llama_config(architecture: Architecture) -> dict[str, Any]:
    """The contents of config.json of a Mixtral, a Mistral or a family of MORE_KEYS, with the published keys."""
    mixture = {
        "num_experts_per_tok": architecture.experts_per_token,
        "num_local_experts": architecture.num_experts,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
    }
    return {
        "architectures": [f"{architecture.family.title().replace('_', '')}ForCausalLM"],
        "attention_dropout": 0.0,
        "eos_token_id": architecture.eos_token_ids[0],
        "hidden_act": "silu",
        "hidden_size": architecture.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": architecture.ffn_size,
        "max_position_embeddings": architecture.max_positions,
        "model_type": architecture.family,
        "num_attention_heads": architecture.num_heads,
        "num_hidden_layers": architecture.num_layers,
        "num_key_value_heads": architecture.num_kv_heads,
        "rms_norm_eps": architecture.norm_epsilon,
        "rope_theta": architecture.rope_base,
        **(mixture if architecture.is_moe else {}),
        "sliding_window": architecture.sliding_window,
        "tie_word_embeddings": architecture.tied_head,
        "torch_dtype": architecture.source_dtype,
        "use_cache": True,
        "vocab_size": architecture.vocab_size,
        **MORE_KEYS.get(architecture.family, {}),
        **_own_keys(architecture),
    }


def _own_keys(architecture: Architecture) -> dict[str, Any]:
    """Keys of a family whose values are among the facts."""
    windows, scales = map(architecture.window, range(architecture.num_layers)), architecture.scales
    keys: dict[str, dict[str, Any]] = {
        "olmoe": {"num_experts": architecture.num_experts},
        "qwen3_moe": {"head_dim": architecture.head_size, "moe_intermediate_size": architecture.ffn_size},
        "gpt_oss": {
            "experts_per_token": architecture.experts_per_token,
            "head_dim": architecture.head_size,
            "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        },
        "granitemoe": {
            "embedding_multiplier": scales.embedding,
            "residual_multiplier": scales.residual,
            "attention_multiplier": architecture.attention_scale,
            "logits_scaling": scales.logits,
        },
    }
    return keys.get(architecture.family, {})


def shortened(architecture: Architecture, layers: int) -> Architecture:
    """The model with its first layers alone."""
    full = tuple(layer for layer in architecture.full_layers if layer < layers)
    return replace(architecture, num_layers=layers, full_layers=full)


def planned_tensors(architecture: Architecture, dtype: str) -> list[PlannedTensor]:
    """Every tensor of the published files, in the order of the family's tensor table."""
    [family] = [family for family in families() if family.name == architecture.family]
    # Parts of one tensor, and the two names of a tied matrix, are one tensor of the files.
    found = {part.name: part.whole_shape for spec in family.tensors(architecture, ()) for part in spec.parts}
    return [tensor for name, shape in found.items() for tensor in _stored(name, shape, dtype)]


def _stored(name: str, shape: tuple[int, ...], dtype: str) -> Iterator[PlannedTensor]:
    """The tensors of the files that a tensor is made of: in MXFP4, its blocks and their scales."""
    if not name.endswith("_blocks"):
        yield PlannedTensor(name=name, dtype=dtype, shape=shape)
        return
    blocks = (*shape[:-1], shape[-1] // MXFP4_BLOCK)
    yield PlannedTensor(name=name, dtype="U8", shape=(*blocks, MXFP4_BLOCK // 2))
    yield PlannedTensor(name=f"{name.removesuffix('_blocks')}_scales", dtype="U8", shape=blocks)


def write(architecture: Architecture, output: Path, seed: int) -> int:
    """Write the checkpoint into the new folder `output`; returns its bytes of tensors."""
    dtype = DTYPES[str(architecture.source_dtype)]
    end = {"eos_token_id": architecture.eos_token_ids[0]}
    config = (
        phixtral_config(architecture, dtype, end) if architecture.family == "phixtral" else llama_config(architecture)
    )
    tensors = planned_tensors(architecture, dtype)
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    require_space(output, num_bytes, "the synthetic checkpoint")
    with staged_directory(output, "the synthetic checkpoint") as folder:
        write_sharded(folder, tensors, draws(seed), max_shard_bytes=SHARD_BYTES)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(EXAMPLE / name, folder / name)
    return num_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", required=True, choices=MODELS, help="the published model")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to make")
    parser.add_argument("--layers", type=int, metavar="N", help="number of layers, if not the model's own")
    parser.add_argument("--vocab", type=int, metavar="N", help="rows of embedding and head, if not the model's own")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    architecture = MODELS[options.like]
    if options.layers is not None:
        architecture = shortened(architecture, options.layers)
    if options.vocab is not None:
        architecture = replace(architecture, vocab_size=options.vocab)

    def run() -> int:
        started = time.monotonic()
        num_bytes = write(architecture, options.output, options.seed)
        seconds = time.monotonic() - started
        print(f"{options.output}: {num_bytes / 1e9:.2f} GB in {seconds:.0f} s, {num_bytes / 1e6 / seconds:.0f} MB/s")
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
