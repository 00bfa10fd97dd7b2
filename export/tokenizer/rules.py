"""Builds a checkpoint's tokenizer as transformers' AutoTokenizer would, with the tokenizers library alone.

    made = build_tokenizer(read_tokenizer_files(folder), config)
    made.backend.encode("def main():").ids     # what AutoTokenizer.from_pretrained(folder) would give

transformers 5 does not use tokenizer.json unchanged. It chooses a class, and those of GPT-2, CodeGen, GPT-NeoX, Qwen2
and Llama take only the vocabulary and the merges from it and build the rest themselves. Then it adds tokens from the
other files.
The rules here are those of transformers 5.24, in the order in which they are applied:

  class           AutoTokenizer.from_pretrained (models/auto/tokenization_auto.py): tokenizer_class of
                  tokenizer_config.json, else of config.json, else the class for the model_type
  added tokens    PreTrainedTokenizerBase._from_pretrained (tokenization_utils_base.py): tokenizer_config.json's
                  added_tokens_decoder alone if it has one; else special_tokens_map.json before tokenizer_config.json
                  for special tokens, and tokenizer.json's added_tokens before added_tokens.json
  special tokens  the class's defaults if no file names one; those that the vocabulary lacks are added after it
                  (TokenizersBackend.__init__, tokenization_utils_tokenizers.py)
  begin and end   tokenizer.json's post_processor alone: add_bos_token and add_eos_token are not read beside it
                  (_from_pretrained); GPTNeoXTokenizer adds none, whatever tokenizer.json says
  the pipeline    TokenizersBackend: tokenizer.json's own. GPT2Tokenizer, CodeGenTokenizer, GPTNeoXTokenizer,
                  Qwen2Tokenizer, LlamaTokenizer: the class's normalizer, pre_tokenizer and decoder, made with
                  add_prefix_space and legacy of tokenizer_config.json (models/gpt2, codegen, gpt_neox, qwen2, llama)

Checkpoints that these rules do not cover are refused by name: another class, code in the checkpoint,
split_special_tokens, and a token that the vocabulary lacks and two files state with different flags. One rule of
transformers is not followed: if the package mistral-common is installed and the folder has a tekken.json, transformers
reads that file instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.checkpoint.file_table import ADDED_TOKENS_FILE, SETTINGS_FILE, SPECIAL_TOKENS_FILE, TOKENIZER_FILE
from export.errors import ConfigError, named, shown
from export.families import registered_tokenizer
from export.files.reading import is_there, read_json
from export.tokenizer.from_gguf import gguf_tokenizer
from export.tokenizer.from_sentencepiece import MODEL_FILE, converted_text
from export.tokenizer.loading import make_backend, tokenizer_text
from export.tokenizer.pipelines import byte_level_pipeline, llama_pipeline, qwen_pipeline

if TYPE_CHECKING:
    import tokenizers

AS_IT_IS = "TokenizersBackend"  # transformers' class that uses tokenizer.json unchanged
GPT2, CODEGEN, LLAMA = "GPT2Tokenizer", "CodeGenTokenizer", "LlamaTokenizer"
GPT_NEOX, QWEN2 = "GPTNeoXTokenizer", "Qwen2Tokenizer"
_END_OF_TEXT = "<|endoftext|>"
# Special tokens of a class that apply if no file names one.
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    AS_IT_IS: {},
    GPT2: {"unk_token": _END_OF_TEXT, "bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT},
    CODEGEN: {"unk_token": _END_OF_TEXT, "bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT},
    GPT_NEOX: {
        "unk_token": _END_OF_TEXT, "bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT, "pad_token": "<|padding|>",
    },
    QWEN2: {"unk_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT, "pad_token": _END_OF_TEXT},
    LLAMA: {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
}  # fmt: skip
# Names of classes that mean TokenizersBackend; a trailing "Fast" is removed before the comparison.
_NAMES_OF_AS_IT_IS = (AS_IT_IS, "PythonBackend", "PreTrainedTokenizer")
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_ID_DIGITS = 10
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """A tokenizer's files as JSON values. `settings` is tokenizer_config.json; empty if there is no such file."""

    folder: Path
    text: str  # text of tokenizer.json
    settings: Mapping[str, Any]
    special_tokens: Mapping[str, Any]
    added_tokens: Mapping[str, Any]

    def refuse(self, name: str, problem: str) -> ConfigError:
        """The error for a problem in the file `name`."""
        return ConfigError(f"reading the tokenizer of {named(self.folder)}: {name} {problem}")


