"""What the gateway knows of a model's texts: its tokenizer, chat template and context, from the package's own files.

The files are those of an engine (engine.json, tokenizer.json), or of any checkpoint's folder. Nothing of a model is
loaded or computed.
"""

from __future__ import annotations

import asyncio
import codecs
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from clients.gateway.errors import ApiError, too_long
from export.checkpoint.token_ids import CONFIG_FILE
from export.errors import ConfigError, named
from export.files.reading import is_regular, read_json, read_text
from export.tokenizer.loading import Tokenizer, load_tokenizer
from export.tokenizer.settings import DEFAULT_TEMPLATE, MAX_TEMPLATE_BYTES, read_settings
from triton_repo.contracts.ensemble import TOKEN_ENGINE
from triton_repo.contracts.model_parameters import ENGINE_FOLDER

ENGINE_FILE = "engine.json"
INPUT_IDS = "input_ids"  # the model's input for a prompt of token ids
_VERSION = re.compile("[1-9][0-9]{0,17}")
_SHORT = 4096  # characters that are encoded at once: they take a few milliseconds at most
MOST_TOKENS = 1 << 18  # of a prompt for a model whose context is not known
CHECKPOINT_FOLDER = "checkpoint"  # of a model for TensorRT-LLM's LLM API, within its version's folder


@dataclass(frozen=True, kw_only=True)
class ModelTexts:
    """A model's tokenizer and the facts beside it. `context`: tokens of prompt and answer together; None if unknown."""

    tokenizer: Tokenizer
    template: str | None = None  # Jinja text of the chat template
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    context: int | None = None

    async def encode(self, text: str, *, adds: bool) -> list[int]:
        """The token ids of a text, with the tokens that the tokenizer adds to a prompt where it `adds` them."""
        if len(text) <= _SHORT:
            return self.tokenizer.encode_prompt(text) if adds else self.tokenizer.encode(text)
        return await asyncio.to_thread(self._encode_long, text, adds)

    def _encode_long(self, text: str, adds: bool) -> list[int]:
        # The library lets go of Python's lock for batches alone: a megabyte takes a second.
        (encoding,) = self.tokenizer.backend.encode_batch([text], add_special_tokens=adds)
        ids = list(encoding.ids)
        doubled = adds and len(ids) > 1 and encoding.special_tokens_mask[0] and ids[0] == ids[1]
        return ids[1:] if doubled else ids

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        decode = self.tokenizer.backend.decode_batch
        (text,) = await asyncio.to_thread(decode, [list(token_ids)], skip_special_tokens=False)
        return str(text)

    def check_length(self, field: str, *, tokens: int = 0, size: int = 0) -> None:
        """Raise ApiError for a prompt of so many tokens, or of so many bytes, that cannot fit the context, before
        anything is computed for it."""
        most = self.context - 1 if self.context is not None else MOST_TOKENS
        if tokens > most:
            raise self._too_long(field, f"{tokens} tokens", most)
        longest = self.tokenizer.most_bytes_per_token  # None where the tokenizer drops or fuses text
        if longest is not None and size > longest * most:
            raise self._too_long(field, f"{size} bytes", longest * most)

    def _too_long(self, field: str, found: str, most: int) -> ApiError:
        words = f"{field}: found a prompt of {found}, expected at most {most}; shorten it"
        return too_long(field, words, self.context)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for in a text; for a special token those of its name. An id without a token
        has none."""
        name = self.tokenizer.backend.id_to_token(token)
        if name is None:
            return b""
        if token in self._added:
            return str(name).encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF_LETTER[letter] for letter in name if letter in _BYTE_OF_LETTER)
        if token in self.tokenizer.byte_ids:
            return bytes([int(name[3:5], 16)])
        return str(name).replace("▁", " ").encode()

    @cached_property
    def adds_tokens(self) -> bool:
        """Whether the tokenizer puts tokens around a prompt, as Llama's puts a begin token before it."""
        return self.tokenizer.encode_prompt("a") != self.tokenizer.encode("a")

    @cached_property
    def special(self) -> frozenset[int]:
        """The special tokens, which an answer's text does not show."""
        return frozenset(self.signs)

    @cached_property
    def signs(self) -> Mapping[int, str]:
        """Id of each special token -> its text."""
        added = self.tokenizer.backend.get_added_tokens_decoder()
        return {token: one.content for token, one in added.items() if one.special}

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.tokenizer.backend.get_added_tokens_decoder())

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in repr(self.tokenizer.backend.decoder.__getstate__().decode())


