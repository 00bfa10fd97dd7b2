"""Reads the end, begin and pad token ids from generation_config.json and config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.architecture import is_token_id
from export.checkpoint.file_table import GENERATION_FILE
from export.errors import ConfigError, shown
from export.files.reading import is_there, read_json

CONFIG_FILE = "config.json"


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """The ids of the end tokens, the begin token and the pad token; empty or None if no file states one."""

    eos: tuple[int, ...]
    bos: int | None
    pad: int | None


def read_token_ids(folder: Path, config: Mapping[str, Any]) -> TokenIds:
    """Read the ids from generation_config.json, else from config.json. Raises ConfigError for a value that is not a
    token id."""
    path = folder / GENERATION_FILE
    generation = read_json(path, GENERATION_FILE) if is_there(path) else {}

    def stated(key: str) -> tuple[int, ...]:
        found = [_ids(raw, key, name) for raw, name in ((generation, GENERATION_FILE), (config, CONFIG_FILE))]
        return next(filter(None, found), ())

    def single(key: str) -> int | None:
        ids = stated(key)
        return ids[0] if ids else None

    return TokenIds(eos=stated("eos_token_id"), bos=single("bos_token_id"), pad=single("pad_token_id"))


def _ids(raw: Mapping[str, Any], key: str, name: str) -> tuple[int, ...]:
    value = raw.get(key)
    if value == -1 and type(value) is int and key == "pad_token_id":
        return ()  # older files of phi and Llama write -1 for "none"
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(is_token_id(item) for item in ids):
        raise ConfigError(f"reading {name}: {key} is {shown(value)}, expected a token id or a list of them")
    return tuple(dict.fromkeys(ids))
