"""Encodes a prompt, or says what is wrong with its length. To refuse a prompt costs little, however long it is.

If the tokenizer has a longest token (`export/tokenizer/token_lengths.py`), a text is refused by its number of bytes.
Otherwise beginnings of the text are encoded, each longer by half than the one before, until one has clearly more tokens
than are allowed. Encoding time grows faster than the length of a word, so encoding all of a long text would cost far
more than encoding its beginning.
"""

from __future__ import annotations

from export.tokenizer.loading import Tokenizer

# The limit for tokenizers without a longest token, which drop or fuse text.
MOST_BYTES = 1 << 24
_FIRST_LETTERS, _LETTERS_PER_TOKEN = 1024, 8  # length of the first beginning
# The rest of the text can change only the tokens of the last word of a beginning. That is far fewer tokens than a
# sixteenth of the limit plus this number.
_SLACK = 256


class PromptTooLongError(ValueError):
    """A prompt is too long. The text says what was found and what is allowed."""


def most_bytes(tokenizer: Tokenizer, most_tokens: int) -> int:
    """The most bytes of UTF-8 that a prompt of `most_tokens` tokens can have."""
    longest = tokenizer.most_bytes_per_token
    return MOST_BYTES if longest is None else longest * most_tokens


def check_bytes(found: int, most: int) -> None:
    """Raise PromptTooLongError for more bytes than a prompt can have."""
    if found > most:
        raise PromptTooLongError(
            f"found a prompt of {found} bytes, expected at most {most}, since a longer one cannot fit; shorten it"
        )


def encode_prompt(tokenizer: Tokenizer, text: str, most_tokens: int) -> list[int]:
    """The token ids of a prompt. There may be a few more than `most_tokens`; if there would be many more, it raises
    PromptTooLongError.
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
