"""Reads the facts that several files of a checkpoint can state, with the precedence that transformers gives the files.

    settings = read_settings(checkpoint.folder, checkpoint.config)
    settings.ids.eos            # (2, 32000): the ids that end a text
    settings.facts              # what goes into engine.json
    settings.tokenizer          # encodes text to the same token ids as AutoTokenizer's

Which file decides, and the source in transformers 5.24:

  end, begin, pad ids   generation_config.json if it exists, else config.json (GenerationMixin.adjust_generation_fn in
                        generation/utils.py, GenerationConfig.from_model_config). Unlike transformers, an id that this
                        file does not name is taken from the other file, and at last an end id from the tokenizer:
                        without an end id `generate` would always run to its limit, which no server wants.
  tokenizer             `export.tokenizer.rules`
  chat templates        chat_template.jinja and additional_chat_templates/*.jinja; if there are none, chat_template of
                        tokenizer_config.json, a string or a list of named strings
                        (PreTrainedTokenizerBase._from_pretrained in tokenization_utils_base.py). chat_template.json
                        belongs to a processor and is not read.

Engines and packages do not read these files again: the facts are in engine.json, the tokenizer in tokenizer.json.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.checkpoint.file_table import (
    GENERATION_FILE,
    PROCESSOR_TEMPLATE_FILE,
    SETTINGS_FILE,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    TOKENIZER_FILE,
    text_files,
)
from export.checkpoint.token_ids import CONFIG_FILE, TokenIds, read_token_ids
from export.errors import ConfigError, named, names, shown
from export.files.reading import is_regular, is_there, read_text
from export.tokenizer.loading import Tokenizer, tokenizer_of
from export.tokenizer.rules import BuiltTokenizer, TokenizerFiles, build_tokenizer, read_tokenizer_files

logger = logging.getLogger(__name__)

DEFAULT_TEMPLATE = "default"
MAX_TEMPLATE_BYTES = 1 << 20  # most bytes of a chat template; the longest on the hub have some 20,000
MAX_TOKENS = 1 << 53  # a model_max_length from here on means no limit; transformers writes 10**30
_PROBE = "a"


@dataclass(frozen=True, kw_only=True)
class AddedTokenRecord:
    """A token that is added to the model's vocabulary; a special one is left out of decoded text."""

    id: int
    content: str
    special: bool


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """The facts about the tokenizer that engine.json holds.

    `special_tokens`: name -> text, such as bos_token -> <s>. `begins_with` and `ends_with`: the ids that the tokenizer
    adds before and after every prompt. `model_max_length`: number of tokens; None if the checkpoint sets no limit.
    `chat_templates`: name -> Jinja text; the main one is named "default".
    """

    tokenizer_class: str  # transformers' class whose rules the tokenizer was built by
    bos_token_id: int | None
    pad_token_id: int | None
    special_tokens: Mapping[str, str]
    added_tokens: tuple[AddedTokenRecord, ...]
    begins_with: tuple[int, ...]
    ends_with: tuple[int, ...]
    model_max_length: int | None
    chat_templates: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A checkpoint's settings, joined from all of its files. `files` are the paths inside the folder of the files that
    are copied with the model. `tokenizer_json` is the text of a tokenizer.json that needs no other file; None if the
    checkpoint's own tokenizer.json is one."""

    folder: Path
    files: tuple[str, ...]
    ids: TokenIds
    facts: TokenizerFacts
    tokenizer: Tokenizer
    tokenizer_json: str | None

    def sizes(self) -> dict[str, int]:
        """Path inside the folder -> bytes, for each file that `write` writes."""
        sizes = {name: (self.folder / name).stat().st_size for name in self.files}
        return sizes if self.tokenizer_json is None else {**sizes, TOKENIZER_FILE: len(self.tokenizer_json.encode())}

    def write(self, folder: Path, place: Callable[[Path, Path], object] = shutil.copyfile) -> None:
        """Write tokenizer.json and copy the settings files into `folder`; `place(source, target)` makes a copy.

        Raises ConfigError if a file is not regular any more: copying a device would never end.
        """
        gone = [name for name in self.files if not is_regular(self.folder / name)]
        if gone:
            raise ConfigError(
                f"copying the settings of {named(self.folder)}: {names(gone)} changed into something else than regular "
                "files since they were read; put the files back and start again"
            )
        for name in self.files:
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            if name == TOKENIZER_FILE and self.tokenizer_json is not None:
                target.write_text(self.tokenizer_json, encoding="utf-8")
            else:
                place(self.folder / name, target)
        if self.tokenizer_json is not None and TOKENIZER_FILE not in self.files:  # made of another file
            (folder / TOKENIZER_FILE).write_text(self.tokenizer_json, encoding="utf-8")


