"""Every reader of what others wrote, with good inputs for it: the table that the fuzz tests and ci/fuzz.py run over."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path

import safetensors
import yaml
from checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from fuzzing import Reader, mutated_bytes, mutated_json
from mixtral_checkpoints import write_mixtral_checkpoint

from export.checkpoint import INDEX_FILE, open_checkpoint
from export.families import read_model
from export.gates import start_token
from export.merge_config import read_merge_config
from export.safetensors_header import read_header
from export.tokenizer import load_tokenizer

SIZES = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "ffn_size": 8, "vocab_size": 260, "rotary_dim": 2}


@cache
def checkpoints() -> tuple[Path, ...]:
    """A small checkpoint of each family."""
    folder = Path(tempfile.mkdtemp(prefix="moeship-fuzz-"))
    return (
        write_phi_checkpoint(folder / "phi", seed=1, **SIZES),
        write_phixtral_checkpoint(folder / "phixtral", seed=1, num_experts=3, experts_per_token=2, **SIZES),
        write_mixtral_checkpoint(folder / "mixtral", seed=1),
    )


def files(name: str) -> list[bytes]:
    """The bytes of a file of each of the checkpoints."""
    return [(folder / name).read_bytes() for folder in checkpoints()]


def copies(folder: Path) -> None:
    for source in checkpoints():
        shutil.copytree(source, folder / source.name)


def framed(rng: random.Random, data: bytes) -> bytes:
    """Damage to a safetensors file: to its header, whose length is then mended, or anywhere."""
    if rng.random() < 0.2:
        return mutated_bytes(rng, data)
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        return mutated_bytes(rng, data)
    header = mutated_json(rng, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def read_shard(data: bytes, folder: Path) -> None:
    """Read a header; what is taken here, the safetensors library must take too."""
    path = folder / "model.safetensors"
    path.write_bytes(data)
    read_header(path)
    safetensors.deserialize(data)


def read_config(data: bytes, folder: Path) -> None:
    """Read a config.json beside the tensors of each family."""
    for source in checkpoints():
        (folder / source.name / "config.json").write_bytes(data)
    errors = []
    for source in checkpoints():
        try:
            read_model(open_checkpoint(folder / source.name))
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def index_texts() -> list[bytes]:
    return [
        json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}).encode()
        for names in [[stored.name for stored in read_header(checkpoints()[1] / "model.safetensors")]]
    ]


def read_index(data: bytes, folder: Path) -> None:
    path = folder / "phixtral"
    (path / INDEX_FILE).write_bytes(data)
    open_checkpoint(path)


def merge_texts() -> list[bytes]:
    expert = {"source_model": "./e0", "positive_prompts": ["def main():", "beta"], "negative_prompts": ["once"]}
    plain = {
        "base_model": "./e0", "gate_mode": "cheap_embed", "dtype": "float16", "experts_per_token": 2,
        "experts": [{**expert, "noise_scale": 0.01}, {**expert, "residual_scale": 0.5}],
    }  # fmt: skip
    shared = b"base_model: e0\nexperts:\n- &a\n  source_model: e0\n  positive_prompts: [x, 'y']\n- *a\n"
    return [yaml.safe_dump(plain).encode(), shared, json.dumps(plain).encode()]


def read_merge(data: bytes, folder: Path) -> None:
    path = folder / "merge.yml"
    path.write_bytes(data)
    read_merge_config(path)


def read_tokenizer(data: bytes, folder: Path) -> None:
    path = folder / "phixtral"
    (path / "tokenizer.json").write_bytes(data)
    tokenizer = load_tokenizer(path)
    tokenizer.decode(tokenizer.encode_prompt("def main():\n    return 1   # one" * 3))


def read_settings(data: bytes, folder: Path) -> None:
    path = folder / "phixtral"
    (path / "tokenizer_config.json").write_bytes(data)
    load_tokenizer(path)
    start_token(path)


READERS = (
    Reader(name="safetensors header", seeds=lambda: files("model.safetensors"), read=read_shard, mutate=framed),
    Reader(name="index", seeds=index_texts, read=read_index, mutate=mutated_json, setup=copies),
    Reader(name="config", seeds=lambda: files("config.json"), read=read_config, mutate=mutated_json, setup=copies),
    Reader(name="merge YAML", seeds=merge_texts, read=read_merge),
    Reader(
        name="tokenizer", seeds=lambda: files("tokenizer.json")[:1], read=read_tokenizer, mutate=mutated_json,
        setup=copies,
    ),
    Reader(
        name="tokenizer settings", seeds=lambda: files("tokenizer_config.json")[:1], read=read_settings,
        mutate=mutated_json, setup=copies,
    ),
)  # fmt: skip