@dataclass(frozen=True, kw_only=True)
class BuiltTokenizer:
    """A tokenizer that was built from all files of a checkpoint. `special_tokens`: name -> text, such as bos_token ->
    <s>. `as_stored`: tokenizer.json alone describes the same tokenizer."""

    backend: tokenizers.Tokenizer
    tokenizer_class: str
    special_tokens: Mapping[str, str]
    as_stored: bool


def _text(folder: Path) -> str:
    """The text of tokenizer.json, or of one made of a SentencePiece model if there is none."""
    converted = None if is_there(folder / TOKENIZER_FILE) else converted_text(folder)
    return tokenizer_text(folder) if converted is None else converted


def read_tokenizer_files(folder: Path, gguf: Path | None = None) -> TokenizerFiles:
    """Read a tokenizer's files. Of a GGUF file the metadata are read where no tokenizer lies beside it. Raises
    CheckpointError if tokenizer.json is missing, and ConfigError for a settings file that is not a JSON object."""

    def optional(name: str, what: str) -> dict[str, Any]:
        return read_json(folder / name, what) if is_there(folder / name) else {}

    text: str | None = None
    made: dict[str, Any] = {}
    if gguf is not None and not any(is_there(folder / name) for name in (TOKENIZER_FILE, MODEL_FILE)):
        text, made = gguf_tokenizer(gguf)
    return TokenizerFiles(
        folder=folder,
        text=_text(folder) if text is None else text,
        settings={**optional(SETTINGS_FILE, "the tokenizer's settings"), **made},
        special_tokens=optional(SPECIAL_TOKENS_FILE, "the special tokens"),
        added_tokens=optional(ADDED_TOKENS_FILE, "the added tokens"),
    )


def build_tokenizer(files: TokenizerFiles, config: Mapping[str, Any]) -> BuiltTokenizer:
    """Build the tokenizer of a checkpoint from its files and its config.json. Raises CheckpointError and
    ConfigError."""
    where = f"loading the tokenizer of {named(files.folder)}"
    stored = make_backend(files.text, where)
    content: dict[str, Any] = json.loads(files.text)
    name = tokenizer_class(files, config)
    _refuse_settings(files, content)
    before, backend, changed = _added(stored), stored, False
    if name != AS_IT_IS:
        rebuilt = {**content, "added_tokens": [], "model": {**content["model"]}}
        changed = _rebuild(files, rebuilt, name)
        backend = make_backend(json.dumps(rebuilt), where)
    special = _add_tokens(files, content, name, backend)
    return BuiltTokenizer(
        backend=backend,
        tokenizer_class=name,
        special_tokens=special,
        as_stored=not changed and _added(backend) == before,
    )


def tokenizer_class(files: TokenizerFiles, config: Mapping[str, Any]) -> str:
    """The class that AutoTokenizer would choose. Raises ConfigError for a class that moeship cannot build."""
    asked = files.settings.get("tokenizer_class") or config.get("tokenizer_class")
    auto_map = files.settings.get("auto_map")
    remote = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    registered, holds = registered_tokenizer(config)
    if asked is None:
        if remote:
            raise files.refuse(
                SETTINGS_FILE, f"names code for its tokenizer ({shown(remote)}), which is never executed"
            )
        return registered or AS_IT_IS
    if not isinstance(asked, str):
        raise files.refuse(SETTINGS_FILE, f"holds tokenizer_class {shown(asked)}, expected the name of a class")
    if holds and registered and not remote:
        return registered
    name = asked.removesuffix("Fast")
    if not remote and name == LLAMA and '"ByteLevel"' in files.text:
        return AS_IT_IS
    if name in _NAMES_OF_AS_IT_IS or (not remote and registered == AS_IT_IS):
        return AS_IT_IS
    if name in _DEFAULTS:
        return name
    raise files.refuse(
        SETTINGS_FILE,
        f"holds tokenizer_class {shown(asked)}; transformers builds tokenizers of this class in a way of their own, "
        f"and moeship supports {GPT2}, {CODEGEN}, {GPT_NEOX}, {QWEN2}, {LLAMA} and PreTrainedTokenizerFast; where "
        f"{TOKENIZER_FILE} describes the whole tokenizer, set tokenizer_class to PreTrainedTokenizerFast",
    )


