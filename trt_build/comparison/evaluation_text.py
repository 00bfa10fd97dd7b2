"""The evaluation text that is used when the user names none: help topics and modules of Python's standard library."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from export.errors import ConfigError

_TOPICS = ("assignment", "context-managers", "formatstrings", "operator-summary", "typesseq")
_MODULES = ("textwrap", "queue", "shlex", "fractions", "calendar")


def standard_text() -> str:
    """English text and Python code, alternating: a few tens of kilobytes in total."""
    from pydoc_data.topics import topics

    pieces = []
    for topic, module in zip(_TOPICS, _MODULES, strict=True):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ConfigError(f"reading the standard text: this Python lacks the module {module}; pass --text FILE")
        pieces += [topics[topic], Path(spec.origin).read_text(encoding="utf-8")]
    return "\n\n".join(pieces)


def read_texts(paths: Sequence[Path]) -> str:
    """The text of all `paths`, joined, or the standard text if `paths` is empty. Raises ConfigError for a file that
    cannot be read as UTF-8."""
    if not paths:
        return standard_text()
    try:
        return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"reading the text to measure on: {error}; pass UTF-8 text files") from error
