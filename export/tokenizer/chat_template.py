"""Renders a conversation by a tokenizer's chat template, with Jinja in its sandbox, as transformers does.

    template = ChatTemplate(facts.chat_templates[DEFAULT_TEMPLATE], facts.special_tokens)
    template.render([{"role": "user", "content": "2+2?"}], add_generation_prompt=True)

A template is a program of whoever made the checkpoint. In the sandbox it can call no function and reach no attribute
that could do more than make text. It can still take any time and memory: whoever renders what others send must bound
both.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from export.errors import MoeshipError, named
from export.optional import optional_package

# Stands behind a last message that is to be continued while the template is rendered, and shows where that ends. By its
# last letter, a space, it is seen whether a template strips messages.
_MARK = "the-last-message-ends-here "
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning, the first that is there

Messages = Sequence[Mapping[str, Any]]


class TemplateError(MoeshipError):
    """A chat template is no Jinja, refuses a conversation, or fails. The text says which, in the template's words."""


class ChatTemplate:
    """One chat template: its Jinja text, and the special tokens by name that it may use. Raises TemplateError for a
    text that is no Jinja, and MissingPackageError that names `extra` where Jinja is not installed."""

    def __init__(self, text: str, special_tokens: Mapping[str, str], *, extra: str = "eval") -> None:
        self._special_tokens = dict(special_tokens)
        with optional_package("jinja2", "a chat template", extra):
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
            self._template = environment.from_string(text)
        except jinja2.exceptions.TemplateError as error:
            raise TemplateError(f"it is no Jinja ({named(error, 400)})") from error

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation. With `continue_final_message` it ends with the last message's content, so that a
        model continues that. `variables` are further ones that the template may read. Raises TemplateError."""
        last = messages[-1]["content"] if continue_final_message else ""
        if continue_final_message:
            messages = [*messages[:-1], {**messages[-1], "content": last + _MARK}]
        try:
            text = self._template.render(
                {
                    "documents": None,
                    **self._special_tokens,
                    **(variables or {}),
                    "messages": [_with_reasoning(message) for message in messages],
                    "tools": tools,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except Exception as error:  # the template's own refusal, or whatever its expressions raise
            raise TemplateError(_reason(error)) from error
        return _cut(text, last) if continue_final_message else text

    def _refuse(self, message: str) -> None:
        raise self._jinja_error(message)


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it takes more memory than there is for it"
    return named(error, 400) if str(error).strip() else f"it failed with {type(error).__name__}"


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose reasoning, where it has one, stands under both names that templates read: `reasoning_content`,
    and `thinking`, which those of gpt-oss read. Source: transformers, _alias_reasoning_fields of
    utils/chat_template_utils.py."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return dict(message) if found is None else {"thinking": found, **message, "reasoning_content": found}


def _cut(text: str, last: str) -> str:
    """The text up to the end of the last message, which the mark shows: what the template writes behind the message may
    have its text too. Raises TemplateError if the template changed that message."""
    place = text.rfind(_MARK.rstrip())
    if place < 0 or last.strip() not in text:
        raise TemplateError("the last message is not in the text, expected it there to be continued")
    # Templates strip messages, and would have stripped this one without the mark. Source: transformers,
    # render_jinja_template of utils/chat_template_utils.py.
    return text[:place] if text.startswith(_MARK, place) else text[:place].rstrip()


def _as_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_options: Any) -> str:  # noqa: ANN401 - any value of a template
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
