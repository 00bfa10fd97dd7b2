"""Calls in every form that models write, in the texts that their templates make of them, however they are cut."""

from __future__ import annotations

import itertools
import json
import random
import sys
from types import SimpleNamespace

import pytest
from tool_templates import TEMPLATES, written

from clients.gateway.api.tools.forms import GRANITE, HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, QWEN_CODER, form_of
from clients.gateway.api.tools.offers import reader_of
from clients.gateway.api.tools.reading import CallReader, message_of

PARAMETERS = {
    "type": "object",
    "properties": {
        "text": {"type": "string"}, "count": {"type": "integer"}, "ratio": {"type": "number"},
        "deep": {"type": "object"}, "items": {"type": "array", "items": {}}, "on": {"type": "boolean"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "either": {"type": ["string", "integer"]},
        "named": {"$ref": "#/$defs/size"}, "looped": {"$ref": "#/$defs/loop"}, "fixed": {"const": 3},
        "long": {"enum": [1] * 99_999 + ["a"]}, "free": {}, "odd": True,
    },
    "$defs": {"size": {"enum": [1, 2]}, "loop": {"anyOf": [{"$ref": "#/$defs/loop"}] * 99}},
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "act", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
AUTO = {"tools": TOOLS}
LINES = 'def f():\n    return "a\\n" < b and c > d\n\n# é "}\n'
CALLS = [
    [("act", {"count": 7})],
    [("now", {})],
    [("act", {"text": LINES, "count": -3, "ratio": 0.5, "deep": {"a": [1, {"b": "}"}]}, "items": [1, "]", None]}),
     ("now", {}), ("act", {"on": True, "maybe": "nullable", "text": "null and void", "either": 5, "named": 2})],
    [("act", {"text": "", "items": [], "deep": {}, "free": "7", "odd": "x", "unknown": "7", "looped": "1", "on": False,
              "fixed": 3, "long": 1,
              "ratio": 1e300})],
]  # fmt: skip


def texts_of(*special: str) -> SimpleNamespace:
    """A model's texts whose special tokens are these, from 1 on; the token 0 is a letter."""
    ids = {sign: number for number, sign in enumerate(special, start=1)}
    backend = SimpleNamespace(token_to_id=ids.get)
    return SimpleNamespace(
        tokenizer=SimpleNamespace(backend=backend), special=set(ids.values()), token_bytes=lambda token: b"x"
    )


def read(name: str, parts, values=AUTO, *, is_cut=False) -> tuple[dict, object, list[dict]]:
    """The message, the reader and the deltas of an answer in parts."""
    reader = reader_of(form_of(TEMPLATES[name]), texts_of(), values)
    deltas = []
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        deltas += reader.read(part, (), is_last=is_last, is_cut=is_cut and is_last)
    return message_of(deltas), reader, deltas


def cuts(text: str, source: random.Random):
    """A text as a whole, by characters, and in parts of any size."""
    yield [text]
    yield list(text) or [""]
    for most in (3, 9, 40):
        parts, rest = [], text
        while rest:
            size = source.randint(0, most)
            parts.append(rest[:size])
            rest = rest[size:]
        yield parts


def calls_in(message: dict) -> list[tuple[str, dict]]:
    found = [call["function"] for call in message.get("tool_calls", ())]
    return [(one["name"], json.loads(one["arguments"])) for one in found]


def test_each_template_has_its_form():
    forms = {"hermes": HERMES, "qwen3_coder": QWEN_CODER, "granite": GRANITE, "granite list": GRANITE, "llama": LLAMA,
             "mistral": MISTRAL, "mistral named": MISTRAL_NAMED}  # fmt: skip
    assert {name: form_of(template) for name, template in TEMPLATES.items()} == forms


# A Llama writes calls alone.
WRITTEN = [(name, content) for name, content in itertools.product(
    TEMPLATES, ("", "I look that up.", "{curly} text\n\nof lines")) if name != "llama" or not content]  # fmt: skip


@pytest.mark.parametrize(("name", "content"), WRITTEN)
def test_calls_are_those_that_the_template_wrote(name, content):
    source = random.Random(f"{name}{content}")
    for calls in CALLS:
        text = written(name, content, calls)
        for parts in cuts(text, source):
            message, reader, deltas = read(name, parts)
            assert calls_in(message) == calls, parts
            assert (message["content"] or "") == content
            assert reader.finish_reason("stop") == "tool_calls"
            assert reader.finish_reason("length") == "length"
            assert len({call["id"] for call in message["tool_calls"]}) == len(calls)
            indices = [call["index"] for delta in deltas for call in delta.get("tool_calls", ())]
            assert indices == sorted(indices)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_that_ends_anywhere_is_read_alike_whole_and_in_parts(name):
    """What is cut there is a begin of the arguments, and counts as a call where they are whole."""
    source = random.Random(name)
    text = written(name, "", CALLS[2][:2])
    whole = message_of(read(name, [text])[2])["tool_calls"][0]["function"]["arguments"]
    for end in range(len(text)):
        answers = [read(name, parts, is_cut=True) for parts in cuts(text[:end], source)]
        for message, reader, _ in answers:
            assert message.get("content") == answers[0][0].get("content")
            functions = [call["function"] for call in message.get("tool_calls", ())]
            assert functions == [call["function"] for call in answers[0][0].get("tool_calls", ())]
            assert reader.finish_reason("length") == "length"
            if functions:
                assert whole.startswith(functions[0]["arguments"])
                assert reader.num_calls == sum(is_json(one["arguments"]) for one in functions)


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


ENDS = [
    ("hermes", '<tool_call>\n{"name": "act", "arguments": {"count": 7}', {"count": 7}),
    ("hermes", '<tool_call>\n{"name": "act", "arguments": {"count": 7}}', {"count": 7}),
    ("mistral", '[TOOL_CALLS] [{"name": "act", "arguments": {"count": 7}', {"count": 7}),
    ("granite", '<|tool_call|>[{"name": "act", "arguments": {"count": 7}}', {"count": 7}),
    ("llama", '{"name": "act", "parameters": {"count": 7}', {"count": 7}),
    ("qwen3_coder", "<tool_call>\n<function=act>\n<parameter=count>\n7\n</parameter>\n</function>", {"count": 7}),
    ("qwen3_coder", "<tool_call>\n<function=act>\n<parameter=count>\n7\n</parameter>\n</func", {"count": 7}),
    ("qwen3_coder", "<tool_call>\n<function=act>\n<parameter=count>\n7\n</parameter>", {"count": 7}),
    ("qwen3_coder", "<tool_call>\n<function=act>\n", {}),
]


@pytest.mark.parametrize(("name", "text", "arguments"), ENDS)
def test_a_call_that_lacks_only_its_end_is_whole(name, text, arguments):
    for parts in cuts(text, random.Random(1)):
        message, reader, _ = read(name, parts)
        assert calls_in(message) == [("act", arguments)], parts
        assert message["content"] is None
        assert reader.finish_reason("stop") == "tool_calls"


def test_a_call_whose_parameters_are_cut_off_stays_open():
    """A client must not take it for one with fewer parameters."""
    message, reader, _ = read("qwen3_coder", ["<tool_call>\n<function=act>\n<parameter=count>\n7\n</parameter>\n<par"],
                              is_cut=True)  # fmt: skip
    assert message["tool_calls"][0]["function"]["arguments"] == '{"count": 7'
    assert reader.num_calls == 0


# What models write beside their templates: the text, its content, and the arguments of each call.
ODD = [
    ("qwen3_coder", "<function=act>\n<parameter=count>\n7\n</parameter>\n</function>\n</tool_call>", None,
     [{"count": 7}]),
    ("qwen3_coder", "So:\n<tool_call><function=act><parameter=count>7<parameter=text>a</function></tool_call>\n", "So:",
     [{"count": 7, "text": "a"}]),
    ("qwen3_coder", "<tool_call>\n<function=act>\n<parameter=text>\n\na\n\n</parameter>\n</tool_call>", None,
     [{"text": "\na\n"}]),
    ("qwen3_coder", "<tool_call>\n<function=act>\nhm <b> \n<parameter=on>\nTrue\n</parameter> so\n</function>\n"
     "<function=now>\n</function>\n</tool_call>", None, [{"on": True}, {}]),
    ("qwen3_coder", "<tool_call><function=act><parameter=text>\nNULL\n</parameter><parameter=count>\nmany\n</parameter>"
     "<parameter=on>\nyes\n</parameter><parameter=ratio>\n7.0\n</parameter><parameter=deep>\n{'a': True, 1: None}\n"
     "</parameter><parameter=items>\n[1, NaN]\n</parameter></function></tool_call>", None,
     [{"text": None, "count": "many", "on": "yes", "ratio": 7, "deep": {"a": True, "1": None}, "items": "[1, NaN]"}]),
    ("qwen3_coder", "<tool_call><function=act><parameter=ratio>1e999</parameter><parameter=count>7.0</parameter>"
     "<parameter=text>nul</parameter></function></tool_call>", None, [{"ratio": "1e999", "count": 7, "text": "nul"}]),
    ("qwen3_coder", "Use <tool_call> and <function=NAME\n>", "Use <tool_call> and <function=NAME\n>", []),
    ("qwen3_coder", '<tool_call>\n{"name": "now"}', '<tool_call>\n{"name": "now"}', []),
    ("granite", '<|tool_call|>[{"name": "now", "arguments": {}}]', None, [{}]),
    ("granite", "[1, 2] < 3 <tool", "[1, 2] < 3 <tool", []),
    ("llama", '<|python_tag|>{"name": "now", "parameters": {}}', None, [{}]),
    ("llama", '\n {"name": "now", "arguments": {}} ; {"type": "function", "name": "act", "parameters": {"count": 1}}',
     None, [{}, {"count": 1}]),
    ("llama", '{"a": 7} is JSON', '{"a": 7} is JSON', []),
    ("llama", ' \n{"a": 7', ' \n{"a": 7', []),
    ("llama", "<|python_tag|>print(7)", "<|python_tag|>print(7)", []),
    ("llama", "  So {curly} \n", "  So {curly} \n", []),
    ("mistral named", 'I look.[TOOL_CALLS]act[CALL_ID]123456789[ARGS]{"text": "{]}"}[TOOL_CALLS]now{}', "I look.",
     [{"text": "{]}"}, {}]),
    ("mistral named", '[TOOL_CALLS] \nact[ARGS]{"count": 7}', None, [{"count": 7}]),
    ("mistral named", "[TOOL_CALLS] no call", "[TOOL_CALLS] no call", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "arguments"), ODD)
def test_odd_spellings_are_read_alike_whole_and_in_parts(name, text, content, arguments):
    for parts in cuts(text, random.Random(3)):
        message, _, _ = read(name, parts)
        assert [found for _, found in calls_in(message)] == arguments, parts
        assert (message["content"] or None) == content, parts


SPECIAL = {
    "granite": ("<|tool_call|>",), "llama": ("<|python_tag|>",), "mistral": ("[TOOL_CALLS]",),
    "mistral named": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
def test_signs_that_are_special_tokens_are_found_by_their_ids(name):
    """Texts of answers do not show special tokens."""
    text = written(name, "", CALLS[2])
    text = text if name != "llama" else "<|python_tag|>" + text
    text = text.replace("[ARGS]", "[CALL_ID]123456789[ARGS]", 1)  # some of Mistral's write an id
    texts = texts_of(*SPECIAL[name])
    reader, deltas, rest = reader_of(form_of(TEMPLATES[name]), texts, AUTO), [], text
    while rest:
        sign = next((sign for sign in SPECIAL[name] if rest.startswith(sign)), None)
        rest = rest.removeprefix(sign) if sign else rest[1:]
        shown = "" if sign else text[len(text) - len(rest) - 1]
        token = SPECIAL[name].index(sign) + 1 if sign else 0
        # The stand-in's token 0 is a letter: white space has none.
        deltas += reader.read(shown, () if shown.isspace() else (token,), is_last=not rest)
    message = message_of(deltas)
    assert calls_in(message) == CALLS[2]
    assert message["content"] is None


HOSTILE = {
    "begins": lambda form: form.begins[0] * 2_500,
    "white space": lambda form: form.begins[0] + " \n" * 20_000,
    "spaces": lambda form: " \n" * 20_000,
    "signs": lambda form: form.begins[-1] + "<parameter=" * 4_000,
    "a text": lambda form: f"{form.begins[0]}<function=act><parameter=text>" + "</param\n" * 5_000,
    "a value": lambda form: f"{form.begins[0]}<function=act><parameter=deep>" + "[" * 40_000,
    "a name": lambda form: form.begins[0] + '{"name": "' + "a" * 400_000,
    "calls": lambda form: (form.begins[0] + '{"name": "now", "arguments": {}}' + (form.end or "")) * 800,
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "mistral named"])
def test_the_work_for_a_text_grows_with_its_length_alone(name, kind):
    """Counted in lines of Python that run and in the characters that wait: neither depends on the machine."""
    text = HOSTILE[kind](form_of(TEMPLATES[name]))
    quarter, whole = (cost_of(name, text[:size]) for size in (len(text) // 4, len(text)))
    assert whole <= 5 * quarter


def cost_of(name: str, text: str) -> int:
    """Lines that run for a text in parts of 32 characters, and one more for every 64 characters that are kept."""
    reader, lines = reader_of(form_of(TEMPLATES[name]), texts_of(), AUTO), 0

    def count(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        for place in range(0, len(text), 32):
            reader.read(text[place : place + 32], (), is_last=False)
            lines += len(reader._left) // 64
    finally:
        sys.settrace(before)
    return lines


def test_an_answer_that_comes_at_once_is_read_in_parts(monkeypatch):
    """Else each call in it would copy all that follows."""
    sizes, inner = [], CallReader._read_left

    def counted(reader, is_last):
        sizes.append(len(reader._left))
        return inner(reader, is_last)

    monkeypatch.setattr(CallReader, "_read_left", counted)
    calls = [("act", {"count": number}) for number in range(3_000)]
    message, _, _ = read("qwen3_coder", [written("qwen3_coder", "", calls)])
    assert calls_in(message) == calls
    assert max(sizes) <= 4096


def test_a_schema_is_read_in_bounds_for_each_value():
    """Both the schema and what the model writes are the client's to choose."""
    text = written("qwen3_coder", "", [("act", {"looped": "1", "long": 1})] * 2)
    lines = 0

    def count(frame, event, argument):
        nonlocal lines
        lines += event in ("line", "c_call", "call")
        return count

    sys.settrace(count)
    try:
        message, _, _ = read("qwen3_coder", [text])
    finally:
        sys.settrace(None)
    assert len(calls_in(message)) == 2
    assert lines < 20_000
