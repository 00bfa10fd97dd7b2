"""Calls of tools in answers, as OpenAI's own client reads them, whole and streamed in pieces of any size.

The texts are those that models write by the templates of their families: Qwen's (hermes) and Mistral's of version 3.
"""

from __future__ import annotations

import itertools
import json
import random
from types import SimpleNamespace

import openai
import pytest
from fake_triton import empty_final, piece
from jsonschema import Draft202012Validator

from clients.gateway.api.tools import json_calls
from clients.gateway.api.tools.forms import HERMES, MISTRAL, UNKNOWN, form_of
from clients.gateway.api.tools.json_calls import JsonCalls
from clients.gateway.api.tools.offers import call_schema
from clients.gateway.api.tools.reading import message_of
from triton_repo.runtime.guided.grammars import check_guide

TEMPLATES = {
    "llama": '{% if tools %}{{ tools | tojson }}{"name": function name, "parameters": dictionary of argument name and '
    "its value}{% endif %}{{ messages[0].content }}",
    "granite": "{% if tools %}{{ tools | tojson }}<|tool_call|>{% endif %}{{ messages[0].content }}",
    "qwen3_coder": "{% if tools %}{{ tools | tojson }}<tool_call><function=a><parameter=b>{% endif %}"
    "{{ messages[0].content }}",
    "hermes": "{% if tools %}{{ tools | tojson }} <tool_call>\n{\"name\": NAME, \"arguments\": OBJECT}\n</tool_call>"
    "{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>",
    "mistral": "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS]{% else %}[INST]{{ m.content }}{% endif %}{% endfor %}",
    "other": "{{ tools | tojson }}{{ messages[0].content }}",
}  # fmt: skip
CHAT = [{"role": "user", "content": "7+8?"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}, "b": {"$ref": "#/$defs/n"}},
                       "required": ["a", "b"], "additionalProperties": False, "$defs": {"n": {"type": "integer"}}},
    },
}  # fmt: skip
SAY = {"type": "function", "function": {"name": "say", "parameters": {
    "type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}}}  # fmt: skip
REFUSAL = "INVALID_ARGUMENT: reading the request: guided_decoding_guide: found 'requried', which is no keyword"
ONE = [("add", {"a": 7, "b": 8})]
TRICKY = {"text": 'a " } and </tool_call> \\', "more": [{"x": {}}, "{"]}
# Form of the template, what the model writes, content and calls of the message.
ANSWERS = [
    ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 7, "b": 8}}\n</tool_call>', None, ONE),
    ("hermes", 'I add.\n\n<tool_call>\n{"name": "add", "arguments": {"a": 7, "b": 8}}\n</tool_call>', "I add.", ONE),
    ("hermes", '<tool_call>{"name":"add","arguments":{"a":7,"b":8}}</tool_call>\n<tool_call>\n{"name": "say", '
     '"arguments": ' + json.dumps(TRICKY) + "}\n</tool_call>\n", None, [*ONE, ("say", TRICKY)]),
    ("hermes", '<tool_call>\n{"arguments": {"a": 7, "b": 8}, "name": "add"}\n</tool_call>', None, ONE),
    ("hermes", '<tool_call>\n{"name": "say", "arguments": {}, "id": "}"}\n</tool_call> Done.', " Done.", [("say", {})]),
    ("hermes", "It is 15 < 16, <tool or so.\n", "It is 15 < 16, <tool or so.\n", []),
    ("hermes", "<tool_call>\nadd 7 and 8", "<tool_call>\nadd 7 and 8", []),
    ("hermes", 'Write \n<tool_call> for a call:\n<tool_call>{"name": "say", "arguments": {}}</tool_call>',
     "Write \n<tool_call> for a call:", [("say", {})]),
    ("hermes", '<tool_call>{"name": "' + "long" * 400 + '", "arguments": {}}</tool_call>', None, [("long" * 400, {})]),
    ("hermes", '<tool_call>\n{"a": 7}\n</tool_call>', '<tool_call>\n{"a": 7}\n</tool_call>', []),
    ("hermes", '<tool_call>\n{"name": "add"', '<tool_call>\n{"name": "add"', []),
    ("hermes", " \n ", " \n ", []),
    ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 7, "b": 8}}]', None, ONE),
    ("mistral", '[TOOL_CALLS][{"name": "add", "arguments": {"a": 7, "b": 8}, "id": "x]"}, {"name": "say", "arguments": '
     '{"text": "]"}}]', None, [*ONE, ("say", {"text": "]"})]),
    ("mistral", "[1, 2] is a list", "[1, 2] is a list", []),
    ("other", '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>',
     '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>', []),
]  # fmt: skip


