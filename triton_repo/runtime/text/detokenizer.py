"""Decodes token ids one by one, and gives text out as soon as later tokens cannot change it.

    detokenizer = Detokenizer(tokenizer, last_text_token(tokenizer, prompt_ids))
    pieces = [detokenizer.push(token) for token in ids] + [detokenizer.flush()]
    assert tokenizer.decode(prompt_ids) + "".join(pieces) == tokenizer.decode(prompt_ids + ids)

A token may end in the middle of a UTF-8 character, which then decodes to U+FFFD. So U+FFFD at the end of a text are
kept back until the next token decides them, or until `flush`. Tokens that are single bytes (<0x0A>, the byte fallback
of SentencePiece) are kept back until another kind of token follows, since one wrong byte changes the decoding of all
bytes in a row. Pieces hold whole code points; an emoji of several code points may arrive in several pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

from export.tokenizer.loading import Tokenizer

_UNDECIDED = "\ufffd"
_TRIM_TOKENS = 16  # limits how many tokens are decoded again at each step


class Detokenizer:
    """Decodes a window of the latest tokens, so that the cost of a step does not grow with the text.

    The window always begins at a character's start, with tokens whose text was given out. So decoders that strip the
    space of the first token strip only known text. At first the window holds `context_ids`, a token of the prompt:
    otherwise the space between prompt and answer would be stripped.
    """

    def __init__(self, tokenizer: Tokenizer, context_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context_ids)
        self._given = len(tokenizer.decode(self._window))  # characters of the window's text that were given out
        self._boundary = len(self._window)  # index in the window at which a character begins
        self._in_bytes = False  # whether the last token with a text is a byte

    def push(self, token_id: int) -> str:
        """Add a token. Returns the text that cannot change any more, which may be empty."""
        self._window.append(token_id)
        is_byte = token_id in self._tokenizer.byte_ids
        self._in_bytes = is_byte or (self._in_bytes and not self._tokenizer.decode([token_id]))
        if self._in_bytes:
            return ""
        text = self._tokenizer.decode(self._window)
        settled = len(text.rstrip(_UNDECIDED))
        piece = text[self._given : settled]
        self._given = max(self._given, settled)
        if settled == len(text):
            self._trim()
        return piece

    def preview(self, token_id: int) -> str:
        """The text that would not be given out yet if `token_id` came next, including undecided characters. Adds
        nothing."""
        return self._tokenizer.decode([*self._window, token_id])[self._given :]

    def flush(self) -> str:
        """The text that was kept back, with undecided characters as U+FFFD."""
        text = self._tokenizer.decode(self._window)
        piece, self._given = text[self._given :], len(text)
        return piece

    def _trim(self) -> None:
        """Move the window's start to the last boundary if there is text after it. Call it only at a character's end."""
        if len(self._window) - self._boundary < _TRIM_TOKENS:
            return
        context = self._window[self._boundary :]
        context_text = self._tokenizer.decode(context)
        if context_text:
            self._window, self._given = context, len(context_text)
        self._boundary = len(self._window)


def last_text_token(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> tuple[int, ...]:
    """The last token of the prompt that has a text and is not a byte; empty if there is none. A byte would not do,
    since a wrong byte in the answer would change how it decodes."""
    for token in reversed(prompt_ids):
        if token not in tokenizer.byte_ids and has_text(tokenizer, token):
            return (token,)
    return ()


def has_text(tokenizer: Tokenizer, token_id: int) -> bool:
    """Whether a token adds text. Special tokens do not."""
    # Decoded twice in a row, since a single space is stripped at the start of a text.
    return bool(tokenizer.decode([token_id, token_id]))
