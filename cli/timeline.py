"""Computes what `moeship generate` prints besides the text: the times of tokens and their probabilities."""

from __future__ import annotations

import math
import time
from collections import Counter
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
        """Number of tokens received; None if the server does not send token ids."""
        return sum(len(piece.token_ids) for piece in self.pieces) or None

    @property
    def time_to_first_token_ms(self) -> float | None:
        return 1000 * self.seconds[0] if self.seconds else None

    @property
    def tokens_per_s(self) -> float | None:
        """Number of tokens after the first piece divided by the seconds after it, so that the prefill is not included.
        None if the answer came in one piece.
        """
        if self.num_tokens is None or self.seconds[-1] <= self.seconds[0]:
            return None
        later = self.num_tokens - len(self.pieces[0].token_ids)
        return later / (self.seconds[-1] - self.seconds[0]) if later else None


def statistics(timeline: Timeline) -> str:
    """The line that --stats prints."""
    parts = [f"{len(timeline.pieces)} pieces" if timeline.num_tokens is None else f"{timeline.num_tokens} tokens"]
    if timeline.time_to_first_token_ms is not None:
        parts.append(f"first after {timeline.time_to_first_token_ms:.0f} ms")
    if timeline.tokens_per_s is not None:
        parts.append(f"then {timeline.tokens_per_s:.1f} tokens/s")
    return ", ".join(parts)


def log_probability_table(pieces: Sequence[Piece]) -> str:
    """The table that --log-probs, --top-log-probs and --prompt-log-probs print. For each piece it has the natural
    logarithm of the joint probability of the piece's tokens, that probability, the text, and the logarithm for each
    token. Below are the likeliest tokens at the place of each token, as ids and logarithms. The last lines have the
    sum, the mean and the perplexity of all tokens of the prompt, without its first, and of the answer.
    """
    lines = ["  log prob   probability  text"] if any(piece.log_probs for piece in pieces) else []
    for piece in pieces:
        if piece.log_probs:
            total = sum(piece.log_probs)
            each = f"  ({' '.join(f'{value:.3f}' for value in piece.log_probs)})" if len(piece.log_probs) > 1 else ""
            lines.append(f"{total:10.3f}  {100 * math.exp(total):10.3f} %  {piece.text!r}{each}")
        lines += [
            f"{token:>10}: " + " ".join(f"{one}:{value:.3f}" for one, value in top)
            for token, top in zip(piece.token_ids, piece.top_log_probs, strict=False)
        ]
    prompt = next((piece.prompt_log_probs for piece in pieces if piece.prompt_log_probs), ())
    if prompt:
        lines.append(f"prompt: {_sums(prompt)}")
    values = [value for piece in pieces for value in piece.log_probs]
    if values:
        lines.append(_sums(values))
    return "\n".join(lines) or "the server gave no log-probabilities"


def routing_table(pieces: Sequence[Piece]) -> str:
    """The table that --routing prints: for each token its id and, layer by layer, its experts with their weights in per
    cent, the heaviest first. The last lines have how many tokens each expert of each layer got."""
    routed = [
        (token, layers) for piece in pieces for token, layers in zip(piece.token_ids, piece.routing, strict=False)
    ]
    if not routed:
        return "the server gave no routing"
    lines = [
        f"{token:>10}: "
        + "  ".join(" ".join(f"{expert}:{100 * weight:.0f}%" for expert, weight in one) for one in layers)
        for token, layers in routed
    ]
    count = next((piece.num_experts for piece in pieces if piece.num_experts), 0)
    for layer in range(len(routed[0][1])):
        chosen = Counter(expert for _, layers in routed for expert, _ in layers[layer])
        lines.append(f"layer {layer:>4}: " + " ".join(f"{expert}:{chosen[expert]}" for expert in range(count)))
    return "\n".join(lines)


def _sums(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{len(values)} tokens: sum {sum(values):.3f}, mean {mean:.3f}, perplexity {math.exp(min(-mean, 700)):.3f}"
