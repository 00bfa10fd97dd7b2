"""What `moeship generate` tells of an answer beside its text: when its tokens came, and how likely they were."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton_repo.contracts.piece import Piece


@dataclass
class Timeline:
    """The pieces of one answer and when they came. `clock` gives seconds."""

    clock: Callable[[], float] = time.perf_counter
    pieces: list[Piece] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._start = self.clock()

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.seconds.append(self.clock() - self._start)

    @property
    def num_tokens(self) -> int | None:
        """Tokens received; None from a server that does not name them."""
        return sum(len(piece.token_ids) for piece in self.pieces) or None

    @property
    def time_to_first_token_ms(self) -> float | None:
        return 1000 * self.seconds[0] if self.seconds else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first piece by the seconds after it, so that reading the prompt does not count. None where
        all came at once: an answer that is sent whole has no speed after its first token.
        """
        if self.num_tokens is None or self.seconds[-1] <= self.seconds[0]:
            return None
        later = self.num_tokens - len(self.pieces[0].token_ids)
        return later / (self.seconds[-1] - self.seconds[0]) if later else None


def statistics(timeline: Timeline) -> str:
    """The line of --stats."""
    parts = [f"{len(timeline.pieces)} pieces" if timeline.num_tokens is None else f"{timeline.num_tokens} tokens"]
    if timeline.time_to_first_token_ms is not None:
        parts.append(f"first after {timeline.time_to_first_token_ms:.0f} ms")
    if timeline.tokens_per_s is not None:
        parts.append(f"then {timeline.tokens_per_s:.1f} tokens/s")
    return ", ".join(parts)


def log_probability_table(pieces: Sequence[Piece]) -> str:
    """The table of --log-probs: a line a piece with the natural logarithm of its tokens' joint probability, that
    probability, the text and each token's own; then the sum, the mean and the perplexity of all.
    """
    lines = ["  log prob   probability  text"]
    for piece in pieces:
        if piece.log_probs:
            total = sum(piece.log_probs)
            each = f"  ({' '.join(f'{value:.3f}' for value in piece.log_probs)})" if len(piece.log_probs) > 1 else ""
            lines.append(f"{total:10.3f}  {100 * math.exp(total):10.3f} %  {piece.text!r}{each}")
    values = [value for piece in pieces for value in piece.log_probs]
    if not values:
        return "the server gave no log-probabilities"
    mean = sum(values) / len(values)
    lines.append(
        f"{len(values)} tokens: sum {sum(values):.3f}, mean {mean:.3f}, perplexity {math.exp(min(-mean, 700)):.3f}"
    )
    return "\n".join(lines)
