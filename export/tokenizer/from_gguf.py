"""Makes a tokenizer.json of the metadata of a GGUF file, as transformers does.

    text, settings = gguf_tokenizer(Path("model.gguf"))       # tokenizer.json, and values of tokenizer_config.json

Two kinds are made. `llama` is SentencePiece's byte-pair encoding: pieces with scores, and the
merges follow from the scores.
`gpt2` is byte-level: the file has the merges, and by name the way in which text is split before them. Source:
transformers, integrations/gguf/gguf_tokenizer_mapping.py. In two places that code loses what the file states, and
llama.cpp is followed (src/llama-vocab.cpp): `add_space_prefix`, and that whole words of the vocabularies of Llama 3 and
Tekken win over merges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from export.errors import CheckpointError, ConfigError, named, shown
from export.formats.gguf_file import read_gguf
from export.tokenizer.pipelines import byte_level_pipeline, llama_pipeline

_TOKENS, _TYPES, _SCORES, _MERGES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores", "merges"))
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # gguf.TokenType
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# Name of a way to split text -> its regular expression, from the tokenizers that the models were published with; None
# for GPT-2's own, which the byte-level pre-tokenizer has.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: Mapping[str, str | None] = MappingProxyType(
    {
        **dict.fromkeys(("default", "gpt-2", "phi-2")),
        **dict.fromkeys(("llama3", "llama-v3", "llama-bpe"), _LLAMA_3),
        "tekken": _TEKKEN,
    }
)


def gguf_tokenizer(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a tokenizer.json and the values of a tokenizer_config.json. Raises CheckpointError for metadata that
    contradict themselves, and ConfigError for a kind of tokenizer that is not made."""
    metadata = read_gguf(path, (_TOKENS, _TYPES, _SCORES, _MERGES)).metadata
    kind, reader = metadata.get("tokenizer.ggml.model"), _Reader(metadata, path)
    if kind not in ("llama", "gpt2"):
        raise ConfigError(f"{reader.doing}: its kind is {shown(kind)}, moeship makes llama and gpt2; {reader.remedy}")
    content = reader.llama() if kind == "llama" else reader.byte_level()
    return json.dumps(content, ensure_ascii=False), reader.settings()


