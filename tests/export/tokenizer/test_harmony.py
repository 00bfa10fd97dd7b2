"""A tokenizer and a chat template in the style of OpenAI's harmony format, read and rendered as transformers does.

The template is written for these tests after the description of the format (github.com/openai/harmony): a system
message with channels and a date, a developer message with tools as TypeScript types, reasoning in the channel analysis,
calls of tools in the channel commentary.
"""

from __future__ import annotations

import json

import pytest
from harmony_tokenizer import write_harmony_tokenizer
from transformers import AutoTokenizer

from export.tokenizer.chat_template import ChatTemplate
from export.tokenizer.settings import read_settings

TEMPLATE = """
{#- The type of a parameter, in TypeScript's words #}
{%- macro type_of(spec) -%}
    {%- if spec.type == "array" -%}{{ type_of(spec["items"]) }}[]
    {%- elif spec.enum is defined -%}{{ spec.enum | map("tojson") | join(" | ") }}
    {%- elif spec.type in ("integer", "number") -%}number
    {%- else -%}{{ spec.type }}
    {%- endif -%}
{%- endmacro -%}
{%- macro functions(tools) -%}
    {{- "## functions\\n\\nnamespace functions {\\n\\n" }}
    {%- for tool in tools %}
        {%- set one = tool.function %}
        {{- "// " + one.description + "\\n" }}
        {{- "type " + one.name + " = (_: {\\n" }}
        {%- for name, spec in one.parameters.properties.items() %}
            {{- name }}{{ "" if name in one.parameters.required | default([]) else "?" }}: {{ type_of(spec) + ",\\n" }}
        {%- endfor %}
        {{- "}) => any;\\n\\n" }}
    {%- endfor %}
    {{- "} // namespace functions" }}
{%- endmacro -%}
{%- set state = namespace(call=none, first=0, instructions="") -%}
{%- if messages[0].role in ("system", "developer") %}
    {%- set state.instructions = messages[0].content %}
    {%- set state.first = 1 %}
{%- endif %}
{{- "<|start|>system<|message|>You write answers.\\nKnowledge cutoff: 2024-06\\n" }}
{{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
{{- "Reasoning: " + (reasoning_effort | default("medium")) + "\\n\\n# Valid channels: analysis, " }}
{{- "commentary, final.<|end|>" }}
{%- if state.instructions or tools %}
    {{- "<|start|>developer<|message|>" }}
    {%- if state.instructions %}{{ "# Instructions\\n\\n" + state.instructions + "\\n\\n" }}{% endif %}
    {%- if tools %}{{ "# Tools\\n\\n" + functions(tools) }}{% endif %}
    {{- "<|end|>" }}
{%- endif %}
{%- for message in messages[state.first:] %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {%- if message.tool_calls | length > 1 %}{{ raise_exception("one call at a time") }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {%- set state.call = call.name %}
        {%- if message.thinking %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif %}
        {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary <|constrain|>json<|message|>" }}
        {{- call.arguments | tojson + "<|call|>" }}
    {%- elif message.role == "assistant" %}
        {%- if loop.last and not add_generation_prompt and message.thinking %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content }}
        {{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" }}
    {%- elif message.role == "tool" %}
        {%- if state.call is none %}{{ raise_exception("no call before the tool's message") }}{% endif %}
        {{- "<|start|>functions." + state.call + " to=assistant<|channel|>commentary<|message|>" }}
        {{- message.content | tojson + "<|end|>" }}
    {%- else %}
        {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start|>assistant" }}{% endif %}
"""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather", "description": "The weather of a place.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string"}, "days": {"type": "integer"},
                    "unit": {"type": "string", "enum": ["°C", "°F"]},
                    "kinds": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["place"],
            },
        },
    }
]  # fmt: skip
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich <x>", "days": 2}}}
ASK = [{"role": "user", "content": "Is it <warm> in Zürich?"}]
CALLED = [
    {"role": "developer", "content": "Be brief."}, *ASK,
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "The tool knows."},
    {"role": "tool", "content": '{"degrees": 21}'},
]  # fmt: skip
ANSWERED = [*CALLED, {"role": "assistant", "content": "Yes, 21 °C.", "reasoning": "It said 21."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a tokenizer in the form of openai/gpt-oss-20b's."""
    folder = tmp_path_factory.mktemp("harmony")
    write_harmony_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    return folder


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize(
    ("messages", "generate"),
    [(ASK, True), (CALLED, True), (ANSWERED, True), (ASK, False), (ANSWERED, False)],
    ids=["asked", "called", "answered", "question continued", "answer continued"],
)
def test_a_conversation_is_rendered_and_encoded_as_transformers_does(folder, messages, tools, generate):
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = read_settings(folder, {"model_type": "gpt_oss"})
    template = ChatTemplate(ours.facts.chat_templates["default"], ours.facts.special_tokens)
    rule = {"add_generation_prompt": True} if generate else {"continue_final_message": True}
    expected = theirs.apply_chat_template(messages, tokenize=False, tools=tools, reasoning_effort="high", **rule)
    variables = {"reasoning_effort": "high"}
    rule = {"add_generation_prompt": generate, "continue_final_message": not generate}
    found = template.render(messages, tools=tools, variables=variables, **rule)
    assert found == expected
    ids = theirs(found, add_special_tokens=False)["input_ids"]
    assert ours.tokenizer.encode_prompt(found) == ids
    assert ours.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert theirs.decode(ids) == found
