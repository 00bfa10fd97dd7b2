"""Cuts a text's tokens into the windows that the reference computes."""

from __future__ import annotations

from collections.abc import Sequence

from export.errors import ConfigError

WINDOW_TOKENS = 512
MIN_TOKENS = 4


def text_windows(
    token_ids: Sequence[int], num_tokens: int, longest: int, doing: str, flag: str = "--tokens"
) -> list[list[int]]:
    """The first `num_tokens` of a text in windows of at most WINDOW_TOKENS and `longest` tokens; the last may be
    shorter. `doing` begins the message of an error, which names the `flag` that sets `num_tokens`. Raises ConfigError
    for fewer than MIN_TOKENS tokens, and for a text that does not fill the first window."""
    if num_tokens < MIN_TOKENS:
        raise ConfigError(
            f"{doing}: asked for {num_tokens} tokens, expected at least {MIN_TOKENS}; ask for more tokens"
        )
    size = min(WINDOW_TOKENS, longest, num_tokens)
    asked = min(num_tokens, len(token_ids))
    if asked < size:
        fewer = f", or {flag} {asked}" if asked >= MIN_TOKENS else ""
        raise ConfigError(
            f"{doing}: the text has {asked} tokens, expected at least {size}, the first window of a measurement of "
            f"{num_tokens} tokens; pass a longer text{fewer}"
        )
    return [list(token_ids[start : min(start + size, asked)]) for start in range(0, asked, size)]
