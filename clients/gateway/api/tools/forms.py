"""The forms in which models write calls of tools. Each family has its own, and its chat template shows which.

The forms have the names of vLLM's parsers (docs/features/tool_calling of vLLM):

- hermes, as Qwen's templates have it: `<tool_call>\\n{"name": "add", "arguments": {"a": 7}}\\n</tool_call>` for each
- qwen3_coder: `<tool_call>\\n<function=add>\\n<parameter=a>\\n7\\n</parameter>\\n</function>\\n</tool_call>` for each
- granite, of Granite 3: `<|tool_call|>[{"name": "add", "arguments": {"a": 7}}, ...]`, and `<tool_call>` in place of the
  special token from 3.1 on (vllm/entrypoints/openai/tool_parsers/granite_tool_parser.py)
- llama3_json: `{"name": "add", "parameters": {"a": 7}}` as the whole answer, behind `<|python_tag|>` or not; further
  calls follow behind a semicolon (llama_tool_parser.py there)
- mistral, as Mistral's had it until their version 7: `[TOOL_CALLS] [{"name": "add", "arguments": {"a": 7}}, ...]`
- mistral from version 11 on: `[TOOL_CALLS]add[ARGS]{"a": 7}` for each, with `[CALL_ID]` and an id behind the name in
  some (mistral-common, src/mistral_common/tokens/tokenizers/instruct.py)

What a model of another form writes stays the answer's text. A call that is required is written under a JSON schema,
whatever the form.
"""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass

FUNCTION = "<function="  # what begins a call of qwen3_coder; models leave out the line before it now and then
_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a model writes calls. Without `begins` it writes them where they are required alone."""

    begins: tuple[str, ...] = ()  # the texts that may stand before a call, or before a list of calls
    end: str | None = None  # the text behind it
    between: str = ""  # characters beside white space that may stand before a call
    may_be_bare: bool = False  # whether an answer that is a call may lack the begin
    others: tuple[str, ...] = ()  # special tokens within a call
    is_list: bool = False  # whether a required call is the list's only one
    arguments: str = "arguments"  # the key that a required call's arguments have
    prefill: str = ""  # what a prompt ends with whose answer must be a call
    has_short_ids: bool = False

    def call_id(self) -> str:
        """A new id for a call. Mistral's templates refuse others than nine letters and digits."""
        if self.has_short_ids:
            return "".join(secrets.choice(_LETTERS) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


HERMES = Form(begins=("<tool_call>",), end="</tool_call>", prefill="<tool_call>\n")
QWEN_CODER = Form(begins=("<tool_call>", FUNCTION), end="</tool_call>")
GRANITE = Form(
    begins=("<|tool_call|>", "<tool_call>"), end="]", between="[,", is_list=True, prefill="<|tool_call|>"
)  # fmt: skip
LLAMA = Form(begins=("<|python_tag|>",), between=";", may_be_bare=True, arguments="parameters")
MISTRAL = Form(
    begins=("[TOOL_CALLS]",), end="]", between="[,", is_list=True, prefill="[TOOL_CALLS]", has_short_ids=True
)  # fmt: skip
MISTRAL_NAMED = Form(begins=("[TOOL_CALLS]",), others=("[CALL_ID]", "[ARGS]"), has_short_ids=True)
UNKNOWN = Form()

# What a template has of each form, and what it has not: the first that fits.
_SIGNS: tuple[tuple[Form, tuple[str, ...], tuple[str, ...]], ...] = (
    (GRANITE, ("<|tool_call|>",), ()),
    (QWEN_CODER, ("<tool_call>", FUNCTION, "<parameter="), ()),
    (HERMES, ("<tool_call>",), (FUNCTION, "<arg_key>")),  # the latter is GLM's
    (MISTRAL_NAMED, ("[TOOL_CALLS]", "[ARGS]"), ()),
    (MISTRAL, ("[TOOL_CALLS]",), ()),
    (LLAMA, ('{"name": function name, "parameters": dictionary',), ()),
)


def form_of(template: str) -> Form:
    """The form of a model's calls, by its chat template."""
    for form, signs, others in _SIGNS:
        if all(sign in template for sign in signs) and not any(other in template for other in others):
            return form
    return UNKNOWN
