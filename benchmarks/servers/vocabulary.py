"""Gives llama.cpp's model a vocabulary. llama-server ends with a failed assertion for models without one."""

from __future__ import annotations

from pathlib import Path

from decode import llama_formats
from decode.entrants import gguf_path
from decode.gguf_model import Vocabulary, write_model
from export.architecture import Architecture
from export.checkpoint.folder import read_json
from export.errors import ConfigError


def read_vocabulary(path: Path, size: int, end_id: int) -> Vocabulary:
    """The vocabulary of a tokenizer.json, filled up to `size` tokens. Raises ConfigError if it is no byte-level BPE."""
    contents = read_json(path, "a tokenizer")
    model = contents.get("model", {})
    if model.get("type") != "BPE" or "Ġ" not in "".join(list(model["vocab"])[:1000]):
        raise ConfigError(f"giving llama.cpp's model the vocabulary of {path}: expected a byte-level BPE tokenizer")
    names = {**model["vocab"], **{token["content"]: token["id"] for token in contents.get("added_tokens", [])}}
    by_id = {number: name for name, number in names.items()}
    return Vocabulary(
        tokens=[by_id.get(number, f"Ġunused{number}") for number in range(size)],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        end_id=end_id,
    )


def gguf_with_vocabulary(folder: Path, model: Architecture, precision: str, tokenizer: Path) -> Path:
    """The GGUF file of a Mixtral with the vocabulary of `tokenizer`, which is written where it is missing."""
    path = gguf_path(folder, model, f"{precision}-vocabulary")
    if not path.is_file():
        vocabulary = read_vocabulary(tokenizer, model.vocab_size, model.eos_token_ids[0])
        types = llama_formats.chosen_types(model, precision)
        folder.mkdir(parents=True, exist_ok=True)
        write_model(path, model, types, llama_formats.quantize, llama_formats.FILE_TYPES[precision], vocabulary)
    return path