class _Reader:
    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self._metadata = metadata
        self.doing = f"reading the tokenizer of {named(path)}"
        self.remedy = "put the original model's tokenizer.json and tokenizer_config.json into the same folder"
        self.tokens: list[str] = self._texts(_TOKENS)
        self._types = self._numbers(_TYPES, [1] * len(self.tokens))
        while self.tokens and self._types[-1] == _UNUSED:  # llama.cpp names rows that pad the embedding
            self.tokens.pop()
            self._types.pop()
        self._vocabulary = {token: index for index, token in enumerate(self.tokens)}
        if not self.tokens or len(self._vocabulary) != len(self.tokens):
            raise CheckpointError(f"{self.doing}: it has no tokens, or one token twice; {self.remedy}")

    def llama(self) -> dict[str, Any]:
        """tokenizer.json of SentencePiece's byte-pair encoding."""
        merges = self._merges() if _MERGES in self._metadata else merges_of(self.tokens, self._numbers(_SCORES))
        settings = {"add_prefix_space": self._flag("add_space_prefix", absent=True)}
        model = {"unk_token": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
        # llama.cpp puts a begin token before a text unless the file says otherwise.
        return self._content(llama_pipeline(settings), model, merges, begins=self._flag("add_bos_token", absent=True))

    def byte_level(self) -> dict[str, Any]:
        """tokenizer.json of byte-level byte-pair encoding."""
        name = self._metadata.get("tokenizer.ggml.pre", "default")
        if name not in _SPLITS:
            raise ConfigError(
                f"{self.doing}: tokenizer.ggml.pre is {shown(name)}, and moeship knows how to split text for "
                f"{', '.join(_SPLITS)}; {self.remedy}"
            )
        split, pipeline = _SPLITS[name], byte_level_pipeline({})
        if split is not None:
            pieces = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
            parts = {**pipeline["pre_tokenizer"], "use_regex": False}
            pipeline["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pieces, parts]}
        model = {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": split is not None}
        return self._content(pipeline, model, self._merges(), begins=self._flag("add_bos_token", absent=False))

    def settings(self) -> dict[str, Any]:
        """The values of tokenizer_config.json."""
        found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for name, key in _SPECIAL.items():
            index = self._metadata.get(f"tokenizer.ggml.{key}_token_id")
            if index is not None:
                found[name] = self._token(key, index)
        template = self._metadata.get("tokenizer.chat_template")
        return found if not isinstance(template, str) else {**found, "chat_template": template}

    def _content(
        self, pipeline: Mapping[str, Any], model: Mapping[str, Any], merges: Sequence[Sequence[str]], *, begins: bool
    ) -> dict[str, Any]:
        alphabet = None if pipeline["decoder"]["type"] != "ByteLevel" else _byte_alphabet()
        added = [
            {
                "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": kind == _CONTROL,
            }
            for index, (token, kind) in enumerate(zip(self.tokens, self._types, strict=True))
            if kind == _USER_DEFINED or (kind == _CONTROL and (alphabet is None or alphabet.issuperset(token)))
        ]  # fmt: skip
        processor = None
        bos = self._metadata.get("tokenizer.ggml.bos_token_id")
        if begins and bos is not None:
            token = self._token("bos", bos)
            special = {token: {"id": token, "ids": [bos], "tokens": [token]}}
            start, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
            second = {"Sequence": {"id": "B", "type_id": 1}}
            processor = {
                "type": "TemplateProcessing", "single": [start, text], "special_tokens": special,
                "pair": [start, text, {"SpecialToken": {"id": token, "type_id": 1}}, second],
            }  # fmt: skip
        return {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **pipeline,
            "post_processor": processor,
            "model": {
                "type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                **model, "vocab": self._vocabulary, "merges": [list(merge) for merge in merges],
            },
        }  # fmt: skip

    def _merges(self) -> list[list[str]]:
        merges = [merge.split(" ") for merge in self._texts(_MERGES)]
        wrong = next((merge for merge in merges if not self._is_merge(merge)), None)
        if wrong is not None:
            raise CheckpointError(
                f"{self.doing}: it has the merge {shown(' '.join(wrong), 60)}, which makes no token of two; "
                f"{self.remedy}"
            )
        return merges

    def _is_merge(self, merge: Sequence[str]) -> bool:
        return len(merge) == 2 and all(token in self._vocabulary for token in (*merge, "".join(merge)))

    def _token(self, key: str, index: object) -> str:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self.tokens):
            raise CheckpointError(
                f"{self.doing}: tokenizer.ggml.{key}_token_id is {shown(index)}, expected a number below "
                f"{len(self.tokens)}; {self.remedy}"
            )
        return self.tokens[index]

    def _flag(self, name: str, *, absent: bool) -> bool:
        found = self._metadata.get(f"tokenizer.ggml.{name}", absent)
        if not isinstance(found, bool):
            raise CheckpointError(f"{self.doing}: tokenizer.ggml.{name} is {shown(found)}, expected true or false")
        return found

    def _texts(self, key: str) -> list[str]:
        found = self._metadata.get(key)
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise ConfigError(f"{self.doing}: its metadata have no {key}; {self.remedy}")
        return list(found)

    def _numbers(self, key: str, absent: list[float] | None = None) -> list[float]:
        found = self._metadata.get(key, absent)
        if not isinstance(found, list) or len(found) < len(self.tokens) or isinstance(next(iter(found), 0), str):
            raise ConfigError(f"{self.doing}: its metadata have no {key}, or not as many as tokens; {self.remedy}")
        return list(found[: len(self.tokens)])


def merges_of(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges of a vocabulary of pieces with scores: each split of a piece into two others, the best piece first.
    As transformers orders them (tokenization_utils_base.py: generate_merges)."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    found: list[tuple[float, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        splits = [(token[:place], token[place:]) for place in range(1, len(token))]
        known = [split for split in splits if split[0] in vocabulary and split[1] in vocabulary]
        found += [(score, *split) for split in sorted(known, key=lambda split: [vocabulary[part] for part in split])]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _byte_alphabet() -> frozenset[str]:
    """The characters by which byte-level tokens write bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return frozenset(ByteLevel.alphabet())
