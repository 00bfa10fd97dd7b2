"""The table of a checkpoint's files: which are copied, which are written in another form, and which are ignored.

The table covers every file that transformers 5 writes with `save_pretrained`, for a tokenizer and for a model, and the
files that repositories on the hub usually hold beside them. The writer of an engine, a merge, the TensorRT-LLM
checkpoint, the LLM API's package and the download from the hub all follow this table.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from export.errors import ConfigError, named, names
from export.files.reading import check_name, is_folder, is_regular, is_there

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
PROCESSOR_TEMPLATE_FILE = "chat_template.json"
INDEX_FILE = "model.safetensors.index.json"


class Fate(StrEnum):
    """What happens to a checkpoint's file when an engine, a merge or a package is made from the checkpoint."""

    TAKEN = "taken"  # copied as it is
    DERIVED = "derived"  # read, and written in the form that the output needs
    REFUSED = "refused"  # neither read nor copied nor downloaded


@dataclass(frozen=True)
class FileRule:
    """One row of the table. `pattern` is a path inside the checkpoint, with `*` for any characters; `reason` says what
    the file is for."""

    pattern: str
    fate: Fate
    reason: str


FILE_RULES = (
    # Refusals come first: the first rule that matches a file decides.
    FileRule("consolidated*.safetensors", Fate.REFUSED, "the weights again, in Mistral's own layout"),
    FileRule("*/*.safetensors", Fate.REFUSED, "weights of another model, in a folder of its own"),
    FileRule("*.py", Fate.REFUSED, "code, which is never executed"),
    FileRule("*.bin", Fate.REFUSED, "pickled, which can execute code"),
    FileRule("*.pt", Fate.REFUSED, "pickled, which can execute code"),
    FileRule("*.pth", Fate.REFUSED, "pickled, which can execute code"),
    FileRule("*.pkl", Fate.REFUSED, "pickled, which can execute code"),
    FileRule("*.ckpt", Fate.REFUSED, "pickled, which can execute code"),
    FileRule("*.gguf", Fate.REFUSED, "another format of the weights"),
    FileRule("*.h5", Fate.REFUSED, "another format of the weights"),
    FileRule("*.msgpack", Fate.REFUSED, "another format of the weights"),
    FileRule("params.json", Fate.REFUSED, "Mistral's own form of config.json"),
    FileRule("tekken.json", Fate.REFUSED, "Mistral's own form of the tokenizer"),
    FileRule(PROCESSOR_TEMPLATE_FILE, Fate.REFUSED, "the template of a processor, which tokenizers do not read"),
    FileRule("processor_config.json", Fate.REFUSED, "settings for images or sound"),
    FileRule("preprocessor_config.json", Fate.REFUSED, "settings for images or sound"),
    FileRule("trainer_state.json", Fate.REFUSED, "the log of a training"),
    FileRule("README.md", Fate.REFUSED, "for people to read"),
    # Facts of the model: they are written as engine.json, or as config.json and index of the written checkpoint.
    FileRule("config.json", Fate.DERIVED, "facts of the model"),
    FileRule(INDEX_FILE, Fate.DERIVED, "which shard holds which tensor"),
    FileRule("quantize_config.json", Fate.DERIVED, "how the weights are packed, where config.json does not say it"),
    FileRule("adapter_config.json", Fate.DERIVED, "says that the weights are an adapter's, which is refused"),
    FileRule("*.safetensors", Fate.DERIVED, "the weights"),
    FileRule(TOKENIZER_FILE, Fate.DERIVED, "the tokenizer, written with what the other files add to it"),
    # Settings: they are copied byte for byte.
    FileRule(GENERATION_FILE, Fate.TAKEN, "end, begin and pad tokens, and defaults of sampling"),
    FileRule(SETTINGS_FILE, Fate.TAKEN, "class, special and added tokens, and older chat templates"),
    FileRule(SPECIAL_TOKENS_FILE, Fate.TAKEN, "special tokens, as transformers 4 wrote them"),
    FileRule(ADDED_TOKENS_FILE, Fate.TAKEN, "added tokens, as transformers 4 wrote them"),
    FileRule("vocab.json", Fate.TAKEN, "the vocabulary for tokenizers in Python"),
    FileRule("merges.txt", Fate.TAKEN, "the merges for tokenizers in Python"),
    FileRule("vocab.txt", Fate.TAKEN, "the vocabulary for tokenizers in Python"),
    FileRule("tokenizer.model", Fate.TAKEN, "the vocabulary for SentencePiece"),
    FileRule(TEMPLATE_FILE, Fate.TAKEN, "the chat template"),
    FileRule(f"{TEMPLATE_FOLDER}/*.jinja", Fate.TAKEN, "chat templates with a name"),
)

# Patterns of the files that a download from the hub fetches, and of those that it skips although a pattern matches.
DOWNLOAD_PATTERNS = tuple(rule.pattern for rule in FILE_RULES if rule.fate is not Fate.REFUSED)
DOWNLOAD_EXCEPTIONS = tuple(rule.pattern for rule in FILE_RULES if rule.fate is Fate.REFUSED)


def rule_of(name: str) -> FileRule | None:
    """The rule for a file, given its path inside the checkpoint with forward slashes; None if there is no rule."""
    return next((rule for rule in FILE_RULES if fnmatch.fnmatchcase(name, rule.pattern)), None)


def is_text_file(name: str) -> bool:
    """Whether a file, given its path inside the checkpoint, is the tokenizer or a settings file that is copied."""
    rule = rule_of(name)
    return rule is not None and (rule.fate is Fate.TAKEN or rule.pattern == TOKENIZER_FILE)


def text_files(folder: Path) -> list[str]:
    """The tokenizer and settings files of a folder that are copied with the model, as paths inside the folder.

    Raises ConfigError for a name that is not UTF-8, and for anything of such a name that is not a regular file, such as
    a broken link: the output would silently lack the file.
    """
    patterns = [rule.pattern for rule in FILE_RULES if is_text_file(rule.pattern)]
    # `glob` finds a broken link by a pattern with `*`, but not by a plain name.
    found = [sorted(folder.glob(pattern)) if "*" in pattern else [folder / pattern] for pattern in patterns]
    paths = [path for some in found for path in some if is_there(path)]
    templates = folder / TEMPLATE_FOLDER
    wrong = [path for path in paths if not is_regular(path)]
    if wrong or (is_there(templates) and not is_folder(templates)):
        raise ConfigError(
            f"reading the settings of {named(folder)}: {names(path.name for path in wrong or [templates])} there is no "
            f"{'regular file' if wrong else 'folder'}, or a link to nothing; put the right one there, or remove it"
        )
    for path in paths:
        check_name(path, f"reading the settings of {named(folder)}")
    return [path.relative_to(folder).as_posix() for path in paths]
