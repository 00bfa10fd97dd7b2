"""A generation request and a whole answer, as plain data without numpy and protobuf."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from clients.errors import RequestRejected
from triton_repo.contracts.piece import Piece, TokenRouting, join


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt for one model. A field that is None is not sent, and the server uses its default.

    Except `model`, `prompt`, `logit_bias`, `request_id` and `timeout_s`, the fields have the names of tensors in
    `triton_repo/contracts/wire.py`, which says their ranges; the server checks the ranges. A temperature without top_k
    and top_p draws among all tokens: it is sent with top_p 1, since servers of this contract would be greedy without
    it. Raises RequestRejected for values that every server would refuse.
    """

    model: str
    prompt: str
    input_ids: tuple[int, ...] | None = None  # the prompt's tokens in place of its text, which is then empty
    max_tokens: int
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    min_length: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None  # token id to what is added to its logit
    random_seed: int | None = None
    stop_words: tuple[str, ...] | None = None
    bad_words: tuple[str, ...] | None = None
    end_id: int | None = None
    pad_id: int | None = None
    beam_width: int | None = None
    return_log_probs: bool | None = None
    exclude_input_in_output: bool | None = None
    num_log_probs: int | None = None
    return_prompt_log_probs: bool | None = None
    return_routed_experts: bool | None = None
    guided_decoding_guide_type: str | None = None  # json, json_schema, regex or ebnf_grammar
    guided_decoding_guide: str | None = None  # the text of the schema, regular expression or grammar
    num_return_sequences: int | None = None  # answers to the prompt; more than one are read by stream or generate_all
    # Appears in the server's log and messages. It must be unique among requests in flight. If it is empty, an id is
    # drawn each time the request is sent.
    request_id: str = ""
    # Seconds from sending to the last token. None waits as long as the server runs.
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise RequestRejected("a generation request: model is empty; give the name of a model that the server has")
        check_text("a generation request: model", self.model)
        check_text(f"a request to {self.model}: request_id", self.request_id)
        if self.timeout_s is not None and not _is_duration(self.timeout_s):
            raise RequestRejected(
                f"a request to {self.model}: timeout_s is {self.timeout_s!r}, expected a finite number of seconds "
                "above 0; leave it out to wait as long as the server lives"
            )
        for name in ("stop_words", "bad_words"):
            if isinstance(getattr(self, name), str):
                raise RequestRejected(f"a request to {self.model}: {name} is one text; give a tuple of texts")
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise RequestRejected(
                f"a request to {self.model}: logit_bias is {self.logit_bias!r}, expected token ids with a number each; "
                "give a dict"
            )


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A whole answer. The fields are those of `Piece`, for all of its pieces."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    num_input_tokens: int | None
    num_output_tokens: int | None
    cum_log_prob: float | None
    log_probs: tuple[float, ...]
    top_log_probs: tuple[tuple[tuple[int, float], ...], ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    prompt_log_probs: tuple[float, ...] = ()
    prompt_top_log_probs: tuple[tuple[tuple[int, float], ...], ...] = ()
    sequence_index: int = 0
    routing: tuple[TokenRouting, ...] = ()
    num_experts: int | None = None


def collect(pieces: Iterable[Piece]) -> Generation:
    """The whole answer of which `pieces` are the pieces, in order."""
    return Generation(**vars(join(pieces)))


def collect_all(pieces: Iterable[Piece]) -> tuple[Generation, ...]:
    """The whole answers to one prompt, in the order of `sequence_index`. `pieces` are the pieces of all of them."""
    parts: defaultdict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        parts[piece.sequence_index].append(piece)
    return tuple(collect(parts[index]) for index in sorted(parts))


def check_one_answer(request: GenerationRequest) -> None:
    """Raise RequestRejected for a request for several answers, where only one can be given back."""
    if request.num_return_sequences not in (None, 1):
        raise RequestRejected(
            f"a request to {request.model}: num_return_sequences is {request.num_return_sequences!r}, and generate "
            "gives one answer; call generate_all"
        )


def check_text(what: str, value: object) -> None:
    """Raise RequestRejected for a value that cannot be sent as a text. `what` names the value in the message."""
    try:
        if isinstance(value, str):
            value.encode()
            return
    except UnicodeEncodeError as error:
        raise RequestRejected(f"{what} is {value!r}, expected a text that UTF-8 can hold: {error}") from error
    raise RequestRejected(f"{what} is {value!r}, expected a text")


def _is_duration(seconds: Any) -> bool:  # noqa: ANN401 - whatever the caller gave
    is_number = isinstance(seconds, Real) and not isinstance(seconds, bool)
    return is_number and bool(0 < seconds < math.inf)