def read_settings(folder: Path, config: Mapping[str, Any], gguf: Path | None = None) -> Settings:
    """Read all settings of the checkpoint in `folder`; `config` is its config.json, and `gguf` the GGUF file that it is
    made of. Raises CheckpointError and
    ConfigError."""
    travelling = text_files(folder)
    files = read_tokenizer_files(folder, gguf)
    built = build_tokenizer(files, config)
    tokenizer = tokenizer_of(built.backend, f"loading the tokenizer of {named(folder)}")
    ids = read_token_ids(folder, config)
    if not ids.eos and "eos_token" in built.special_tokens:
        end = built.backend.token_to_id(built.special_tokens["eos_token"])
        ids = TokenIds(eos=() if end is None else (end,), bos=ids.bos, pad=ids.pad)
    facts = _facts(files, built, ids)
    _warn(files, facts)
    is_stored = built.as_stored and TOKENIZER_FILE in travelling
    return Settings(
        folder=folder,
        files=tuple(travelling),
        ids=ids,
        facts=facts,
        tokenizer=tokenizer,
        tokenizer_json=None if is_stored else built.backend.to_str(pretty=True),
    )


def check_token_ids(settings: Settings, vocab_size: int) -> None:
    """Raise ConfigError for an end token that could never be generated, and log a warning if there is no end token."""
    where, size = f"looking for the end token of {named(settings.folder)}", settings.tokenizer.size
    outside = [item for item in settings.ids.eos if item >= vocab_size]
    if outside:
        raise ConfigError(
            f"{where}: eos_token_id holds {outside[0]}, expected token ids below {vocab_size}; correct it in "
            f"{GENERATION_FILE}, or in {CONFIG_FILE} where there is no {GENERATION_FILE}"
        )
    masked = [item for item in settings.ids.eos if item >= size]
    if masked:
        raise ConfigError(
            f"{where}: eos_token_id holds {masked[0]}, and the tokenizer has ids below {size} alone; ids that stand "
            f"for no text are never chosen, so no answer could end: correct it in {GENERATION_FILE} or {CONFIG_FILE}, "
            "or add the token to the tokenizer"
        )
    if not settings.ids.eos:
        logger.warning(
            "%s: no file names one, so every answer runs to its limit of tokens; add eos_token_id to %s",
            where, GENERATION_FILE,
        )  # fmt: skip


def _facts(files: TokenizerFiles, built: BuiltTokenizer, ids: TokenIds) -> TokenizerFacts:
    longest = files.settings.get("model_max_length")
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not 1 <= longest < MAX_TOKENS:
        longest = None
    begins, ends = _surroundings(built)
    return TokenizerFacts(
        tokenizer_class=built.tokenizer_class,
        bos_token_id=ids.bos,
        pad_token_id=ids.pad,
        special_tokens=built.special_tokens,
        added_tokens=tuple(
            AddedTokenRecord(id=index, content=token.content, special=token.special)
            for index, token in sorted(built.backend.get_added_tokens_decoder().items())
        ),
        begins_with=begins,
        ends_with=ends,
        model_max_length=None if longest is None else int(longest),
        chat_templates=read_chat_templates(files.folder, files.settings),
    )


def _surroundings(built: BuiltTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor adds before a text, and those that it adds after it."""
    plain = built.backend.encode(_PROBE, add_special_tokens=False).ids
    whole = built.backend.encode(_PROBE, add_special_tokens=True)
    added = len(whole.ids) - len(plain)
    before = next((place for place, marked in enumerate(whole.special_tokens_mask) if not marked), added)
    before = min(before, added)
    return tuple(whole.ids[:before]), tuple(whole.ids[before + len(plain) :])


def read_chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Read the chat templates: name -> Jinja text. `settings` is tokenizer_config.json. Raises ConfigError."""
    paths = {DEFAULT_TEMPLATE: folder / TEMPLATE_FILE}
    paths |= {path.name.removesuffix(".jinja"): path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    found = {
        name: read_text(path, "the chat template", most=MAX_TEMPLATE_BYTES)
        for name, path in paths.items()
        if is_there(path)
    }
    if found:
        return found
    stated = settings.get("chat_template")
    if stated is None or stated == []:
        return {}
    if isinstance(stated, str):
        return {DEFAULT_TEMPLATE: stated}
    texts: Any = stated.items() if isinstance(stated, dict) else ()
    if isinstance(stated, list):
        texts = [
            (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None) for item in stated
        ]
    if not texts or not all(isinstance(word, str) for pair in texts for word in pair):
        raise ConfigError(
            f"reading the chat template of {named(folder)}: chat_template in {SETTINGS_FILE} is {shown(stated)}, "
            "expected a text, or a list of objects with name and template"
        )
    return dict(texts)


def _warn(files: TokenizerFiles, facts: TokenizerFacts) -> None:
    """Log a warning for each setting that has no effect although its author may expect one."""
    for key, adds in (("add_bos_token", facts.begins_with), ("add_eos_token", facts.ends_with)):
        asked = files.settings.get(key)
        if isinstance(asked, bool) and asked != bool(adds):
            logger.warning(
                "%s of %s is %s, and %s puts %s there: transformers 5 follows %s, and so does this engine",
                key, SETTINGS_FILE, asked, TOKENIZER_FILE, list(adds) or "nothing", TOKENIZER_FILE,
            )  # fmt: skip
    if not facts.chat_templates and is_there(files.folder / PROCESSOR_TEMPLATE_FILE):
        logger.warning(
            "%s holds a chat template in %s alone, which belongs to a processor; tokenizers do not read it. Write it "
            "to %s for a model of text", named(files.folder), PROCESSOR_TEMPLATE_FILE, TEMPLATE_FILE,
        )  # fmt: skip