def _refuse_settings(files: TokenizerFiles, content: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings whose effect in transformers cannot be written in an engine's tokenizer.json."""
    settings = files.settings
    if settings.get("split_special_tokens"):
        raise files.refuse(SETTINGS_FILE, "sets split_special_tokens, which is not supported yet")
    if settings.get("init_inputs"):
        raise files.refuse(SETTINGS_FILE, "holds init_inputs, which are not supported yet")
    others = settings.get("fast_tokenizer_files")
    if others not in (None, [], [TOKENIZER_FILE]):
        raise files.refuse(
            SETTINGS_FILE,
            f"holds fast_tokenizer_files {shown(others)}, one for each version of transformers; keep "
            f"{TOKENIZER_FILE} alone and remove the key",
        )
    forced = settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    if settings.get("clean_up_tokenization_spaces") and (forced or not _is_bpe(content)):
        raise files.refuse(
            SETTINGS_FILE,
            "sets clean_up_tokenization_spaces, by which transformers removes spaces from what the model writes; "
            "moeship does not: set it to false",
        )


def _is_bpe(content: Mapping[str, Any]) -> bool:
    model = content.get("model")
    return isinstance(model, dict) and model.get("type", "BPE" if "merges" in model else None) == "BPE"


def _rebuild(files: TokenizerFiles, content: dict[str, Any], name: str) -> bool:
    """Replace the pipeline of tokenizer.json (normalizer, pre-tokenizer, decoder) by that of the class; returns whether
    that changes anything."""
    if not _is_bpe(content):
        raise files.refuse(
            TOKENIZER_FILE,
            f"holds no BPE model, which a {name} has; set tokenizer_class to PreTrainedTokenizerFast in "
            f"{SETTINGS_FILE}",
        )
    llama = name == LLAMA
    composed = name == GPT_NEOX  # whether text is brought to Unicode's form NFC
    own = {LLAMA: llama_pipeline, QWEN2: qwen_pipeline}.get(name, partial(byte_level_pipeline, composed=composed))
    pipeline = own(files.settings)
    adding = content.get("post_processor")
    if (
        composed and isinstance(adding, dict) and adding.get("type") != "ByteLevel"
    ):  # the class puts no token around text
        pipeline["post_processor"] = None
    model = {
        "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": llama, "byte_fallback": llama, "ignore_merges": False,
    }  # fmt: skip
    # Without merges the tokens do not depend on where the text is split.
    ignored = () if content["model"].get("merges") else ("use_regex",)
    changes = [_set(content, key, value, ignored) for key, value in pipeline.items()]
    return any([*changes, *[_set(content["model"], key, value) for key, value in model.items()]])


def _set(content: dict[str, Any], key: str, value: Any, ignored: Sequence[str] = ()) -> bool:  # noqa: ANN401 - JSON
    """Set a key to a value; returns whether that changes how text is encoded or decoded."""
    found = content.get(key)
    if isinstance(value, dict) and isinstance(found, dict):
        # trim_offsets changes only the offsets of tokens, which are not used. A byte-level decoder ignores its fields.
        plain = value if key == "decoder" and value["type"] == "ByteLevel" else ()
        compared = {"type", *value} - ({"trim_offsets", *ignored, *plain} - {"type"})
        if all(found.get(name) == value[name] for name in compared):
            return False
    elif not found and not value:
        return False
    content[key] = value
    return True


def _added(backend: tokenizers.Tokenizer) -> dict[int, str]:
    return {index: repr(token) for index, token in backend.get_added_tokens_decoder().items()}


def _add_tokens(
    files: TokenizerFiles, content: Mapping[str, Any], name: str, backend: tokenizers.Tokenizer
) -> dict[str, str]:
    """Add the tokens that the files state, as TokenizersBackend.__init__ does; returns the special tokens by name."""
    listed, special, extra = _stated_tokens(files, content, name)
    adding = [token for _, token in sorted(listed.items())]
    known = {str(token) for token in [*adding, *backend.get_added_tokens_decoder().values()]}
    named = {str(token) for token in special.values()}
    behind: dict[str, Any] = {}
    for stated in [*special.values(), *extra]:
        token = _added_token(stated, special=True) if isinstance(stated, str) else stated
        token.special = token.special or str(token) in named
        if str(token) not in known and repr(behind.setdefault(str(token), token)) != repr(token):
            # In transformers the result depends on whether the tokenizer was saved and loaded again.
            raise files.refuse(
                SETTINGS_FILE, f"states the token {shown(str(token), 60)} in two different ways; keep one of them"
            )
    for token in adding:
        token.special = token.special or str(token) in named
    backend.add_tokens([*adding, *behind.values()])
    return {key: str(token) for key, token in special.items()}


def _stated_tokens(
    files: TokenizerFiles, content: Mapping[str, Any], name: str
) -> tuple[dict[int, Any], dict[str, Any], list[Any]]:
    """Join the tokens of all files as `_from_pretrained` does; returns added tokens by id, special tokens by name, and
    special tokens without a name. Each is the library's AddedToken, or a string if a file states a special token so."""
    settings, listed, by_text = dict(files.settings), dict[int, Any](), dict[str, Any]()
    _rename_extra(settings, unless_there=not settings.get("extra_special_tokens"))
    own = _own_tokens(settings)
    before = settings.get("extra_special_tokens")
    if "added_tokens_decoder" not in settings:
        settings |= {key: value for key, value in files.special_tokens.items() if _names_tokens(key)}
        own |= _own_tokens(settings)
        more = settings.get("extra_special_tokens")
        if isinstance(before, list) and isinstance(more, list):
            settings["extra_special_tokens"] = [*before, *(token for token in more if token not in before)]
        # At this step transformers has not converted the objects of tokenizer_config.json to tokens yet.
        understood = {key: value for key, value in settings.items() if not _is_typed(value)}
        marked = {str(token) for key, token in _named(files, understood, {}, {}) if key in SPECIAL_NAMES}
        marked |= {str(token) for token in _extra_tokens(files, settings)}
        for text, index in files.added_tokens.items():
            if type(index) is not int:
                raise files.refuse(
                    ADDED_TOKENS_FILE, f"gives {shown(text, 60)} the id {shown(index, 40)}, expected a number"
                )
            by_text[text] = listed[index] = _added_token(text, special=text in marked, normalized=text not in marked)
        for token in content.get("added_tokens") or []:
            listed[token["id"]] = _listed(files, TOKENIZER_FILE, "added_tokens", token)
    else:
        stated = settings["added_tokens_decoder"]
        if not isinstance(stated, dict) or not all(
            len(index) <= _MAX_ID_DIGITS and index.isdecimal() for index in stated
        ):
            raise files.refuse(
                SETTINGS_FILE, f"holds added_tokens_decoder {shown(stated)}, expected tokens by their ids"
            )
        for index, token in stated.items():
            listed[int(index)] = _listed(files, SETTINGS_FILE, f"added_tokens_decoder[{index}]", token)
    _rename_extra(settings, unless_there="extra_special_tokens" not in settings)
    # A special token that is also an added token has the flags of the added token.
    by_text |= {str(token): token for token in listed.values()}
    named = _named(files, settings, own, _defaults(content, name))
    special = {key: by_text.get(str(token), token) if key in SPECIAL_NAMES else token for key, token in named}
    return listed, special, list(_extra_tokens(files, settings))


def _rename_extra(settings: dict[str, Any], *, unless_there: bool) -> None:
    """Rename additional_special_tokens, as transformers 4 called it, to extra_special_tokens."""
    if unless_there and "additional_special_tokens" in settings:
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")


def _own_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """Remove extra_special_tokens from the settings and return it, if it is an object: special tokens with names that
    the model defines. Else returns an empty one."""
    extra = settings.get("extra_special_tokens")
    return settings.pop("extra_special_tokens") if isinstance(extra, dict) else {}


def _names_tokens(key: str) -> bool:
    return key.endswith("_token") or key in ("extra_special_tokens", "additional_special_tokens")


def _defaults(content: Mapping[str, Any], name: str) -> dict[str, str]:
    """Special tokens that apply if no settings file names one: those of the class, and the pad token of
    tokenizer.json."""
    padding = content.get("padding") or {}
    pads = name not in (GPT2, CODEGEN, GPT_NEOX, QWEN2) and padding.get("pad_token")
    return {**_DEFAULTS[name], **({"pad_token": padding["pad_token"]} if pads else {})}


def _named(
    files: TokenizerFiles, settings: Mapping[str, Any], own: Mapping[str, Any], defaults: Mapping[str, str]
) -> Iterator[tuple[str, Any]]:
    """Yield special tokens with their names: the seven that every tokenizer may have, then those that the model
    defines."""
    for key in SPECIAL_NAMES:
        value = settings.get(key, defaults.get(key))
        if value is not None:
            yield key, _token(files, SETTINGS_FILE, named(key, 40), value)
    for key, value in settings.items():
        as_object = isinstance(value, dict) and (_is_typed(value) or key in files.special_tokens)
        if key.endswith("_token") and key not in SPECIAL_NAMES and (isinstance(value, str) or as_object):
            yield key, _token(files, SETTINGS_FILE, named(key, 40), value)
    for key, value in own.items():
        yield key, _token(files, SETTINGS_FILE, f"extra_special_tokens.{named(key, 40)}", value)


def _extra_tokens(files: TokenizerFiles, settings: Mapping[str, Any]) -> Iterator[Any]:
    """Yield special tokens without a name."""
    extra = settings.get("extra_special_tokens") or []
    if not isinstance(extra, list):
        raise files.refuse(SETTINGS_FILE, f"holds extra_special_tokens {shown(extra)}, expected a list of tokens")
    for value in extra:
        yield _token(files, SETTINGS_FILE, "extra_special_tokens", value)


def _listed(files: TokenizerFiles, name: str, key: str, value: Any) -> Any:  # noqa: ANN401 - JSON value
    """A token from a list of added tokens, which must be an object. Raises ConfigError for a string."""
    if isinstance(value, str):
        raise files.refuse(name, f"holds {key} {shown(value)}, expected an object with the token's content")
    return _token(files, name, key, value)


def _token(files: TokenizerFiles, name: str, key: str, value: Any) -> Any:  # noqa: ANN401 - JSON value
    """A token that a file states: its text, or the library's AddedToken if the file has an object."""
    if isinstance(value, str):
        return value
    flags = {flag: value[flag] for flag in _FLAGS if flag in value} if isinstance(value, dict) else {}
    text = value.get("content") if isinstance(value, dict) else None
    if not isinstance(text, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise files.refuse(name, f"holds {key} {shown(value)}, expected a token's text, or an object with its content")
    if key in files.special_tokens and not _is_typed(value):
        flags["special"] = True  # transformers 4 did not write this flag in special_tokens_map.json
    return _added_token(text, **flags)


def _added_token(text: str, **flags: Any) -> Any:  # noqa: ANN401 - the library's type, loaded where it is used
    import tokenizers

    return tokenizers.AddedToken(text, **flags)


def _is_typed(value: object) -> bool:
    """Whether this JSON object is an AddedToken that transformers wrote."""
    return isinstance(value, dict) and value.get("__type") == "AddedToken"
