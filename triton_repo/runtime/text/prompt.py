"""A prompt's text in, its token ids out, or what is wrong with its length. What is refused costs little at any length.

A text that is too long is refused by its bytes where the tokenizer's longest token bounds them
(`export/tokenizer/token_lengths.py`), and by the tokens of its beginning elsewhere: beginnings are encoded,
each half longer than the one before, until one holds clearly more tokens than may be. Encoding a word costs more than
its length, so that the whole of a long text would cost far more than its beginning.
"""

from __future__ import annotations

from export.tokenizer.loading import Tokenizer

# Where no token bounds the bytes, since a tokenizer drops or fuses text, no more are read.
MOST_BYTES = 1 << 24
_FIRST_LETTERS, _LETTERS_PER_TOKEN = 1024, 8  # of the first beginning
# What follows a beginning changes its last word's tokens alone, far fewer than a sixteenth of what may be and these.
_SLACK = 256


class PromptTooLongError(ValueError):
    """Says of a prompt what was found and what is possible."""


def most_bytes(tokenizer: Tokenizer, most_tokens: int) -> int:
    """Bytes of UTF-8 that no prompt of as many tokens exceeds."""
    longest = tokenizer.most_bytes_per_token
    return MOST_BYTES if longest is None else longest * most_tokens


def check_bytes(found: int, most: int) -> None:
    """Raises PromptTooLongError for more bytes than a prompt can have."""
    if found > most:
        raise PromptTooLongError(
            f"found a prompt of {found} bytes, expected at most {most}, since no longer one fits; shorten it"
        )


def encode_prompt(tokenizer: Tokenizer, text: str, most_tokens: int) -> list[int]:
    """The ids of a prompt, as the tokenizer gives them for the whole text. There may be a few more than `most_tokens`.

    Raises PromptTooLongError where there would be many more.
    """
    check_bytes(len(text.encode()), most_bytes(tokenizer, most_tokens))
    letters = _FIRST_LETTERS + _LETTERS_PER_TOKEN * most_tokens
    while letters < len(text):
        count = len(tokenizer.encode_prompt(text[:letters]))
        if count > most_tokens + most_tokens // 16 + _SLACK:
            raise PromptTooLongError(
                f"found a prompt of {len(text)} characters, whose first {letters} are {count} tokens, expected at most "
                f"{most_tokens} tokens; shorten it"
            )
        letters += letters // 2
    return tokenizer.encode_prompt(text)
