"""Every reader of what others wrote, with good inputs for it: the table that the fuzz tests and ci/fuzz.py run over."""

from __future__ import annotations

import atexit
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import safetensors
import yaml
from adapters import write_adapter
from checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from dense_checkpoints import write_dense_checkpoint
from flex_olmo_checkpoints import write_flex_olmo_checkpoint
from fuzz_engines import READERS as ENGINE_READERS
from fuzz_requests import READERS as REQUEST_READERS
from fuzzing import Reader, mutated_bytes, mutated_json
from gpt_oss_checkpoints import write_gpt_oss_checkpoint
from granitemoe_checkpoints import write_granitemoe_checkpoint
from mixtral_checkpoints import write_mixtral_checkpoint
from olmoe_checkpoints import write_olmoe_checkpoint
from phimoe_checkpoints import write_phimoe_checkpoint
from qwen_checkpoints import write_qwen_checkpoint

from export.checkpoint.file_table import INDEX_FILE
from export.checkpoint.folder import open_checkpoint
from export.checkpoint.safetensors_header import read_header
from export.errors import MoeshipError
from export.families import read_model
from export.files.reading import read_json
from export.merge.adapters import open_adapter, with_adapter
from export.merge.config import read_merge_config
from export.tokenizer.loading import load_tokenizer
from export.tokenizer.settings import check_token_ids, read_settings

SIZES = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "ffn_size": 8, "vocab_size": 260, "rotary_dim": 2}


@cache
def checkpoints() -> tuple[Path, ...]:
    """A small checkpoint of each family."""
    folder = Path(tempfile.mkdtemp(prefix="moeship-fuzz-"))
    atexit.register(shutil.rmtree, folder)
    return (
        write_phi_checkpoint(folder / "phi", seed=1, **SIZES),
        write_phixtral_checkpoint(folder / "phixtral", seed=1, num_experts=3, experts_per_token=2, **SIZES),
        write_mixtral_checkpoint(folder / "mixtral", seed=1),
        write_granitemoe_checkpoint(folder / "granitemoe", seed=1),
        write_olmoe_checkpoint(folder / "olmoe", seed=1),
        write_flex_olmo_checkpoint(folder / "flex_olmo", seed=1),
        write_gpt_oss_checkpoint(folder / "gpt_oss", seed=1),
        write_gpt_oss_checkpoint(folder / "mxfp4", seed=1, spelling="mxfp4"),
        write_qwen_checkpoint(folder / "qwen3_moe", "qwen3_moe", seed=1, num_layers=3, config={"mlp_only_layers": [1]}),
        write_qwen_checkpoint(folder / "qwen2_moe", "qwen2_moe", seed=1, num_layers=3, config={"mlp_only_layers": [1]}),
        write_phimoe_checkpoint(folder / "phimoe", seed=1),
        write_dense_checkpoint(folder / "mistral", seed=1, family="mistral"),
        write_dense_checkpoint(folder / "llama", seed=1, family="llama"),
        write_dense_checkpoint(folder / "qwen2", seed=1, family="qwen2"),
        write_dense_checkpoint(folder / "qwen3", seed=1, family="qwen3"),
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
    refused = None
    for source in checkpoints():
        try:
            read_model(open_checkpoint(folder / source.name))
        except MoeshipError as error:
            refused = error
    if refused is not None:
        raise refused


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


@cache
def adapter() -> Path:
    """An adapter of the small Mistral."""
    mistral = next(folder for folder in checkpoints() if folder.name == "mistral")
    return write_adapter(
        mistral.parent / "adapter", mistral, seed=1, ranks={"down_proj": 3}, alpha_pattern={"q_proj": 2}
    )


def copied_adapter(folder: Path) -> None:
    copies(folder)
    shutil.copytree(adapter(), folder / "adapter")


def adapter_reader(name: str) -> Callable[[bytes, Path], None]:
    """Merges an adapter, one of whose files holds the bytes, into its base, and reads a tensor of that."""

    def read(data: bytes, folder: Path) -> None:
        (folder / "adapter" / name).write_bytes(data)
        merged = with_adapter(open_checkpoint(folder / "mistral"), open_adapter(str(folder / "adapter")))
        merged.read_finite("model.layers.0.mlp.down_proj.weight")

    return read


def tokenizer_texts() -> list[bytes]:
    """A byte-level and a Llama tokenizer, and the first with patterns in every place that takes one."""
    plain, *_, llama = files("tokenizer.json")
    replace = {"type": "Replace", "pattern": {"Regex": r" {2,}|\s+(?!\S)"}, "content": "x"}
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}| ?\p{L}+"}, "behavior": "Isolated", "invert": False}
    patterned = {**json.loads(plain), "normalizer": replace, "pre_tokenizer": split, "decoder": replace}
    return [plain, llama, json.dumps(patterned).encode()]