def _letters() -> dict[str, int]:
    """Byte-level letter to byte: printable bytes of Latin-1 stand for themselves, the others for letters from 256 on
    (bytes_to_unicode of OpenAI's GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_LETTER = _letters()


def find_folder(repository: Path, model: str) -> Path | None:
    """The folder in a model repository that has the tokenizer of a model, of its newest version, which Triton serves;
    None if there is none. Of an ensemble it is the engine's."""
    places = [(model, ENGINE_FOLDER), (model, CHECKPOINT_FOLDER), (TOKEN_ENGINE, ENGINE_FOLDER)]
    found = (version / name for owner, name in places for version in _versions(repository / owner))
    return next((path for path in found if path.is_dir()), None)


def _versions(folder: Path) -> list[Path]:
    """The folders of a model's versions, the newest first. Triton passes over other names, and those that begin with 0
    (docs/user_guide/model_repository.md)."""
    try:
        found = [path for path in folder.iterdir() if _VERSION.fullmatch(path.name)]
    except OSError:
        return []
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def state_of(folder: Path, chat_template: Path | None = None) -> tuple[Any, ...]:
    """What changes where files that `read_texts` reads are replaced: each one's name, inode, size and time."""
    try:
        files = sorted(folder.iterdir())
    except OSError:
        files = []
    return (folder, *map(_file_state, [*files, *([chat_template] if chat_template else [])]))


def _file_state(path: Path) -> tuple[object, ...]:
    try:
        found = path.stat()
    except OSError:
        return (path.name,)
    return path.name, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_texts(folder: Path, chat_template: Path | None = None) -> ModelTexts:
    """Read an engine's folder, or a checkpoint's. `chat_template`: a file with the template to use. Raises
    CheckpointError and ConfigError."""
    template = None if chat_template is None else read_template(chat_template)
    if is_regular(folder / ENGINE_FILE):
        return _of_engine(folder, template)
    config = read_json(folder / CONFIG_FILE, "the checkpoint's config") if is_regular(folder / CONFIG_FILE) else {}
    settings = read_settings(folder, config)
    return ModelTexts(
        tokenizer=settings.tokenizer,
        template=template or settings.facts.chat_templates.get(DEFAULT_TEMPLATE),
        special_tokens=settings.facts.special_tokens,
    )


def read_template(path: Path) -> str:
    """The text of a file with a chat template. Raises ConfigError."""
    return read_text(path, "the chat template", most=MAX_TEMPLATE_BYTES)


def _of_engine(folder: Path, template: str | None) -> ModelTexts:
    manifest = read_json(folder / ENGINE_FILE, "the engine's manifest")
    context = manifest.get("max_sequence")
    facts: Any = manifest.get("tokenizer") or {}
    templates, special = (facts.get(key, {}) for key in ("chat_templates", "special_tokens"))
    texts = (
        [*templates.values(), *special.values()] if isinstance(templates, dict) and isinstance(special, dict) else [0]
    )
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            f"reading the tokenizer of {named(folder)}: {ENGINE_FILE} holds chat templates or special tokens that are "
            "no texts; build the engine again"
        )
    return ModelTexts(
        tokenizer=load_tokenizer(folder),
        template=template or templates.get(DEFAULT_TEMPLATE),
        special_tokens=special,
        context=context if type(context) is int else None,
    )


class Marks:
    """Puts special tokens back into the text of one answer, which does not show them. `signs`: id -> text of each.

    The text of a token may come in a later piece than the token. So it is counted how much text belongs to the tokens
    before each mark. White space is not counted, since a server may leave it out at an answer's begin.
    """

    def __init__(self, signs: Mapping[int, str], texts: ModelTexts) -> None:
        self._signs, self._texts = signs, texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_decoded = self._num_given = 0  # characters that are no white space: of tokens, of the text
        # How many of them stand before each mark whose place did not come yet, and the mark.
        self._waiting: deque[tuple[int, str]] = deque()

    def put_back(self, text: str, token_ids: Sequence[int]) -> str:
        """The text that a piece of the answer adds, with the signs where their tokens stood."""
        for token in token_ids:
            is_special = token in self._texts.special
            decoded = self._decoder.decode(b"" if is_special else self._texts.token_bytes(token), final=is_special)
            self._num_decoded += _size(decoded)
            if token in self._signs:
                self._waiting.append((self._num_decoded, self._signs[token]))
        given, at = list[str](), 0
        while self._waiting:
            num_before, mark = self._waiting[0]
            place = _place(text, at, num_before - self._num_given)
            if place is None:
                break
            given += (text[at:place], mark)
            at, self._num_given = place, num_before
            self._waiting.popleft()
        rest = text[at:]
        self._num_given += _size(rest)
        return "".join((*given, rest))


def _size(text: str) -> int:
    return sum(not letter.isspace() for letter in text)


def _place(text: str, begin: int, count: int) -> int | None:
    """Where `count` characters that are no white space have gone by from `begin` on; None if the text has fewer."""
    if count <= 0:
        return begin
    for place in range(begin, len(text)):
        count -= not text[place].isspace()
        if not count:
            return place + 1
    return None
