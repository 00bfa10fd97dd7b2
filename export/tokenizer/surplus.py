"""Ids of a tokenizer for which the embedding has no row, and whether a prompt can hold them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from export.errors import ConfigError, named, names, shown
from export.families import Model
from export.tokenizer.loading import make_tokenizer
from export.tokenizer.settings import Settings, read_settings

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def model_settings(model: Model) -> Settings:
    """The settings of a model's checkpoint, with a tokenizer that fits its embedding. Raises CheckpointError and
    ConfigError."""
    checkpoint = model.weights.checkpoint
    settings = read_settings(checkpoint.folder, checkpoint.config, checkpoint.gguf_file)
    return fit_tokenizer(settings, model.architecture.vocab_size)


def fit_tokenizer(settings: Settings, rows: int) -> Settings:
    """The settings with a tokenizer whose ids are below `rows`, the number of the embedding's rows.

    Ids from there on are taken out of the vocabulary if no text is encoded to them: every text keeps its ids. Such an
    id is an entry of a BPE vocabulary that no merge makes. An added token counts as one that a prompt can hold, since
    whoever writes its text gets its id. Raises ConfigError if a prompt can hold one of the ids.
    """
    if settings.tokenizer.size <= rows:
        return settings
    backend = settings.tokenizer.backend
    surplus = {token: index for token, index in backend.get_vocab(with_added_tokens=True).items() if index >= rows}
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    stored = json.loads(backend.to_str())
    reached = sorted(
        (token for token in surplus if token in added or _is_reached(token, stored["model"])), key=surplus.__getitem__
    )
    where = f"reading the tokenizer of {named(settings.folder)}"
    if reached:
        raise ConfigError(
            f"{where}: it has {settings.tokenizer.size} ids, the model's vocabulary {rows}, and a prompt can hold "
            f"{names(map(shown, reached), 3)} (id {surplus[reached[0]]}), for which the embedding has no row; the two "
            "belong to different models, or the token was added behind the last id without a row for it: take it out "
            "of the tokenizer, or resize the embedding"
        )
    for token in surplus:
        del stored["model"]["vocab"][token]
    text = json.dumps(stored, ensure_ascii=False)
    return replace(settings, tokenizer=make_tokenizer(text, where), tokenizer_json=text)


def _is_reached(token: str, model: dict[str, Any]) -> bool:
    """Whether a text can be encoded to a token of the model's vocabulary; True where that is not known."""
    plain = not any(model.get(key) for key in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"))
    if model.get("type") != "BPE" or not plain:
        return True
    if len(token) <= 1 or token == model.get("unk_token") or (model.get("byte_fallback") and _BYTE.fullmatch(token)):
        return True
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return any("".join(pair) == token for pair in pairs)
