"""The text that GPTQ is calibrated on unless the user names one, and how a text becomes windows of tokens.

The own text is in `texts/`, one file a kind: prose, dialogue, code, data, science, law and news, and some thirty
languages. All of it was written for this purpose, apart from the text that `moeship verify` measures on. It is taken in
sections, of each kind in turn, so that a part of the text has something of every kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from export.errors import ConfigError

OWN_TEXT = "moeship's calibration text"
WINDOW_TOKENS = 512
DEFAULT_TOKENS = 16384
_SECTION = 500  # characters; a section ends at the next empty line


def own_text() -> str:
    """Moeship's calibration text: some 26 kB of UTF-8."""
    folder = resources.files("export.calibration") / "texts"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".txt")), key=lambda file: file.name)
    kinds = [_sections(file.read_text(encoding="utf-8")) for file in files]
    most = max(map(len, kinds))
    return "\n\n".join(kind[turn] for turn in range(most) for kind in kinds if turn < len(kind)) + "\n"


def _sections(text: str) -> list[str]:
    found: list[str] = [""]
    for paragraph in text.strip("\n").split("\n\n"):
        if len(found[-1]) >= _SECTION:
            found.append("")
        found[-1] += ("\n\n" if found[-1] else "") + paragraph
    return found


def windows_of(token_ids: Sequence[int], num_tokens: int, longest: int, names: str) -> list[Sequence[int]]:
    """The first `num_tokens` of a text in windows of WINDOW_TOKENS, or of `longest` where a model takes fewer; what is
    left at the end is not used. Raises ConfigError for a text that does not fill a window; `names` says which text."""
    width = min(WINDOW_TOKENS, longest)
    if num_tokens < width:
        raise ConfigError(
            f"calibrating on {names}: asked for {num_tokens} tokens, expected at least {width}, a window of text; ask "
            "for more tokens"
        )
    usable = min(len(token_ids), num_tokens)
    if usable < width:
        raise ConfigError(
            f"calibrating on {names}: it has {usable} tokens, expected at least {width}, a window of text; pass a "
            "longer text, or build with --method search, which needs none"
        )
    return [token_ids[start : start + width] for start in range(0, usable - width + 1, width)]
