"""Write a checkpoint of a published model's exact names, shapes, dtype and sharding, with random weights.

    python benchmarks/synthetic_checkpoint.py --like phixtral-4x2_8 --output DIR [--layers N] [--seed S]
    python benchmarks/synthetic_checkpoint.py --like mixtral-8x7b --layers 4 --output DIR
    python benchmarks/synthetic_checkpoint.py --like qwen3-30b-a3b --layers 2 --output DIR

For measuring builds, memory and speed without a download: nothing can be said of quality with it. Matrices are normal
with variance 1 / input features, so that activations and logits keep the scale of a trained model's; norms are ones,
biases zeros. The tokenizer is that of examples/tiny-phixtral. Values come from one pool of 16 million draws, read from
a place that hangs on the tensor's name, so that writing runs at the disk's speed.
"""

from __future__ import annotations

import argparse
import json
import logging
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

from export.architecture import Architecture, QueryKeyValue, Router
from export.checkpoint.safetensors_header import numpy_dtype
from export.checkpoint.shard_writer import PlannedTensor, write_sharded
from export.command import run_command
from export.families import families
from export.files.output import require_space, staged_directory
from export.merge.outputs import phixtral_config

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-phixtral" / "experts" / "code"
SHARD_BYTES = 5_000_000_000
POOL_ELEMENTS = 1 << 24
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
MODELS = {
    "mistral-7b": MISTRAL,
    "phixtral-4x2_8": PHIXTRAL,
    "phixtral-2x2_8": replace(PHIXTRAL, num_experts=2),
    "mixtral-8x7b": MIXTRAL,
    "olmoe-1b-7b": OLMOE,
    "qwen3-30b-a3b": QWEN3,
}
# Keys of config.json beside a Mixtral's.
MORE_KEYS = {
    "olmoe": {"norm_topk_prob": False, "clip_qkv": None, "num_experts": OLMOE.num_experts},
    "qwen3_moe": {
        "norm_topk_prob": True, "head_dim": QWEN3.head_size, "moe_intermediate_size": QWEN3.ffn_size,
        "intermediate_size": 6144, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
    },
}  # fmt: skip
DTYPES = {"float16": "F16", "bfloat16": "BF16"}

logger = logging.getLogger(__name__)


def draws(seed: int) -> Callable[[PlannedTensor], Iterator[npt.NDArray[Any]]]:
    """A function that yields the values of a tensor, two bytes each, in chunks."""
    pool = np.random.default_rng(seed).standard_normal(POOL_ELEMENTS, dtype=np.float32)
    scaled: dict[int, npt.NDArray[Any]] = {}

    def chunks(tensor: PlannedTensor) -> Iterator[npt.NDArray[Any]]:
        count, dtype = tensor.num_bytes // 2, numpy_dtype(tensor.dtype)
        if len(tensor.shape) == 1:
            yield np.full(count, 1.0 if tensor.name.endswith(("ln.weight", "norm.weight")) else 0.0, dtype=dtype)
            return
        features = 1 if tensor.name.endswith(("wte.weight", "embed_tokens.weight")) else tensor.shape[-1]
        if features not in scaled:
            scaled[features] = (pool / np.sqrt(features)).astype(dtype)
        place = zlib.crc32(tensor.name.encode()) % POOL_ELEMENTS
        while count:
            piece = scaled[features][place : place + count]
            yield piece
            count, place = count - len(piece), 0

    return chunks


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
        "tie_word_embeddings": False,
        "torch_dtype": architecture.source_dtype,
        "use_cache": True,
        "vocab_size": architecture.vocab_size,
        **MORE_KEYS.get(architecture.family, {}),
    }


def planned_tensors(architecture: Architecture, dtype: str) -> list[PlannedTensor]:
    """Every tensor of the published files, in the order of the family's tensor table."""
    [family] = [family for family in families() if family.name == architecture.family]
    return [
        PlannedTensor(name=part.name, dtype=dtype, shape=part.shape)
        for spec in family.tensors(architecture, ())
        for part in spec.parts
    ]


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
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    architecture = MODELS[options.like]
    if options.layers is not None:
        architecture = replace(architecture, num_layers=options.layers)

    def run() -> int:
        started = time.monotonic()
        num_bytes = write(architecture, options.output, options.seed)
        seconds = time.monotonic() - started
        print(f"{options.output}: {num_bytes / 1e9:.2f} GB in {seconds:.0f} s, {num_bytes / 1e6 / seconds:.0f} MB/s")
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