@pytest.fixture
def ask(gateway_of, server, tmp_path):
    """The completion that OpenAI's client makes of an answer that the server gives in parts, whole or streamed."""
    server.more_inputs = ("guided_decoding_guide_type",)
    clients = {}

    def asked(form: str, parts, *, stream: bool, reason: str = "stop", choice="auto", tools=(ADD, SAY), **fields):
        if form not in clients:
            path = tmp_path / f"{form}.jinja"
            path.write_text(TEMPLATES[form])
            clients[form] = gateway_of(chat_template=path).client().chat.completions

        def answer(request, context):
            if parts is REFUSAL:
                message = empty_final()
                message.ClearField("infer_response")
                message.error_message = parts
                yield message
                return
            for number, part in enumerate(parts[:-1]):
                yield piece(part, (5,), num_output=number + 1)
            yield piece(parts[-1], (5,), finish_reason=reason, num_output=len(parts))
            yield empty_final()

        server.answer = answer
        body = {"model": "phixtral", "messages": CHAT, "tools": list(tools), "tool_choice": choice, **fields}
        if not stream:
            return clients[form].create(**body)
        with clients[form].stream(**body) as events:
            for _ in events:
                pass
            return events.get_final_completion()

    return asked


def parts_of(text: str, most: int, source: random.Random) -> list[str]:
    parts = []
    while text:
        size = source.randint(0, most)
        parts.append(text[:size])
        text = text[size:]
    return parts or [""]


def test_calls_are_read_by_the_form_of_the_template(ask):
    source = random.Random(7)
    for (form, text, content, calls), most in itertools.product(ANSWERS, (1, 3, 40, None)):
        parts = [text] if most is None else parts_of(text, most, source)
        (choice,) = ask(form, parts, stream=most is not None).choices
        found = choice.message.tool_calls or []
        assert [(call.function.name, json.loads(call.function.arguments)) for call in found] == calls, parts
        assert (choice.message.content or None) == content, parts
        assert choice.finish_reason == ("tool_calls" if calls else "stop")
        assert len({call.id for call in found}) == len(found)
        assert all(len(call.id) == 9 or form != "mistral" for call in found)


@pytest.mark.parametrize("stream", [False, True])
def test_no_call_behind_the_first_is_given_where_calls_may_not_be_parallel(ask, stream):
    call = '<tool_call>{"name": "say", "arguments": {"text": "%s"}}</tool_call>'
    for parallel, expected in ((True, ["a", "b"]), (False, ["a"])):
        parts = list("So: " + call % "a" + call % "b" + " Done.")
        [choice] = ask("hermes", parts, stream=stream, parallel_tool_calls=parallel).choices
        assert choice.message.content == "So: Done."
        assert [json.loads(found.function.arguments)["text"] for found in choice.message.tool_calls] == expected
        assert choice.finish_reason == "tool_calls"


