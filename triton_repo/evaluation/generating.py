"""Texts that continue prompts until a stop text, by the engine of sequences that serves.

    texts = generate(session, tokenizer, [Prompt(token_ids=(1, 5), most_tokens=256, until=("\\n",))], slots=8)

What counts as the text is `lm_eval`'s rule for its model `hf`: the new tokens are decoded by themselves, without
special tokens, and the text ends before the first of the stop texts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from export.errors import shown, suggestion
from export.tokenizer.loading import Tokenizer
from triton_repo.evaluation.errors import EvaluationError
from triton_repo.evaluation.scoring import Tokens, lanes_that_fit
from triton_repo.runtime.batching.alone import never
from triton_repo.runtime.batching.engine import SequenceEngine
from triton_repo.runtime.batching.memory.slots import Slots
from triton_repo.runtime.batching.outlet import Outlet
from triton_repo.runtime.batching.scheduler import Limits
from triton_repo.runtime.batching.sequence import Request
from triton_repo.runtime.options import SamplingOptions, SamplingPlan, value_problems
from triton_repo.runtime.sampling import Choice, Sampler
from triton_repo.runtime.text.detokenizer import Detokenizer
from triton_repo.runtime.text.stopping import StopWatcher
from trt_build.ort.session import Session

SEED = 1234  # of the first answer that is drawn; the next one has the next seed
_FOREVER_S = 1e12
# Keyword arguments of a task's generation_kwargs that are honoured, beside do_sample, until and the limit of tokens.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is there counts


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of at least one token, and how it is continued. `until`: texts that end the answer, none empty."""

    token_ids: Tokens
    most_tokens: int
    until: tuple[str, ...] = ()
    options: SamplingOptions = field(default_factory=SamplingOptions)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a task's generation_kwargs ask for; greedy unless they set do_sample or a temperature."""

    most_tokens: int
    until: tuple[str, ...]
    options: SamplingOptions


def read_settings(task_kwargs: Mapping[str, Any], most_tokens: int) -> Settings:
    """The settings in a task's generation_kwargs; `most_tokens` is the limit where they name none. Raises
    EvaluationError for a key or value that is not honoured."""
    kwargs = dict(task_kwargs)
    limits = [kwargs.pop(name, None) for name in _LIMITS]
    limit = next((value for value in limits if value is not None), most_tokens)
    until = kwargs.pop("until", None) or ()
    sampled = {name: kwargs.pop(name) for name in _SAMPLING if kwargs.get(name) is not None}
    does_sample = kwargs.pop("do_sample", None)
    doing = "reading generation_kwargs of a task"
    if kwargs:
        name = str(next(iter(kwargs)))
        raise EvaluationError(
            f"{doing}: found {shown(name)}{suggestion(name, (*_SAMPLING, *_LIMITS, 'until', 'do_sample'))}, expected "
            f"do_sample, until, {_LIMITS[0]}, {', '.join(_SAMPLING)}; take it out of the task's YAML"
        )
    words = (until,) if isinstance(until, str) else until
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise EvaluationError(f"{doing}: until is {shown(until)}, expected a text or a list of texts")
    if type(limit) is not int or limit < 1:
        raise EvaluationError(f"{doing}: {_LIMITS[0]} is {shown(limit)}, expected a number of tokens from 1 on")
    if does_sample is not None and not isinstance(does_sample, bool):
        raise EvaluationError(f"{doing}: do_sample is {shown(does_sample)}, expected true or false")
    return Settings(
        most_tokens=limit,
        until=tuple(word for word in words if word),
        options=_options(sampled, does_sample, doing),
    )


