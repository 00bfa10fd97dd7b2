"""An engine as a language model of lm-evaluation-harness.

    model = EngineModel(session, load_tokenizer(engine.folder), lanes=8)
    lm_eval.evaluator.evaluate(model, TaskManager().load(["arc_easy"]))

Texts become tokens as `lm_eval`'s model `hf` makes them: the harness parts context and continuation, prompts get what
the checkpoint's tokenizer puts before them unless they begin with the start token, and an empty context is the start
token, or the end token where there is none. This module imports lm_eval; only `triton_repo.evaluation.run` imports it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from export.errors import shown
from export.tokenizer.loading import Tokenizer
from triton_repo.evaluation.chat import ChatTemplate
from triton_repo.evaluation.errors import EvaluationError
from triton_repo.evaluation.generating import SEED, Prompt, generate, read_settings
from triton_repo.evaluation.scoring import Continuation, Score, num_truncated, score
from trt_build.ort.session import Session

logger = logging.getLogger(__name__)

BLOCK_LETTERS = 4 << 20
MOST_NEW_TOKENS = 256  # of an answer whose task names no limit, as in lm_eval's model hf
Progress = Callable[[str, int, int], object]  # what is counted, how many are done, of how many


def _blocks(requests: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Requests in their order, in runs of at most BLOCK_LETTERS of text, or of one request. Only the tokens of one run
    are in memory: as Python's numbers they take ten times the text."""
    begin, letters = 0, 0
    for place, request in enumerate(requests):
        size = sum(len(text) for text in request.args if isinstance(text, str))
        if place > begin and letters + size > BLOCK_LETTERS:
            yield requests[begin:place]
            begin, letters = place, 0
        letters += size
    if begin < len(requests):
        yield requests[begin:]


def _quiet(_what: str, _done: int, _total: int) -> None:
    pass


class EngineModel(TemplateLM):
    """A session and its tokenizer. `lanes` is the most sequences in a step. `truncated` counts contexts that lost their
    beginning because the engine takes no more tokens."""

    backend = "causal"

    def __init__(self, session: Session, tokenizer: Tokenizer, lanes: int, progress: Progress = _quiet) -> None:
        super().__init__()
        self.truncated = 0
        self._session, self._encoder, self._lanes, self._progress = session, tokenizer, lanes, progress
        manifest = session.engine.manifest
        special = {} if manifest.tokenizer is None else manifest.tokenizer.special_tokens
        self._end = tokenizer.backend.token_to_id(special.get("eos_token", ""))
        if self._end is None:
            self._end = next(iter(manifest.eos_token_ids), None)
        start = tokenizer.backend.token_to_id(special.get("bos_token", ""))
        self._prefix = self._end if start is None else start
        self._prefix_text = "" if self._prefix is None else tokenizer.backend.id_to_token(self._prefix)
        self._template: ChatTemplate | None = None
        self._showing = ("", 0, 0, 0)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises EvaluationError if the engine has none."""
        if self._end is None:
            raise EvaluationError(
                f"evaluating the engine {self._session.engine.folder}: neither engine.json nor the tokenizer names an "
                "end token, and the task needs one; add eos_token_id to the checkpoint's generation_config.json and "
                "build the engine again"
            )
        return int(self._end)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: the start token, or the end token if there is none."""
        return self.eot_token_id if self._prefix is None else int(self._prefix)

    @property
    def max_length(self) -> int:
        return self._session.max_sequence

    @property
    def max_gen_toks(self) -> int:
        return MOST_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's own cache of requests, which is not used."""
        return str(self._session.engine.folder).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any) -> list[int]:  # noqa: ANN401 - the harness's signature
        if add_special_tokens is None:
            add_special_tokens = not (self._prefix_text and string.startswith(self._prefix_text))
        return list(self._encoder.backend.encode(string, add_special_tokens=add_special_tokens).ids)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-probability of each continuation after its context, and whether it is what greedy decoding gives."""
        found: list[tuple[float, bool]] = []
        for block in _blocks(requests):
            self._show("continuations", len(found), len(block), len(requests))
            found += super().loglikelihood(block, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        **_kwargs: Any,  # noqa: ANN401 - the harness's signature
    ) -> list[tuple[float, bool]]:
        for texts, context, target in requests:
            if not context or not target:
                raise EvaluationError(
                    f"scoring {shown(texts)}: found a context of {len(context)} tokens and a continuation of "
                    f"{len(target)}, expected at least one of each; if the tokenizer joined the continuation with the "
                    "context's end, let the task put a space between them (target_delimiter)"
                )
        continuations = [Continuation(context=tuple(context), target=tuple(target)) for _, context, target in requests]
        self.truncated += num_truncated(continuations, self.max_length)
        return [(found.log_prob, found.is_greedy) for found in self._scored(continuations)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002 - the harness's signature
        """The log-likelihood of each text, in windows that overlap by no predicted token."""
        found: list[float] = []
        for block in _blocks(requests):
            windows = [self._windows(request.args[0]) for request in block]
            self._show("texts", len(found), len(block), len(requests))
            scores = iter(self._scored([window for every in windows for window in every]))
            found += [sum(next(scores).log_prob for _ in every) for every in windows]
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002 - the harness's signature
        """The text that continues each context."""
        found: list[str] = []
        for block in _blocks(requests):
            prompts = [
                self._prompt(request.args[0], request.args[1], place) for place, request in enumerate(block, len(found))
            ]
            self._show("answers", len(found), len(block), len(requests))
            found += generate(self._session, self._encoder, prompts, self._lanes, self._counted(len(prompts)))
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self._template is None:
            self._template = ChatTemplate(self._session.engine.manifest.tokenizer)
        return self._template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def _scored(self, continuations: Sequence[Continuation]) -> list[Score]:
        return score(self._session, continuations, self._lanes, self._counted(len(continuations)))

    def _windows(self, text: str) -> list[Continuation]:
        pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
        return [
            Continuation(context=tuple(context), target=tuple(target))
            for context, target in map(make_disjoint_window, pairs)
        ]

    def _show(self, what: str, done: int, now: int, total: int) -> None:
        """Say what the block that is computed next is: `now` requests after `done` ones, of `total`."""
        self._showing = (what, done, now, total)

    def _counted(self, num_parts: int) -> Callable[[int], object]:
        """Tells the progress of a block of so many parts. Texts are computed in windows, others as they are."""
        what, done, now, total = self._showing
        return lambda parts: self._progress(what, done + now * parts // num_parts, total)

    def _prompt(self, context: str, task_kwargs: dict[str, Any], place: int) -> Prompt:
        """What one request asks for. The context keeps as many of its last tokens as leave room for the answer."""
        settings = read_settings(task_kwargs, self.max_gen_toks)
        room = self.max_length - settings.most_tokens
        if room < 1:
            raise EvaluationError(
                f"answering a task: it asks for {settings.most_tokens} new tokens, expected fewer than the "
                f"{self.max_length} that the engine takes with the prompt; build the engine with a larger "
                "--max-sequence, or give the task a smaller max_gen_toks"
            )
        token_ids = self.tok_encode(context) or [self.prefix_token_id]
        self.truncated += len(token_ids) > room
        end = None if self._end is None else self._encoder.backend.id_to_token(self._end)
        return Prompt(
            token_ids=tuple(token_ids[-room:]),
            most_tokens=settings.most_tokens,
            until=tuple(dict.fromkeys([*settings.until, *([end] if end else [])])),
            options=dataclasses.replace(settings.options, random_seed=SEED + place),
        )