def test_a_name_that_does_not_end_is_not_searched_again_and_again(monkeypatch):
    """A model may repeat itself there up to its context's end: the cost of a piece must not grow with the answer."""
    sizes = []

    class Begin:
        def match(self, text):
            sizes.append(len(text))

    monkeypatch.setattr(json_calls, "_BEGIN", Begin())
    texts = SimpleNamespace(tokenizer=SimpleNamespace(backend=SimpleNamespace(token_to_id=lambda _: None)), special=())
    reader = JsonCalls(HERMES, texts, "auto")
    parts = ['<tool_call>{"name": "', *["again" * 40] * 50]
    found = [delta for part in parts for delta in reader.read(part, (5,), is_last=False)]
    assert found == []
    assert len(sizes) == len(parts)
    assert max(sizes) <= 1024
    assert reader.read("", (), is_last=True) == [{"content": "".join(parts)}]


def test_a_call_that_is_cut_is_no_finished_one(ask):
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 7,'
    whole = ask("hermes", [text], stream=False, reason="length")
    # OpenAI's helper for streams raises for an answer that was cut, and has it.
    with pytest.raises(openai.LengthFinishReasonError) as raised:
        ask("hermes", [text], stream=True, reason="length")
    for (choice,) in (whole.choices, raised.value.completion.choices):
        assert choice.finish_reason == "length"
        assert choice.message.tool_calls[0].function.arguments == '{"a": 7,'


def test_arguments_come_as_they_are_written(gateway_of, server, tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATES["hermes"])

    def answer(request, context):
        for number, part in enumerate(
            ['<tool_call>{"name": "add", "argu', 'ments": {"a"', ": 7", "}}</tool_", "call>"]
        ):
            yield piece(part, (5,), num_output=number, finish_reason="stop" if part == "call>" else "")
        yield empty_final()

    server.answer = answer
    stream = gateway_of(chat_template=tmp_path / "t.jinja").client().chat.completions.create(
        model="phixtral", messages=CHAT, tools=[ADD], stream=True
    )  # fmt: skip
    calls = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.function.arguments for call in calls] == ["", '{"a"', ": 7", "}"]
    assert (calls[0].id is not None, calls[0].type, {call.index for call in calls}) == (True, "function", {0})


@pytest.mark.parametrize("stream", [True, False])
def test_a_begin_that_is_a_special_token_is_found_by_its_id(gateway_of, server, tmp_path, tiny_engine, stream):
    """Texts of answers do not show special tokens."""
    from tokenizers import Tokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(tiny_engine / "tokenizer.json"))
    tokenizer.add_special_tokens(["[TOOL_CALLS]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": tokenizer.get_vocab_size()}))
    (tmp_path / "t.jinja").write_text(TEMPLATES["mistral"])
    mark = tokenizer.token_to_id("[TOOL_CALLS]")

    def answer(request, context):
        text = ' [{"name": "add", "arguments": {"a": 7, "b": 8}}]'
        if stream:
            yield piece("", (mark,), num_output=1)
            yield piece(text[:9], (5,), num_output=2)
            text = text[9:]
        yield piece(text, (6,) if stream else (mark, 5, 6), finish_reason="stop", num_output=3)
        yield empty_final()

    server.answer = answer
    gateway = gateway_of(chat_template=tmp_path / "t.jinja", tokenizers={"": folder})
    body = {"model": "phixtral", "messages": CHAT, "tools": [ADD]}
    if stream:
        with gateway.client().chat.completions.stream(**body) as events:
            message = events.get_final_completion().choices[0].message
    else:
        message = gateway.client().chat.completions.create(**body).choices[0].message
    assert (message.content or None, message.tool_calls[0].function.name) == (None, "add")
    assert json.loads(message.tool_calls[0].function.arguments) == {"a": 7, "b": 8}


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
def test_a_begin_that_is_a_special_token_is_found_where_the_text_comes_later_than_its_tokens(lag):
    """As where a stop word may begin in it. The server leaves out the white space before an answer."""
    mark, words = 9, {1: " I", 2: " call", 3: " \u00bfhere?", 4: ' [{"name": "add", "arguments": {"a": 7}}]'}
    texts = SimpleNamespace(
        tokenizer=SimpleNamespace(backend=SimpleNamespace(token_to_id=lambda _: mark)), special={mark},
        token_bytes=lambda token: words[token].encode(),
    )  # fmt: skip
    tokens = [1, 2, 3, mark, 4]
    pieces = ["I", " call", " \u00bfhere?", "", words[4]]
    late = [*[""] * lag, *pieces]
    reader, found = JsonCalls(MISTRAL, texts, "auto"), []
    for number, text in enumerate(late):
        found += reader.read(text, tokens[number : number + 1], is_last=number + 1 == len(late))
    message = message_of(found)
    assert message["content"] == "I call \u00bfhere?"
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "add", "arguments": '{"a": 7}'}]


