"""Text of others in HTML, and numbers for people."""

from __future__ import annotations

import html
import math
import unicodedata

_PICTURES = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
_JOINERS = "\u200c\u200d"  # are part of words in Arabic and in Indic scripts
# Control, format, surrogate, private and unassigned characters, and separators of lines and paragraphs.
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def escaped(text: str) -> str:
    """Text for HTML, between tags or in a quoted attribute; what cannot be seen becomes ⟨U+XXXX⟩."""
    return html.escape("".join(_plain(character) for character in text))


def shown_text(text: str, breaks: bool = False) -> str:
    """Text of a model as HTML whose control characters are visible, marked as signs. With `breaks` a line break is
    kept behind its sign. The text's direction does not reach beyond it."""
    parts = []
    for character in text:
        sign = _PICTURES.get(character, _plain(character))
        after = "\n" if breaks and character == "\n" else ""
        parts.append(html.escape(character) if sign == character else f'<i class="sign">{sign}</i>{after}')
    return f"<bdi>{''.join(parts)}</bdi>"


def token_text(text: str) -> str:
    """A single token as `shown_text` gives it, in a box, with visible spaces at its ends; an empty one is named."""
    if not text:
        return '<i class="sign">no text</i>'
    core = text.strip(" ")
    left = len(text) - len(text.lstrip(" "))
    right = len(text) - left - len(core)
    return f"<code>{_spaces(left)}{shown_text(core) if core else ''}{_spaces(right)}</code>"


def _spaces(count: int) -> str:
    return f'<i class="sign">{"␣" * count}</i>' if count else ""


def _plain(character: str) -> str:
    if unicodedata.category(character) in _UNSEEN and character not in _JOINERS:
        return f"⟨U+{ord(character):04X}⟩"
    return character


def number(value: float | None) -> str:
    """Two significant digits: 0.043, 7.7e-5, 269; "none" for None."""
    if value is None:
        return "none"
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 9.95e-4:  # what rounds to 0.0010
        digits = max(0, 1 - math.floor(math.log10(max(size, 1e-3))))
        return f"{value:.{digits}f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    return "none" if value is None else f"{value:.{digits}%}".replace("%", " %")


def change(value: float) -> str:
    """A relative change in percent with its sign and two significant digits: +0.24 %."""
    text = number(100 * value)
    return f"{text if value < 0 else f'+{text}'} %".replace("-", "−")


def bytes_text(count: int) -> str:
    """A number of bytes in MB or GB of powers of ten."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
