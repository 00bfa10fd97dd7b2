"""The requests that are sent, what each of them gets alone, and whether another answer is the same."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from clients.bench.prompts import synthetic
from clients.errors import ClientError
from clients.generation import AsyncClient, Generation, GenerationRequest
from clients.messages import collect
from triton_repo.contracts.piece import Piece

NO_END = -1
PATIENCE_S = 120.0
# What rounding may change in a log-probability when other sequences are in the step.
LOG_PROB_TOLERANCE = 1e-3
_TREE = '{"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"name": {"enum": ["a", "b"]}, \
"parts": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}}, "required": ["name"], \
"additionalProperties": false}}}'
# Options of requests by kind; the prompt, the length and the seed are drawn.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    "stop words": {"stop_words": ("e", " the", "\n\n")},
    "bad words": {"bad_words": ("a", "in")},
    "several": {"num_return_sequences": 3, "temperature": 1.0, "min_p": 0.05},
    "log-probabilities": {"return_log_probs": True, "num_log_probs": 3},
    "echo": {"return_prompt_log_probs": True, "return_log_probs": True},
    "routing": {"return_routed_experts": True},
    "schema": {
        "guided_decoding_guide_type": "json_schema",
        "guided_decoding_guide": '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}',
        "temperature": 0.8,
    },
    "nested schema": {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": _TREE},
    "expression": {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "(def|class) [a-z_]{1,12}"},
    "grammar": {
        "guided_decoding_guide_type": "ebnf_grammar",
        "guided_decoding_guide": 'root ::= [a-z] | "(" root " " root ")"',
        "temperature": 0.8,
    },
    "object": {"guided_decoding_guide_type": "json", "temperature": 0.8},
    "repeating": {},  # its prompt says the same several times, so that drafts of the answer are good
    "bias": {"logit_bias": {5: 2.0, 9: -4.0}, "min_length": 4},
}
# Whether a whole answer keeps to the guide of its kind.
FITS: Mapping[str, Callable[[str], object]] = {
    "schema": lambda text: isinstance(json.loads(text)["a"], int),
    "nested schema": lambda text: _is_tree(json.loads(text)),
    "expression": lambda text: re.fullmatch("(def|class) [a-z_]{1,12}", text),
    "grammar": lambda text: _is_pair(text),
    "object": lambda text: isinstance(json.loads(text), dict),
}
# Requests that must be refused, by what is wrong with them.
INVALID: tuple[dict[str, Any], ...] = (
    {"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 1.5}, {"top_k": -1},
    {"min_p": 2.0}, {"repetition_penalty": 0.0}, {"presence_penalty": float("inf")}, {"logit_bias": {10**6: 1.0}},
    {"num_log_probs": 21}, {"num_return_sequences": 17}, {"beam_width": 2}, {"stop_words": ("x" * 1025,)},
    {"prompt": "word " * 100_000}, {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "{"},
    {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "("},
    {"guided_decoding_guide_type": "json_schema",
     "guided_decoding_guide": '{"type": "integer", "minimum": 2, "maximum": 1}'},
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A request, its kind, and whether it is asked for as a stream."""

    kind: str
    request: GenerationRequest
    stream: bool


Answers = tuple[Generation, ...]  # the answers to one request, by sequence_index


def draw_wishes(model: str, count: int, seed: int) -> list[Wish]:
    """So many different requests of every kind. Half of them have no end token, so that they do not end at once."""
    source, kinds = random.Random(f"wishes {seed}"), list(KINDS)
    systems = [synthetic(source, 40, None) + "\n" for _ in range(2)]
    wishes = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        words = synthetic(source, source.choice((1, 4, 12, 40)), None)
        request = GenerationRequest(
            model=model,
            # Half of them begin with words that others begin with too, so that a prefix cache has some of them.
            prompt=source.choice((*systems, "", "")) + (f"{words}\n" * 3 if kind == "repeating" else words),
            max_tokens=source.choice((8, 32, 96) if kind in FITS else (1, 8, 16, 32)),
            random_seed=source.getrandbits(31),
            end_id=NO_END if source.random() < 0.5 and kind not in FITS else None,
            timeout_s=PATIENCE_S,
            **KINDS[kind],
        )
        wishes.append(Wish(kind=kind, request=request, stream=source.random() < 0.6))
    return wishes


def invalid_wish(model: str, source: random.Random) -> Wish:
    fields = {"prompt": "def main(", "max_tokens": 8, **source.choice(INVALID)}
    return Wish(kind="invalid", request=GenerationRequest(model=model, **fields), stream=source.random() < 0.5)