def _options(sampled: Mapping[str, Any], does_sample: bool | None, doing: str) -> SamplingOptions:
    """How tokens are chosen. Where a task does not say, a temperature means to draw, as in lm_eval."""
    odd = [name for name, value in sampled.items() if isinstance(value, bool) or not isinstance(value, int | float)]
    problems = [f"{name}: found {shown(sampled[name])}, expected a number" for name in odd]
    problems = problems or value_problems(sampled, {})
    if problems:
        raise EvaluationError(f"{doing}: {problems[0]}")
    if not (sampled.get("temperature", 0) > 0 if does_sample is None else does_sample):
        return SamplingOptions(repetition_penalty=sampled.get("repetition_penalty", 1.0))
    # For the server a temperature alone is greedy: to draw among all tokens has to be said.
    cuts = any(sampled.get(name) for name in ("top_k", "top_p", "min_p"))
    return SamplingOptions(**sampled) if cuts else SamplingOptions(**{**sampled, "top_p": 1.0})


class _Writer:
    """Collects the tokens of one answer until its text has a stop text, an end token comes, or the limit is reached
    (`triton_repo.runtime.batching.sequence.Writer`)."""

    wants_prompt = wants_routing = False
    num_prompt_tops = 0

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> None:
        self._prompt, self._tokenizer, self._end_ids = prompt, tokenizer, end_ids
        plan = SamplingPlan(options=prompt.options, prompt_ids=prompt.token_ids, end_ids=end_ids)
        self.sampler = Sampler(plan, tokenizer.size)
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopWatcher(prompt.until)
        self._token_ids: list[int] = []

    def write(self, choice: Choice) -> tuple[str | None, str]:
        """Take the next token. Returns the whole text with the last one."""
        if choice.token_id in self._end_ids:
            return self._text(), "stop"
        self._token_ids.append(choice.token_id)
        _, has_stopped = self._stop.push(self._detokenizer.push(choice.token_id))
        if has_stopped:
            return self._text(), "stop"
        return (self._text(), "length") if len(self._token_ids) == self._prompt.most_tokens else (None, "")

    def cancel(self) -> str:
        """The text of an answer that nobody waits for."""
        return self._text()

    def take_prompt(self, log_probs: Sequence[float], tops: Sequence[Any]) -> None:
        """Does nothing: the prompt's log-probabilities are not asked for."""

    def _text(self) -> str:
        text = self._tokenizer.decode(self._token_ids)
        for word in self._prompt.until:
            text = text.partition(word)[0]
        return text


def generate(
    session: Session,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    slots: int,
    progress: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """The texts that continue prompts, in their order. At most `slots` are computed at a time, fewer where their keys
    and values would not fit into the free memory. `progress` is called with the number of texts so far.

    A prompt and its limit of tokens must fit into the engine together. Raises RequestError for logits that are not
    finite.
    """
    if not prompts:
        return []
    longest = max(len(prompt.token_ids) + prompt.most_tokens for prompt in prompts)
    cache = session.new_cache(lanes_that_fit(session, min(slots, len(prompts)), longest))
    count = cache.num_slots
    limits = Limits(slots=count, max_waiting=count, max_wait_s=_FOREVER_S, pause_target_s=_FOREVER_S)
    budget = count * cache.bytes_of(cache.positions)
    engine = SequenceEngine(session, cache, Slots(cache, budget), num_tokens=tokenizer.size, limits=limits)
    texts: dict[int, str] = {}
    failures: list[Exception] = []
    # The longest first: the last answers that run are then short ones.
    waiting = deque(sorted(range(len(prompts)), key=lambda place: -len(prompts[place].token_ids)))
    end_ids = session.engine.manifest.eos_token_ids
    while waiting or engine.has_work():
        while waiting and engine.refusal() is None:
            place = waiting.popleft()
            outlet = Outlet(partial(_keep, texts, place), failures.append, never)
            engine.submit(_request(prompts[place], _Writer(prompts[place], tokenizer, end_ids), outlet))
        engine.step()
        if failures:
            raise failures[0]
        progress(len(texts))
    return [texts[place] for place in range(len(prompts))]


def _keep(texts: dict[int, str], place: int, text: str, _is_last: bool) -> None:
    texts[place] = text


def _request(prompt: Prompt, writer: _Writer, outlet: Outlet[str]) -> Request[str]:
    return Request(
        names=frozenset(),
        prompt_ids=prompt.token_ids,
        most_tokens=prompt.most_tokens,
        writers=[writer],
        outlet=outlet,
    )
