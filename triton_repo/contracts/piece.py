"""One piece of an answer, as a server writes it and a client reads it, and pieces joined to a whole answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

_Value = TypeVar("_Value")
# What the routers chose for one token: for each layer that has experts the chosen ones and their weights, the heaviest
# first. It is the choice at the position that the token's logits come from, which is that of the token before it.
TokenRouting = tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one response adds. A field that the server did not send is None or empty. The log-probabilities and the
    routing are absent unless the request asked for them.
    """

    text: str
    token_ids: tuple[int, ...] = ()  # since the piece before, an end token included
    finish_reason: str | None = None  # "stop", "length" or "cancelled" in the last piece, None before
    num_input_tokens: int | None = None  # of the prompt
    num_output_tokens: int | None = None  # of the answer so far
    cum_log_prob: float | None = None  # natural logarithm, the sum so far
    log_probs: tuple[float, ...] = ()  # natural logarithms, one a token of this piece
    # For each token of this piece the likeliest ids at its place and their natural logarithms, the likeliest first.
    top_log_probs: tuple[tuple[tuple[int, float], ...], ...] = ()
    prompt_token_ids: tuple[int, ...] = ()  # in the first piece
    prompt_log_probs: tuple[float, ...] = ()  # natural logarithms, of prompt_token_ids from the second on
    # The likeliest tokens at the places of prompt_log_probs, as top_log_probs has them; empty unless asked for.
    prompt_top_log_probs: tuple[tuple[tuple[int, float], ...], ...] = ()
    sequence_index: int = 0  # which of the answers to one prompt
    routing: tuple[TokenRouting, ...] = ()  # of each token of this piece
    num_experts: int | None = None  # of each layer that has some


def join(pieces: Iterable[Piece]) -> Piece:
    """The pieces of one answer, in order, as one; of the running counts, the last that was sent."""
    parts = tuple(pieces)
    return Piece(
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        finish_reason=_last(part.finish_reason for part in parts),
        num_input_tokens=_last(part.num_input_tokens for part in parts),
        num_output_tokens=_last(part.num_output_tokens for part in parts),
        cum_log_prob=_last(part.cum_log_prob for part in parts),
        log_probs=tuple(value for part in parts for value in part.log_probs),
        top_log_probs=tuple(likeliest for part in parts for likeliest in part.top_log_probs),
        prompt_token_ids=next((part.prompt_token_ids for part in parts if part.prompt_token_ids), ()),
        prompt_log_probs=next((part.prompt_log_probs for part in parts if part.prompt_log_probs), ()),
        prompt_top_log_probs=next((part.prompt_top_log_probs for part in parts if part.prompt_top_log_probs), ()),
        sequence_index=parts[0].sequence_index if parts else 0,
        routing=tuple(token for part in parts for token in part.routing),
        num_experts=_last(part.num_experts for part in parts),
    )


def join_by_answer(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces of the answers to one prompt, in order, as one for each answer that has some."""
    answers: dict[int, list[Piece]] = {}
    for piece in pieces:
        answers.setdefault(piece.sequence_index, []).append(piece)
    return [join(parts) for parts in answers.values()]


def _last(values: Iterable[_Value | None]) -> _Value | None:
    sent = [value for value in values if value is not None]
    return sent[-1] if sent else None
