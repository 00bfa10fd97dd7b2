"""The text that an engine is measured on: moeship's own held-out text, or files that the user names.

The own text is in `texts/`, one file a kind: prose, code, markup, other languages, numbers. All of it was written for
this purpose, so no model that is older than this file was trained on it. Each file has NUM_SECTIONS sections, divided
by form feeds. The sections are taken in turns, so that each quarter of the text has a section of every kind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from export.errors import ConfigError, named
from export.files.reading import is_regular, is_there

OWN_TEXT = "moeship's held-out text"
KINDS = (
    "prose-kitchen", "python", "german", "markdown", "numbers", "prose-harbour", "c", "russian", "json", "french",
    "prose-letters", "javascript", "chinese", "html", "sql", "spanish", "prose-science", "latex", "japanese", "shell",
    "arabic", "yaml", "python-tools", "hindi", "tables",
)  # fmt: skip
NUM_SECTIONS = 4
_DIVIDER = "\n\f\n"


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """A text and the names of what it consists of."""

    names: tuple[str, ...]
    content: str

    @property
    def sha256(self) -> str:
        """Digest of the text in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Names, number of bytes in UTF-8, and digest."""
        return {"names": list(self.names), "bytes": len(self.content.encode()), "sha256": self.sha256}


def own_text() -> EvaluationText:
    """Moeship's held-out text: some 25 kB of UTF-8, whose kinds alternate."""
    folder = resources.files("trt_build.comparison") / "texts"
    files = [(folder / f"{kind}.txt").read_text(encoding="utf-8").removesuffix("\n").split(_DIVIDER) for kind in KINDS]
    sections = [sections[turn] for turn in range(NUM_SECTIONS) for sections in files]
    return EvaluationText(names=(OWN_TEXT,), content="\n\n".join(sections) + "\n")


def read_texts(paths: Sequence[Path]) -> EvaluationText:
    """The text of all `paths`, joined, or moeship's own if `paths` is empty. Raises ConfigError for a file that cannot
    be read as UTF-8, and for one without text."""
    if not paths:
        return own_text()
    return EvaluationText(names=tuple(map(str, paths)), content="\n\n".join(map(_read_text, paths)))


def _read_text(path: Path) -> str:
    doing = f"reading the text to measure on, {named(path)}"
    if is_there(path) and not is_regular(path):
        raise ConfigError(f"{doing}: it is a folder, a pipe or a device, or a link to nothing; pass text files")
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{doing}: it cannot be read ({error.strerror}); pass text files") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{doing}: byte {error.start} is not UTF-8; pass text files in UTF-8") from error
    if not content.strip():
        raise ConfigError(f"{doing}: it holds no text; leave it out")
    return content
