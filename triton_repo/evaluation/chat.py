"""Renders a task's conversation by the chat template that engine.json holds.

template = ChatTemplate(manifest.tokenizer)
template.render([{"role": "user", "content": "2+2?"}], add_generation_prompt=True)
"""

from __future__ import annotations

import logging

from export.errors import named
from export.tokenizer.chat_template import ChatTemplate as Renderer
from export.tokenizer.chat_template import Messages, TemplateError
from export.tokenizer.settings import DEFAULT_TEMPLATE, TokenizerFacts
from triton_repo.evaluation.errors import EvaluationError

logger = logging.getLogger(__name__)


class ChatTemplate:
    """The main chat template of a tokenizer. Raises EvaluationError if there is none or if it is no Jinja."""

    def __init__(self, facts: TokenizerFacts | None) -> None:
        text = facts.chat_templates.get(DEFAULT_TEMPLATE) if facts else None
        if facts is None or text is None:
            raise EvaluationError(
                "applying the chat template: the engine has none, as its checkpoint had none; leave --chat-template out"
            )
        self.text = text
        try:
            self._renderer = Renderer(text, facts.special_tokens)
        except TemplateError as error:
            raise EvaluationError(f"reading the engine's chat template: {error}") from error

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """The text of a conversation. Without `add_generation_prompt` it ends with the last message, so that a model
        continues that.

        A template that refuses system messages is asked again without them, as `lm_eval`'s model `hf` does. Raises
        EvaluationError for a template that fails.
        """
        try:
            return self._rendered(messages, add_generation_prompt)
        except TemplateError as error:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise _failed(error) from error
            logger.warning("the chat template takes no system messages (%s): they are left out", named(error, 200))
        try:
            return self._rendered(others, add_generation_prompt)
        except TemplateError as error:
            raise _failed(error) from error

    def _rendered(self, messages: Messages, add_generation_prompt: bool) -> str:
        return self._renderer.render(
            messages, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )


def _failed(error: TemplateError) -> EvaluationError:
    return EvaluationError(f"applying the engine's chat template: it fails ({error}); leave --chat-template out")