def read_tokenizer(data: bytes, folder: Path) -> None:
    path = folder / "phixtral"
    (path / "tokenizer.json").write_bytes(data)
    tokenizer = load_tokenizer(path)
    tokenizer.decode(tokenizer.encode_prompt("def main():\n    return 1   # one" * 3))


def reader_of(name: str) -> Callable[[bytes, Path], None]:
    """Reads all settings of a checkpoint in which the file `name` holds the bytes."""

    def read(data: bytes, folder: Path) -> None:
        path = folder / "phixtral"
        (path / name).write_bytes(data)
        settings = read_settings(path, read_json(path / "config.json", "config.json"))
        check_token_ids(settings, 352)
        settings.tokenizer.decode(settings.tokenizer.encode_prompt("def main(): <|endoftext|>"))

    return read


def settings_texts() -> dict[str, list[dict[str, object]]]:
    """File -> good contents of it, for the files that state a tokenizer's facts beside tokenizer.json."""
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    end = {"content": "<|endoftext|>", **flags}
    listed = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"256": {**end, "special": True}}}
    named_templates = [{"name": "default", "template": "{{ x }}"}, {"name": "tools", "template": "y"}]
    return {
        "tokenizer_config.json": [
            {"tokenizer_class": "CodeGenTokenizer", "add_prefix_space": False, "eos_token": "<|endoftext|>"},
            {**listed, "bos_token": {"__type": "AddedToken", **end}, "chat_template": named_templates},
        ],
        "special_tokens_map.json": [
            {"bos_token": end, "eos_token": "<|endoftext|>", "additional_special_tokens": ["<x>"]}
        ],
        "added_tokens.json": [{"<x>": 257, "<y>": 258}],
        "generation_config.json": [{"eos_token_id": [256, 3], "bos_token_id": 256, "pad_token_id": None}],
    }


READERS = (
    Reader(name="safetensors header", seeds=lambda: files("model.safetensors"), read=read_shard, mutate=framed),
    Reader(name="index", seeds=index_texts, read=read_index, mutate=mutated_json, setup=copies),
    Reader(name="config", seeds=lambda: files("config.json"), read=read_config, mutate=mutated_json, setup=copies),
    Reader(name="merge YAML", seeds=merge_texts, read=read_merge),
    Reader(
        name="adapter settings", seeds=lambda: [(adapter() / "adapter_config.json").read_bytes()],
        read=adapter_reader("adapter_config.json"), mutate=mutated_json, setup=copied_adapter,
    ),
    Reader(
        name="adapter", seeds=lambda: [(adapter() / "adapter_model.safetensors").read_bytes()],
        read=adapter_reader("adapter_model.safetensors"), mutate=framed, setup=copied_adapter,
    ),
    Reader(
        name="tokenizer", seeds=tokenizer_texts, read=read_tokenizer, mutate=mutated_json,
        setup=copies,
    ),
    *(
        Reader(
            name=name, seeds=lambda texts=texts: [json.dumps(text).encode() for text in texts], read=reader_of(name),
            mutate=mutated_json, setup=copies,
        )
        for name, texts in settings_texts().items()
    ),
    *REQUEST_READERS,
    *ENGINE_READERS,
)  # fmt: skip
