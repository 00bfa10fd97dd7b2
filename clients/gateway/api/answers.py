"""Log-probabilities, counts and finish reasons in OpenAI's form.

Completions name tokens by their texts; a token that is no whole UTF-8 stands there as "bytes:\\xe2\\x82", as in
OpenAI's own answers. Chat completions have a token's bytes beside its text.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from clients.gateway.errors import cancelled
from clients.gateway.guard import Record
from clients.gateway.texts import ModelTexts
from clients.messages import Generation
from triton_repo.contracts.piece import Piece

Tops = Sequence[Sequence[tuple[int, float]]]
CANCELLED = "cancelled"


def now() -> int:
    """The time in whole seconds, as `created` has it."""
    return int(time.time())


def finish_reason(part: Piece | Generation) -> str | None:
    """ "stop" or "length"; None before the end. Raises ApiError for an answer that the server cancelled."""
    if part.finish_reason == CANCELLED:
        raise cancelled()
    return part.finish_reason


@dataclass
class Usage:
    """The tokens of all answers to a request. `add` takes pieces or whole answers, of any number of prompts."""

    record: Record
    prompt: dict[int, int] = field(default_factory=dict)  # place of the prompt to its tokens
    output: defaultdict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))

    def add(self, part: Piece | Generation, prompt: int = 0) -> None:
        self.record.saw_token()
        if part.num_input_tokens is not None:
            self.prompt[prompt] = part.num_input_tokens
        key = (prompt, part.sequence_index)
        found = part.num_output_tokens
        self.output[key] = self.output[key] + len(part.token_ids) if found is None else found
        self.record.prompt_tokens = sum(self.prompt.values())
        self.record.output_tokens = sum(self.output.values())

    def to_json(self) -> dict[str, int]:
        prompt, output = sum(self.prompt.values()), sum(self.output.values())
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def routing_of(part: Piece | Generation) -> dict[str, Any]:
    """What a choice has beside OpenAI's fields where the experts of its tokens were asked for: lists of tokens, of
    layers, of the experts that computed the token, the heaviest first, and of their weights
    (triton_repo/contracts/wire.py)."""
    if not part.routing:
        return {}
    experts, weights = (
        [[[pair[place] for pair in layer] for layer in token] for token in part.routing] for place in (0, 1)
    )
    rounded = [[[round(weight, 5) for weight in layer] for layer in token] for token in weights]
    return {
        "moeship": {"routed_experts": experts, "expert_weights": rounded, "num_experts": part.num_experts},
    }


def token_text(texts: ModelTexts, token: int) -> str:
    """A token as completions name it."""
    data = texts.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_log_probs(
    texts: ModelTexts,
    token_ids: Sequence[int],
    log_probs: Sequence[float | None],
    tops: Tops,
    offset: int,
) -> tuple[dict[str, Any], int]:
    """The `logprobs` of a choice, and the offset in the text behind its last token. The chosen token is in
    `top_logprobs` too, whether or not it is among the likeliest. A token without a log-probability, the first of a
    prompt, has null in both."""
    tokens, offsets, likeliest = [], [], []
    for place, (token, log_prob) in enumerate(zip(token_ids, log_probs, strict=True)):
        tokens.append(token_text(texts, token))
        offsets.append(offset)
        offset += len(texts.token_bytes(token).decode(errors="ignore"))
        best: dict[str, float] | None = None
        if log_prob is not None:
            best = {}
            # Two tokens may have one text; the likelier one is the first.
            for other, value in (*(tops[place] if place < len(tops) else ()), (token, log_prob)):
                best.setdefault(token_text(texts, other), value)
        likeliest.append(best)
    found = {
        "tokens": tokens, "token_logprobs": list(log_probs), "top_logprobs": likeliest, "text_offset": offsets,
    }  # fmt: skip
    return found, offset


def chat_log_probs(texts: ModelTexts, part: Piece | Generation) -> dict[str, Any]:
    """The `logprobs` of a choice of a chat completion."""
    content = []
    for place, (token, log_prob) in enumerate(zip(part.token_ids, part.log_probs, strict=False)):
        tops = part.top_log_probs[place] if place < len(part.top_log_probs) else ()
        content.append(
            {**_chat_token(texts, token, log_prob), "top_logprobs": [_chat_token(texts, *pair) for pair in tops]}
        )
    return {"content": content, "refusal": None}


def _chat_token(texts: ModelTexts, token: int, log_prob: float) -> dict[str, Any]:
    data = texts.token_bytes(token)
    return {"token": data.decode(errors="replace"), "logprob": log_prob, "bytes": list(data)}
