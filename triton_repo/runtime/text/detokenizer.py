"""Token ids in one by one, text out as soon as it cannot change any more.

    detokenizer = Detokenizer(tokenizer, last_text_token(tokenizer, prompt_ids))
    pieces = [detokenizer.push(token) for token in ids] + [detokenizer.flush()]
    assert tokenizer.decode(prompt_ids) + "".join(pieces) == tokenizer.decode(prompt_ids + ids)

A token may end in the middle of a UTF-8 character; such an end decodes to U+FFFD, so a text's trailing U+FFFD are kept
back until the next token decides them or `flush` gives them out. Bytes written as tokens of their own (<0x0A>, the byte
fallback of SentencePiece) are kept back until another token follows, since one wrong byte spoils the decoding of the
whole run. Pieces are whole code points; an emoji of several may arrive in several pieces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from export.tokenizer.loading import Tokenizer

_UNDECIDED = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_TRIM_TOKENS = 16  # bounds what is decoded again at each step


class Detokenizer:
    """Decodes a window of the latest tokens, so that a step's cost does not grow with the text.

    The window always begins where a character does, and with tokens whose text was given out: decoders that strip the
    first token's space then strip it from known text only. It begins with `context_ids`, a token of the prompt, since
    the space that begins an answer parts the two.
    """

    def __init__(self, tokenizer: Tokenizer, context_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context_ids)
        self._given = len(tokenizer.decode(self._window))  # characters of the window's text that were given out
        self._boundary = len(self._window)  # a place in the window where a character begins
        self._in_bytes = False  # the last token with a text is a byte

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that it settles, which may be empty."""
        self._window.append(token_id)
        is_byte = _is_byte(self._tokenizer, token_id)
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
        """The text not yet given out if `token_id` came next, what is undecided included. Nothing is added."""
        return self._tokenizer.decode([*self._window, token_id])[self._given :]

    def flush(self) -> str:
        """The text kept back so far, undecided characters as U+FFFD."""
        text = self._tokenizer.decode(self._window)
        piece, self._given = text[self._given :], len(text)
        return piece

    def _trim(self) -> None:
        """At a character's boundary: move the window's start to the last boundary, if there is text after it."""
        if len(self._window) - self._boundary < _TRIM_TOKENS:
            return
        context = self._window[self._boundary :]
        context_text = self._tokenizer.decode(context)
        if context_text:
            self._window, self._given = context, len(context_text)
        self._boundary = len(self._window)


def last_text_token(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> tuple[int, ...]:
    """The prompt's last token that has a text and is no byte, whose run a wrong byte of the answer would spoil; none
    where there is none."""
    for token in reversed(prompt_ids):
        if not _is_byte(tokenizer, token) and has_text(tokenizer, token):
            return (token,)
    return ()


def has_text(tokenizer: Tokenizer, token_id: int) -> bool:
    """Whether a token shows in a text; special tokens do not."""
    # Twice, since a lone space is stripped where it comes first.
    return bool(tokenizer.decode([token_id, token_id]))


def _is_byte(tokenizer: Tokenizer, token_id: int) -> bool:
    return _BYTE_TOKEN.fullmatch(tokenizer.backend.id_to_token(token_id) or "") is not None