async def pieces_of(client: AsyncClient, wish: Wish) -> Answers:
    """Ask and read the whole answer. Raises ClientError."""
    if not wish.stream:
        return await client.generate_all(wish.request)
    async with aclosing(client.stream(wish.request)) as pieces:
        return joined([piece async for piece in pieces])


async def alone(client: AsyncClient, wishes: Sequence[Wish]) -> list[Answers]:
    """What each request gets while nothing else is computed. Raises ClientError."""
    return [await pieces_of(client, wish) for wish in wishes]


def joined(pieces: Sequence[Piece]) -> Answers:
    """The answers that these pieces make, whole or begun."""
    parts: defaultdict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        parts[piece.sequence_index].append(piece)
    return tuple(collect(parts[index]) for index in sorted(parts))


def difference(found: Answers, expected: Answers) -> str:
    """What differs between two answers to one request, "" if nothing does. Log-probabilities may differ by
    LOG_PROB_TOLERANCE."""
    if len(found) != len(expected):
        return f"{len(found)} answers, expected {len(expected)}"
    for one, other in zip(found, expected, strict=True):
        for name in ("token_ids", "text", "finish_reason", "prompt_token_ids", "num_output_tokens"):
            if getattr(one, name) != getattr(other, name):
                return f"{name}: {getattr(one, name)!r:.200}, expected {getattr(other, name)!r:.200}"
        for name in ("log_probs", "prompt_log_probs"):
            if (gap := _gap(getattr(one, name), getattr(other, name))) > LOG_PROB_TOLERANCE:
                return f"{name} differ by {gap:.2g}"
    return ""


def begins(found: Answers, expected: Answers) -> bool:
    """Whether answers that were ended early are the beginnings of whole ones."""
    whole = {answer.sequence_index: answer for answer in expected}
    return all(
        whole[one.sequence_index].token_ids[: len(one.token_ids)] == one.token_ids
        and whole[one.sequence_index].text.startswith(one.text)
        for one in found
    )


def shape_fault(found: Answers, wish: Wish) -> str:
    """What is wrong with an answer whatever its text is: for engines that round, whose text may differ in a batch."""
    if len(found) != (wish.request.num_return_sequences or 1):
        return f"{len(found)} answers"
    for one in found:
        if one.finish_reason not in ("stop", "length") or len(one.token_ids) != one.num_output_tokens:
            return f"{one.finish_reason!r} after {one.num_output_tokens} tokens, {len(one.token_ids)} came"
    return ""


def misfit(found: Answers, wish: Wish) -> str:
    """What is wrong with answers that ended by themselves and should keep to a guide."""
    for one in found:
        if wish.kind in FITS and one.finish_reason == "stop":
            try:
                fits = FITS[wish.kind](one.text)
            except (ValueError, LookupError, TypeError):
                fits = False
            if not fits:
                return f"{one.text!r:.200} does not keep to the guide"
    return ""


def _is_tree(value: Any) -> bool:  # noqa: ANN401 - JSON
    parts = value.get("parts", [])
    return (
        value["name"] in ("a", "b")
        and value.keys() <= {"name", "parts"}
        and len(parts) <= 2
        and all(map(_is_tree, parts))
    )


def _is_pair(text: str) -> bool:
    """Whether a text is a letter or two such texts in parentheses, by replacing the innermost pairs by letters."""
    while (shorter := re.sub(r"\([a-z] [a-z]\)", "a", text)) != text:
        text = shorter
    return re.fullmatch("[a-z]", text) is not None


def _gap(found: Sequence[float], expected: Sequence[float]) -> float:
    if len(found) != len(expected):
        return float("inf")
    return max((abs(a - b) for a, b in zip(found, expected, strict=True)), default=0.0)


def longer(wish: Wish, max_tokens: int) -> Wish:
    """The same as one stream of so many tokens."""
    request = replace(wish.request, max_tokens=max_tokens, end_id=NO_END, stop_words=None, num_return_sequences=None)
    return replace(wish, request=request, stream=True)


def first_error(errors: Sequence[ClientError]) -> str:
    """The error to show of several."""
    return str(errors[0])[:300] if errors else ""


def cycled(items: Sequence[Any], count: int, source: random.Random) -> Iterator[Any]:
    """`count` of the items, each about as often, in random order."""
    repeated = [items[number % len(items)] for number in range(count)]
    source.shuffle(repeated)
    return iter(repeated)
