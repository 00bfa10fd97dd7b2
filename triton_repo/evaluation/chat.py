"""Renders a conversation by the chat template that engine.json holds.

    template = ChatTemplate(manifest.tokenizer)
    template.render([{"role": "user", "content": "2+2?"}], add_generation_prompt=True)

A template is a program of whoever made the checkpoint. Jinja runs it in its sandbox, as transformers does: it can call
no function and reach no attribute that could do more than make text.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from export.errors import named
from export.optional import optional_package
from export.tokenizer.settings import DEFAULT_TEMPLATE, TokenizerFacts
from triton_repo.evaluation.errors import EvaluationError

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, str]]


class ChatTemplate:
    """The main chat template of a tokenizer. Raises EvaluationError if there is none or if it is no Jinja."""

    def __init__(self, facts: TokenizerFacts | None) -> None:
        self.text = facts.chat_templates.get(DEFAULT_TEMPLATE) if facts else None
        if facts is None or self.text is None:
            raise EvaluationError(
                "applying the chat template: the engine has none, as its checkpoint had none; leave --chat-template out"
            )
        self._special_tokens = dict(facts.special_tokens)
        with optional_package("jinja2", "a chat template", "eval"):
            import jinja2
            import jinja2.ext
            import jinja2.sandbox

        class Generation(jinja2.ext.Extension):
            """{% generation %} marks the assistant's words for training; here it changes nothing."""

            tags = {"generation"}  # noqa: RUF012 - the type that jinja2 declares

            def parse(self, parser: Any) -> Any:  # noqa: ANN401 - jinja2's parser and nodes
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        self._jinja_error = jinja2.exceptions.TemplateError
        # transformers' environment: _compile_jinja_template of utils/chat_template_utils.py.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _as_json
        environment.globals["raise_exception"] = self._refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(self.text)
        except jinja2.exceptions.TemplateError as error:
            raise EvaluationError(
                f"reading the engine's chat template: it is no Jinja ({named(error, 400)})"
            ) from error

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """The text of a conversation. Without `add_generation_prompt` it ends with the last message, so that a model
        continues that.

        A template that refuses system messages is asked again without them, as `lm_eval`'s model `hf` does. Raises
        EvaluationError for a template that fails.
        """
        try:
            return self._render(messages, add_generation_prompt)
        except self._jinja_error as error:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise _failed(error) from error
            logger.warning("the chat template takes no system messages (%s): they are left out", named(error, 200))
        try:
            return self._render(others, add_generation_prompt)
        except self._jinja_error as error:
            raise _failed(error) from error

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except self._jinja_error:
            raise
        except Exception as error:  # whatever the template's expressions raise
            raise _failed(error) from error
        if add_generation_prompt:
            return text
        last = messages[-1]["content"]
        place, length = text.rfind(last), len(last)
        if place < 0:  # templates strip messages
            place, length = text.rfind(last.strip()), len(last.strip())
        if place < 0:
            raise EvaluationError(
                "applying the chat template: the last message is not in the text, expected it there to be continued; "
                "leave --chat-template out"
            )
        return text[: place + length]

    def _refuse(self, message: str) -> None:
        raise self._jinja_error(message)


def _as_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_options: Any) -> str:  # noqa: ANN401 - any value of a template
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _failed(error: Exception) -> EvaluationError:
    return EvaluationError(
        f"applying the engine's chat template: it fails ({named(error, 400)}); leave --chat-template out"
    )
