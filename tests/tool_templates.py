"""Chat templates that write calls of tools as those of published models do, cut down to what decides the text.

Each follows the template that its model is published with: Qwen/Qwen3-Coder-30B-A3B-Instruct; ibm-granite's
granite-3.0-3b-a800m-instruct as vLLM completes it (examples/tool_chat_template_granite.jinja), and 3.1's list;
meta-llama/Llama-3.1-8B-Instruct; Mistral-7B-Instruct-v0.3 and Mistral-Small-3.2-24B-Instruct-2506.
"""

from __future__ import annotations

TURNS = "{% for m in messages %}"
PROMPT = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}"
BEGIN, END = "@begin@", "@end@"  # around what the model writes

_SHOWN = "{% if tools %}{{ tools | tojson }}"
_CALLS = "{% if m.tool_calls %}" + BEGIN + "{{ m.content }}"


def _template(shown: str, calls: str) -> str:
    return f"{_SHOWN}{shown}{{% endif %}}{TURNS}{_CALLS}{calls}{END}{PLAIN}{PROMPT}"


TEMPLATES = {
    "hermes": _template(
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
        '{% for c in m.tool_calls %}{{ "\\n<tool_call>\\n" + {"name": c.function.name, "arguments": '
        'c.function.arguments} | tojson + "\\n</tool_call>" }}{% endfor %}',
    ),
    "qwen3_coder": _template(
        "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\n",
        '{% for c in m.tool_calls %}{{ "\\n<tool_call>\\n<function=" + c.function.name + ">\\n" }}'
        "{% for key, value in c.function.arguments.items() %}"
        '{{ "<parameter=" + key + ">\\n" }}{{ value | tojson if value is mapping or (value is sequence and value is '
        'not string) else value | string }}{{ "\\n</parameter>\\n" }}'
        '{% endfor %}{{ "</function>\\n</tool_call>" }}{% endfor %}',
    ),
    "granite": _template(
        "respond with <|tool_call|> followed by a JSON list",
        '{% for c in m.tool_calls %}{{ "<|tool_call|> " + {"name": c.function.name, "arguments": '
        "c.function.arguments} | tojson }}\n{% endfor %}",
    ),
    "granite list": _template(
        "respond with <|tool_call|> followed by a JSON list",
        "<tool_call>[{% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': c.function.arguments} | "
        "tojson }}{{ ', ' if not loop.last }}{% endfor %}]",
    ),
    "llama": _template(
        '{"name": function name, "parameters": dictionary of argument name and its value}',
        '{% for c in m.tool_calls %}{{ \'{"name": "\' + c.function.name + \'", "parameters": \' }}'
        "{{ c.function.arguments | tojson }}{{ '}' }}{{ '; ' if not loop.last }}{% endfor %}",
    ),
    "mistral": _template(
        "[AVAILABLE_TOOLS]",
        "[TOOL_CALLS] [{% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': c.function.arguments} | "
        "tojson }}{{ ', ' if not loop.last }}{% endfor %}]",
    ),
    "mistral named": _template(
        "[AVAILABLE_TOOLS]",
        "{% for c in m.tool_calls %}{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' + c.function.arguments | tojson }}"
        "{% endfor %}",
    ),
}


def written(name: str, content: str, calls: list[tuple[str, dict]]) -> str:
    """What a model of a template writes for a text and calls, as transformers renders it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    message = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls],
    }
    ((text,), _) = render_jinja_template(conversations=[[message]], chat_template=TEMPLATES[name])
    return text.partition(BEGIN)[2].partition(END)[0]