def sent(request) -> dict[str, str]:
    """The texts of a request's tensors by name."""
    raws = zip(request.inputs, request.raw_input_contents, strict=True)
    return {tensor.name: raw[4:].decode() for tensor, raw in raws if tensor.datatype == "BYTES"}


CALL = '{"name": "add", "arguments": {"a": 7, "b": 8}}'
NAMED = {"type": "function", "function": {"name": "add"}}


REQUIRED = [
    ("hermes", CALL, "<tool_call>\n"), ("mistral", f"[{CALL}]", "[TOOL_CALLS]"), ("other", CALL, "7+8?"),
    ("granite", f"[{CALL}]", "<|tool_call|>"), ("qwen3_coder", CALL, "7+8?"),
    ("llama", CALL.replace("arguments", "parameters"), "7+8?"),
]  # fmt: skip


def test_a_call_that_is_required_is_written_under_its_schema(ask, server):
    source = random.Random(1)
    for (form, written, prompt), choice, stream in itertools.product(REQUIRED, ("required", NAMED), (True, False)):
        parts = parts_of(written, 5, source) if stream else [written]
        (found,) = ask(form, parts, stream=stream, choice=choice).choices
        (call,) = found.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 7, "b": 8})
        assert found.finish_reason == ("tool_calls" if choice == "required" else "stop")
        assert not found.message.content
        tensors = sent(server.requests[-1])
        assert tensors["text_input"].endswith(prompt)
        assert tensors["guided_decoding_guide_type"] == "json_schema"
        schema = tensors["guided_decoding_guide"]
        schema = schema.replace("parameters", "arguments") if form == "llama" else schema
        check_required(json.loads(schema), form in ("mistral", "granite"), choice == "required")


def check_required(schema: dict, is_list: bool, takes_say: bool) -> None:
    """A call's schema takes calls of the functions that may be called, and no others."""
    validator = Draft202012Validator(schema)
    for call, fits in (
        (json.loads(CALL), True),
        ({"name": "say", "arguments": {"text": "a"}}, takes_say),
        ({"name": "add", "arguments": {"a": "7", "b": 8}}, False),
        ({"name": "add"}, False),
        ({"name": "sub", "arguments": {}}, False),
    ):
        assert validator.is_valid([call] if is_list else call) == fits, call


@pytest.mark.parametrize("is_list", [True, False])
@pytest.mark.parametrize("tools", [[ADD], [SAY, ADD]])
def test_the_schema_of_a_call_is_one_that_servers_keep_answers_to(tools, is_list):
    schema = call_schema([tool["function"] for tool in tools], is_list=is_list)
    Draft202012Validator.check_schema(schema)
    check_guide("json_schema", json.dumps(schema))


@pytest.mark.parametrize("absent", [{}, {"parameters": None}])
def test_a_function_that_names_no_parameters_is_called_without_any(absent):
    """OpenAI: "Omitting parameters defines a function with an empty parameter list"."""
    schema = call_schema([{"name": "now", **absent}], is_list=False)
    check_guide("json_schema", json.dumps(schema))
    fits = Draft202012Validator(schema).is_valid
    assert fits({"name": "now", "arguments": {}})
    assert not fits({"name": "now", "arguments": {"a": 1}})
    assert not fits({"name": "now", "arguments": None})


