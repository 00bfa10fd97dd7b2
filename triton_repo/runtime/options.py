"""The options of one generation request, and what follows from them with the model.

    options = GenerationOptions(prompt="def ", max_tokens=32, temperature=0.7, top_p=0.9)
    plan = plan_generation(options, tokenizer, max_sequence=2048, end_token_ids=(50256,))

`value_problems` checks what can be checked without the model, `plan_generation` what depends on the model too, and
raises one RequestError that lists every problem. `request_reading.py` reads options from wire tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from export.errors import listing
from export.tokenizer.loading import Tokenizer
from triton_repo.contracts.wire import (
    FIELD_NAMES,
    GUIDE_TYPES,
    MOST_BIASES,
    MOST_GUIDE_BYTES,
    MOST_LOG_PROBS,
    MOST_SEQUENCES,
    UNSERVED_GUIDE_TYPES,
)
from triton_repo.errors import RequestError
from triton_repo.runtime.text.prompt import PromptTooLongError, encode_prompt

NO_END_ID = -1
_MAX_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen. The fields have the names of tensors in contracts/wire.py.

    As in TensorRT-LLM the choice is greedy if top_k and top_p are both 0, whatever the temperature, unless min_p says
    among which tokens to draw. To draw among all tokens, set top_p to 1.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: sets no limit
    top_p: float = 0.0  # 0: sets no limit
    min_p: float = 0.0  # 0: sets no limit
    min_length: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids, each at most once, and what is added to their logits
    random_seed: int | None = None
    return_log_probs: bool = False
    num_log_probs: int = 0  # of how many of the likeliest tokens the log-probabilities are given at each token
    guided_decoding_guide_type: str = ""  # what the answer is kept to: one of GUIDE_TYPES, or nothing
    guided_decoding_guide: str = ""

    @property
    def sampling_temperature(self) -> float:
        """The temperature that applies; 0 is greedy (TensorRT-LLM, regularizeTopKTopP of
        cpp/tensorrt_llm/kernels/samplingTopKKernels.h)."""
        is_greedy = self.top_k == 1 or (self.top_k == 0 and self.top_p == 0 and self.min_p == 0)
        return 0.0 if is_greedy else self.temperature


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingOptions):
    """One request. The fields have the names of tensors in contracts/wire.py, except `prompt` and the biases, which
    pair two tensors each."""

    prompt: str
    input_ids: tuple[int, ...] = ()  # the prompt's tokens in place of its text
    max_tokens: int
    stream: bool = False
    stop_words: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    end_id: int | None = None  # None: the model's own; NO_END_ID: none
    exclude_input_in_output: bool = True
    num_return_sequences: int = 1  # answers to the prompt
    return_prompt_log_probs: bool = False
    return_routed_experts: bool = False
    # What is added to the logits of each of a word's tokens. plan_generation makes logit_bias of them.
    embedding_bias: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """Everything that is needed to choose the tokens of one sequence."""

    options: SamplingOptions
    prompt_ids: tuple[int, ...]
    end_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GenerationPlan(SamplingPlan):
    """The checked options of a request, and what follows from the model. `options.logit_bias` has all biases."""

    options: GenerationOptions
    most_tokens: int  # new tokens


@dataclass(frozen=True)
class _Rule:
    holds: Callable[[Any], bool]
    expected: str
    remedy: str


def _above(low: float) -> Callable[[Any], bool]:
    return lambda value: math.isfinite(value) and value >= low


# Within these bounds no sum or product of penalties leaves the range of float32.
_SHIFT = _Rule(lambda p: abs(p) <= 1000, "-1000 to 1000", "send 0 for no penalty")
_FACTOR = _Rule(lambda p: 0.001 <= p <= 1000, "0.001 to 1000", "send 1 for no penalty")
_RULES: dict[str, _Rule] = {
    "prompt": _Rule(bool, "at least one character", "send a prompt in text_input"),
    "max_tokens": _Rule(_above(1), "1 or more", "ask for at least one token"),
    "temperature": _Rule(
        lambda t: t == 0 or 0.001 <= t <= 1000, "0, or 0.001 to 1000", "send 0 for greedy, or about 0.7"
    ),
    "top_k": _Rule(_above(0), "0 or more", "send 0 for no limit"),
    "top_p": _Rule(lambda p: 0 <= p <= 1, "0 <= top_p <= 1", "send 1 to draw among all tokens"),
    "min_p": _Rule(lambda p: 0 <= p <= 1, "0 <= min_p <= 1", "send 0 for no limit"),
    "min_length": _Rule(_above(0), "0 or more", "send 0 for no minimum"),
    "repetition_penalty": _FACTOR,
    "presence_penalty": _SHIFT,
    "frequency_penalty": _SHIFT,
    "num_log_probs": _Rule(
        lambda n: 0 <= n <= MOST_LOG_PROBS, f"0 to {MOST_LOG_PROBS}", "ask for fewer of the likeliest tokens"
    ),
    "num_return_sequences": _Rule(
        lambda n: 1 <= n <= MOST_SEQUENCES, f"1 to {MOST_SEQUENCES}", "send several requests for more answers"
    ),
    "random_seed": _Rule(lambda seed: 0 <= seed <= _MAX_SEED, "0 to 2**64-1", "send another seed, or none"),
}
WORDS = ("stop_words", "bad_words")
# Limits for stop and bad words. One automaton looks for all of them; it has as many states as the words have
# characters.
MAX_WORDS = 1024
MAX_WORD_BYTES = 1024
MAX_WORD_BYTES_IN_ALL = 32_768
WIRE_NAMES = {field: tensor for tensor, field in FIELD_NAMES.items()}
# Field to the tensors of its pairs: what is biased, and by how much.
BIASES = {
    "logit_bias": ("logit_bias_ids", "logit_bias_values"),
    "embedding_bias": ("embedding_bias_words", "embedding_bias_weights"),
}


def plan_generation(
    options: GenerationOptions,
    tokenizer: Tokenizer,
    *,
    max_sequence: int,
    end_token_ids: tuple[int, ...],
    max_prompt: int | None = None,
) -> GenerationPlan:
    """Check the options against the model and encode the prompt. Raises RequestError that lists every problem.

    `max_sequence` is the limit for the tokens of prompt and output together. A prompt that leaves no room for output is
    refused. If a prompt leaves room for less than max_tokens, the output ends at the limit. `max_prompt` is the limit
    for the prompt alone, if the engine reads fewer tokens at a time.
    """
    problems = value_problems(vars(options))
    if options.end_id is not None and not NO_END_ID <= options.end_id < tokenizer.size:
        problems.append(
            f"end_id: found {options.end_id}, expected a token id below {tokenizer.size}, or -1 for none; "
            "leave it out to use the model's own"
        )
    unknown = [token for token, _ in options.logit_bias if token >= tokenizer.size]
    if unknown:
        problems.append(f"logit_bias_ids: found {unknown[0]}, expected token ids below {tokenizer.size}; leave it out")
    most_tokens = max_sequence - 1 if max_prompt is None else min(max_prompt, max_sequence - 1)
    found, its = _prompt_ids(options, tokenizer, most_tokens)
    problems += its
    name = "input_ids" if options.input_ids else "text_input"
    if len(found) >= max_sequence:
        problems.append(
            f"{name}: found a prompt of {len(found)} tokens, expected at most {max_sequence - 1}, since "
            f"prompt and output share a context of {max_sequence}; shorten it"
        )
    elif max_prompt is not None and len(found) > max_prompt:
        problems.append(
            f"{name}: found a prompt of {len(found)} tokens, expected at most {max_prompt}, which the engine "
            "reads at a time; shorten it"
        )
    if problems:
        raise refusal(problems)
    return GenerationPlan(
        options=_with_all_biases(options, tokenizer),
        prompt_ids=tuple(found),
        end_ids=_end_ids(options, end_token_ids),
        most_tokens=min(options.max_tokens, max_sequence - len(found)),
    )


def _prompt_ids(options: GenerationOptions, tokenizer: Tokenizer, most_tokens: int) -> tuple[Sequence[int], list[str]]:
    """The tokens of the prompt, and what is wrong with it."""
    if options.input_ids:
        wrong = next((token for token in options.input_ids if not 0 <= token < tokenizer.size), None)
        if wrong is None:
            return options.input_ids, []
        return (), [f"input_ids: found {wrong}, expected token ids from 0 on, below {tokenizer.size}"]
    text = "" if _surrogates([options.prompt]) else options.prompt
    try:
        found = encode_prompt(tokenizer, text, most_tokens)
    except PromptTooLongError as error:
        return (), [f"text_input: {error}"]
    if text and not found:
        return (), ["text_input: found a prompt without a single token, expected at least one; send more text"]
    return found, []


def _with_all_biases(options: GenerationOptions, tokenizer: Tokenizer) -> GenerationOptions:
    """The options with `embedding_bias` as part of `logit_bias`: each token of a word gets the word's number, and a
    token of several words their sum, as in TensorRT-LLM (_get_embedding_bias of
    triton_backend/all_models/inflight_batcher_llm/preprocessing/1/model.py)."""
    if not options.embedding_bias:
        return options
    biases = dict(options.logit_bias)
    for word, number in options.embedding_bias:
        for token in tokenizer.encode(word) if word else ():
            biases[token] = biases.get(token, 0.0) + number
    return replace(options, logit_bias=tuple(biases.items()), embedding_bias=())


def _end_ids(options: GenerationOptions, of_model: tuple[int, ...]) -> tuple[int, ...]:
    if options.end_id is None:
        return of_model
    return () if options.end_id == NO_END_ID else (options.end_id,)


def value_problems(values: Mapping[str, Any], names: Mapping[str, str] = WIRE_NAMES) -> list[str]:
    """What is wrong with the values of options. `names` maps a field to the name of its tensor, where the two
    differ."""
    problems = [
        f"{names.get(field, field)}: found {values[field]!r}, expected {rule.expected}; {rule.remedy}"
        for field, rule in _RULES.items()
        if values.get(field) is not None
        and not rule.holds(values[field])
        and not (field == "prompt" and values.get("input_ids"))
    ]
    if values.get("prompt") and values.get("input_ids"):
        problems.append(
            f"input_ids: found {len(values['input_ids'])} beside a text, expected one of the two; send an empty text "
            f"in {names.get('prompt', 'prompt')}"
        )
    problems += [f"{names['prompt']}: {problem}" for problem in _surrogates([values.get("prompt") or ""])]
    for field in WORDS:
        words = values.get(field) or ()
        found = _surrogates(words) or size_problem([word.encode() for word in words])
        if not found and not all(words):
            found = ["found an empty text, expected none among the words; leave the empty ones out"]
        problems += [f"{names.get(field, field)}: {problem}" for problem in found]
    for field, tensors in BIASES.items():
        problems += _bias_problems(values.get(field) or (), *tensors)
    problems += _guide_problems(
        values.get("guided_decoding_guide_type") or "", values.get("guided_decoding_guide") or ""
    )
    return problems


def _guide_problems(guide_type: str, guide: str) -> list[str]:
    """What is wrong with a guide before it is read."""
    type_name, name = "guided_decoding_guide_type", "guided_decoding_guide"
    if surrogates := _surrogates([guide_type, guide]):
        return [f"{name}: {problem}" for problem in surrogates]
    problems = []
    if guide_type in UNSERVED_GUIDE_TYPES:
        problems.append(f"{type_name}: {guide_type} is not served; send one of {', '.join(GUIDE_TYPES)}")
    elif guide_type and guide_type not in GUIDE_TYPES:
        problems.append(f"{type_name}: found {guide_type[:60]!r}, expected one of {', '.join(GUIDE_TYPES)}")
    if guide and guide_type in ("", "json"):
        kind = "without a type" if not guide_type else "beside the type json, which needs none"
        problems.append(f"{name}: found a guide {kind}; send the type that it has, such as json_schema")
    if not guide and guide_type in GUIDE_TYPES and guide_type != "json":
        problems.append(f"{name}: absent, and the type {guide_type} needs one; send it")
    if (size := len(guide.encode())) > MOST_GUIDE_BYTES:
        problems.append(f"{name}: found {size} bytes, expected at most {MOST_GUIDE_BYTES}; send a smaller one")
    return problems


def _bias_problems(pairs: Sequence[tuple[Any, float]], things_name: str, numbers_name: str) -> list[str]:
    """What is wrong with the biases of token ids or of words."""
    things, numbers = [thing for thing, _ in pairs], [number for _, number in pairs]
    problems = []
    if len(pairs) > MOST_BIASES:
        problems.append(f"{things_name}: found {len(pairs)}, expected at most {MOST_BIASES}; send fewer")
    words = [thing for thing in things if isinstance(thing, str)]
    problems += [
        f"{things_name}: {problem}" for problem in _surrogates(words) or size_problem([word.encode() for word in words])
    ]
    ids = [thing for thing in things if not isinstance(thing, str)]
    wrong = next((token for token in ids if token < 0), None)
    if wrong is not None:
        problems.append(f"{things_name}: found {wrong}, expected token ids from 0 on; leave it out")
    if len(set(ids)) < len(ids):
        twice = next(token for token, count in Counter(ids).items() if count > 1)
        problems.append(f"{things_name}: found {twice} more than once, expected each id once; send one number for it")
    odd = next((number for number in numbers if not _SHIFT.holds(number)), None)
    if odd is not None:
        problems.append(f"{numbers_name}: found {odd!r}, expected {_SHIFT.expected}; send -1000 to rule a token out")
    return problems


def _surrogates(texts: Sequence[str]) -> list[str]:
    """What is wrong with texts that are not valid Unicode, which in-process callers may pass."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        return [
            f"found half a surrogate pair at character {error.start}, expected Unicode; send a text of whole characters"
        ]
    return []


def size_problem(words: Sequence[bytes]) -> list[str]:
    """What is wrong with the number or the bytes of stop or bad words."""
    sizes = [len(word) for word in words]
    if len(sizes) > MAX_WORDS:
        return [f"found {len(sizes)} words, expected at most {MAX_WORDS}; send fewer"]
    if max(sizes, default=0) > MAX_WORD_BYTES:
        return [f"found a word of {max(sizes)} bytes, expected at most {MAX_WORD_BYTES} each; send a part of it"]
    if sum(sizes) > MAX_WORD_BYTES_IN_ALL:
        return [f"found {sum(sizes)} bytes, expected at most {MAX_WORD_BYTES_IN_ALL} in all words; send fewer"]
    return []


def refusal(problems: list[str]) -> RequestError:
    """The error of a request with these problems."""
    return RequestError(f"reading the request:{listing(problems, most=len(problems))}")
