"""Log-probabilities, counts and finish reasons in OpenAI's form.

Completions name tokens by their texts; a token that is no whole UTF-8 stands there as "bytes:\\xe2\\x82", as in
OpenAI's own answers. Chat completions have a token's bytes beside its text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from clients.gateway.errors import cancelled
from clients.gateway.guard import Record
from clients.gateway.texts import ModelTexts
from clients.messages import Generation
from triton_repo.contracts.piece import Piece

Tops = Sequence[Sequence[tuple[int, float]]]
CANCELLED, CUT = "cancelled", "length"


def now() -> int:
    """The time in whole seconds, as `created` has it."""
    return int(time.time())


def finish_reason(part: Piece | Generation) -> str | None:
    """ "stop" or "length"; None before the end. Raises ApiError for an answer that the server cancelled."""
    if part.finish_reason == CANCELLED:
        raise cancelled()
    return part.finish_reason


class Usage:
    """The tokens of all answers to a request. `add` takes pieces or whole answers, of any number of prompts."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._prompts: dict[int, int] = {}  # place of the prompt to its tokens
        self._outputs: dict[tuple[int, int], int] = {}  # place of the prompt and number of the answer to its tokens
        self._prompt = self._output = 0  # tokens in all

    def add(self, part: Piece | Generation, prompt: int = 0) -> None:
        record = self._record
        record.saw_token()
        if part.num_input_tokens is not None:
            self._prompt += part.num_input_tokens - self._prompts.get(prompt, 0)
            self._prompts[prompt] = part.num_input_tokens
        key, found = (prompt, part.sequence_index), part.num_output_tokens
        known = self._outputs.get(key, 0)
        self._outputs[key] = known + len(part.token_ids) if found is None else found
        self._output += self._outputs[key] - known
        record.prompt_tokens, record.output_tokens = self._prompt, self._output

    def to_json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt, "completion_tokens": self._output,
            "total_tokens": self._prompt + self._output,
        }  # fmt: skip


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
    offsets: Sequence[int],
) -> dict[str, Any]:
    """The `logprobs` of a choice. The chosen token is in `top_logprobs` too, whether or not it is among the likeliest.
    A token without a log-probability, the first of a prompt, has null in both."""
    tokens, likeliest = [], []
    for place, (token, log_prob) in enumerate(zip(token_ids, log_probs, strict=True)):
        tokens.append(token_text(texts, token))
        best: dict[str, float] | None = None
        if log_prob is not None:
            best = {}
            # Two tokens may have one text; the likelier one is the first.
            for other, value in (*(tops[place] if place < len(tops) else ()), (token, log_prob)):
                best.setdefault(token_text(texts, other), value)
        likeliest.append(best)
    return {
        "tokens": tokens, "token_logprobs": list(log_probs), "top_logprobs": likeliest, "text_offset": list(offsets),
    }  # fmt: skip


def answer_offsets(texts: ModelTexts, token_ids: Sequence[int], begin: int) -> tuple[list[int], int]:
    """How many characters of a choice's text come before each token of an answer, and how many before what follows.
    `begin` characters come before the first token. Special tokens are not in the text."""
    return _offsets([b"" if token in texts.special else texts.token_bytes(token) for token in token_ids], begin)


def prompt_offsets(texts: ModelTexts, token_ids: Sequence[int], prompt: str) -> tuple[list[int], int]:
    """The same of a prompt's tokens. What a tokenizer puts around a text, a begin token or SentencePiece's space before
    the first word, is not in it."""
    data, at, found = prompt.encode(), 0, []
    for token in token_ids:
        part = texts.token_bytes(token)
        if not data.startswith(part, at):
            part = part[1:] if part[:1] == b" " and data.startswith(part[1:], at) else b""
        at += len(part)
        found.append(part)
    return _offsets(found, 0)[0], len(prompt)


def _offsets(parts: Sequence[bytes], begin: int) -> tuple[list[int], int]:
    """The tokens that spell one character have the offset of that character."""
    found, num_begun = [], begin
    for part in parts:
        found.append(max(0, num_begun - (part != b"" and _continues(part[0]))))
        num_begun += sum(not _continues(byte) for byte in part)
    return found, num_begun


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 is one within a character."""
    return byte & 0xC0 == 0x80


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