def test_the_tokens_of_a_chat_are_those_with_its_tools(gateway_of, tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATES["hermes"] + "{{ ending }}")
    gateway = gateway_of(chat_template=tmp_path / "t.jinja")
    client = gateway.client().with_options(base_url=gateway.url)
    chat = {"model": "phixtral", "messages": CHAT, "tools": [SAY], "chat_template_kwargs": {"ending": "so"}}
    tokens = client.post("/tokenize", cast_to=object, body=chat)["tokens"]
    text = client.post("/detokenize", cast_to=object, body={"model": "phixtral", "tokens": tokens})["prompt"]
    begin, end = ' <tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call>', "<|user|>7+8?<|assistant|>so"
    assert text == json.dumps([SAY]) + begin + end


def test_only_references_are_changed_in_a_schema_that_is_moved():
    """Values stay as they are, and so do the names of properties, whatever they are."""
    values = {"enum": [{"$ref": "#/x", "$schema": "y"}], "default": {"$ref": "#/x"}}
    inner = {"type": "integer"}
    named = {"$schema": inner, "const": {"$ref": "#/$defs/enum"}, "own": values, "properties": {"$ref": "#"}}
    parameters = {"$schema": "z", "properties": named, "$defs": {"enum": inner}}
    schema = call_schema([{"name": "f", "parameters": parameters}], is_list=False)["properties"]["arguments"]
    path = "#/properties/arguments"
    expected = {**named, "const": {"$ref": f"{path}/$defs/enum"}, "properties": {"$ref": path}}
    assert schema == {"properties": expected, "$defs": {"enum": inner}}


def test_forms_are_told_apart_by_what_templates_contain():
    assert form_of(TEMPLATES["hermes"]) is HERMES
    assert form_of(TEMPLATES["mistral"]) is MISTRAL
    for other in ("", TEMPLATES["other"], TEMPLATES["hermes"] + "<function=NAME>", TEMPLATES["hermes"] + "<arg_key>"):
        assert form_of(other) is UNKNOWN


WRONG = [
    ({"tool_choice": "required", "tools": None}, "tool_choice", "without tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice", "one of the tools: add"),
    ({"tool_choice": "any"}, "tool_choice", "expected one of none, auto, required"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "expected one of none, auto, required"),
    ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice", "beside response_format"),
    ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos", "whose answers must end"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}, {}]}, "tools", "tools[1] is"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": "x"}}]}, "tools", "are no object"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"enum": ["x" * 70_000]}}}],
      "tool_choice": "required"}, "tools", "at most 65536 bytes"),
]  # fmt: skip


def test_choices_that_cannot_be_met_are_named(gateway_of, server, tmp_path):
    server.more_inputs = ("guided_decoding_guide_type",)
    (tmp_path / "t.jinja").write_text(TEMPLATES["hermes"])
    client = gateway_of(chat_template=tmp_path / "t.jinja").client()
    for body, param, message in WRONG:
        with pytest.raises(openai.BadRequestError) as refused:
            client.post("/chat/completions", cast_to=object,
                        body={"model": "phixtral", "messages": CHAT, "tools": [ADD], **body})  # fmt: skip
        assert refused.value.param == param, body
        assert message in refused.value.message
    server.more_inputs = ()
    (tmp_path / "again.jinja").write_text(TEMPLATES["hermes"])
    with pytest.raises(openai.BadRequestError, match="this model's server keeps no answer to a form"):
        gateway_of(chat_template=tmp_path / "again.jinja").client().chat.completions.create(
            model="phixtral", messages=CHAT, tools=[ADD], tool_choice="required"
        )


def test_what_the_server_refuses_of_a_calls_schema_is_told_of_the_tools(ask):
    for stream in (True, False):
        with pytest.raises(openai.BadRequestError) as refused:
            ask("hermes", REFUSAL, stream=stream, choice="required")
        assert refused.value.param == "tools"
