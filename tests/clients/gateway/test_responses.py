"""/v1/responses with tools, by the openai package: its own types check every event, and its client reads them."""

from __future__ import annotations

import json

import openai
import pytest
from fake_triton import empty_final, piece
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from tool_templates import TEMPLATES

TOOL = {
    "type": "function", "name": "add", "strict": True, "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}  # fmt: skip
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 7}}\n</tool_call>'
ASK = {"model": "phixtral", "input": "7+8?", "tools": [TOOL]}
EVENT = TypeAdapter(ResponseStreamEvent)
TEXT_EVENTS = ["response.content_part.added", "response.output_text.delta", "response.output_text.done",
               "response.content_part.done"]  # fmt: skip
CALL_EVENTS = ["response.function_call_arguments.delta", "response.function_call_arguments.done"]


@pytest.fixture
def client_of(gateway_of, server, tmp_path):
    """A client of a model whose template shows tools in a form, and writes everything that it is given."""
    server.more_inputs = ("guided_decoding_guide_type",)

    def made(form: str) -> openai.OpenAI:
        path = tmp_path / f"{form}.jinja"
        path.write_text(
            "{{ tools | tojson if tools }}" + "{#" + TEMPLATES[form].replace("#}", "") + "#}"
            "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}|{{ m.content }}|{{ m.tool_call_id }}"
            "{% for c in m.tool_calls or [] %}{{ c.id }}={{ c.function.name }}{{ c.function.arguments | tojson }}"
            "{% endfor %}{% endfor %}"
        )
        return gateway_of(chat_template=path).client()

    return made


@pytest.fixture
def client(client_of) -> openai.OpenAI:
    return client_of("hermes")


def answers(server, text: str, *, size: int = 5, reason: str = "stop") -> None:
    parts = [text[place : place + size] for place in range(0, len(text), size)]

    def answer(request, context):
        for number, part in enumerate(parts, start=1):
            yield piece(part, (5,), finish_reason=reason if number == len(parts) else "", num_output=number)
        yield empty_final()

    server.answer = answer


def events_of(client: openai.OpenAI, **body) -> list:
    """The events of a stream, each one checked, as their JSON."""
    found = []
    with client.responses.with_streaming_response.create(**{**ASK, **body}, stream=True) as raw:
        for line in raw.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
                EVENT.validate_python(found[-1])
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def plain(response: dict) -> list[dict]:
    """A response's items without their ids, which differ."""
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in response["output"]]


def test_a_call_is_an_item_whole_and_streamed(client, server):
    answers(server, f"I add.\n{CALL}\n{CALL}")
    whole = client.responses.create(**ASK)
    Response.model_validate(whole.to_dict())
    assert [item.type for item in whole.output] == ["message", "function_call", "function_call"]
    assert (whole.output_text, whole.status, whole.tools[0].name) == ("I add.", "completed", "add")
    assert [(call.name, json.loads(call.arguments), call.status) for call in whole.output[1:]] == [
        ("add", {"a": 7}, "completed")
    ] * 2
    assert len({item.id for item in whole.output} | {call.call_id for call in whole.output[1:]}) == 5
    events = events_of(client)
    assert plain(events[-1]["response"]) == plain(whole.to_dict())
    kinds = [event["type"] for event in events]
    assert events[0]["response"]["output"] == []
    assert kinds[:2] == ["response.created", "response.in_progress"]
    for place, inner in enumerate((TEXT_EVENTS, CALL_EVENTS, CALL_EVENTS)):
        own = [event for event in events if event.get("output_index") == place]
        order = list(dict.fromkeys(event["type"] for event in own))
        assert order == ["response.output_item.added", *inner, "response.output_item.done"]
        assert {event["item_id"] for event in own[1:-1]} == {own[0]["item"]["id"]}
        assert own[-1]["item"] == events[-1]["response"]["output"][place]
        deltas = "".join(event.get("delta", "") for event in own)
        assert deltas == (own[-1]["item"].get("arguments") or own[-1]["item"]["content"][0]["text"])
    with client.responses.stream(**ASK) as stream:
        for _ in stream:
            pass
        assert [one.type for one in stream.get_final_response().output] == ["message", "function_call", "function_call"]


def test_a_call_that_is_cut_is_incomplete(client, server):
    answers(server, CALL[: CALL.index("7") + 1], reason="length")
    for response in (client.responses.create(**ASK).to_dict(), events_of(client)[-1]["response"]):
        assert (response["status"], response["output"][0]["status"]) == ("incomplete", "incomplete")
        assert response["output"][0]["arguments"] == '{"a": 7'


def test_a_call_whose_parameters_are_cut_off_stays_open(client_of, server):
    """In a form where no brace of the model's says so, and in a chat as in a response."""
    client = client_of("qwen3_coder")
    text = "<tool_call>\n<function=add>\n<parameter=a>\n7\n</parameter>\n"
    chat = {"model": "phixtral", "messages": [{"role": "user", "content": "7+8?"}],
            "tools": [{"type": "function", "function": {"name": "add", "parameters": TOOL["parameters"]}}]}  # fmt: skip
    for reason, expected in (("length", '{"a": 7'), ("stop", '{"a": 7}')):
        answers(server, text, reason=reason)
        found = [client.responses.create(**ASK).output[0].arguments]
        found.append(events_of(client)[-1]["response"]["output"][0]["arguments"])
        found.append(client.chat.completions.create(**chat).choices[0].message.tool_calls[0].function.arguments)
        chunks = client.chat.completions.create(**chat, stream=True)
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        found.append("".join(call.function.arguments for call in calls))
        assert found == [expected] * 4


def test_an_answer_without_text_is_an_empty_message(client, server):
    answers(server, " ", size=1)
    server.answer = lambda request, context: iter([piece("", (5,), finish_reason="stop"), empty_final()])
    for response in (client.responses.create(**ASK).to_dict(), events_of(client)[-1]["response"]):
        assert [item["type"] for item in response["output"]] == ["message"]
        assert response["output"][0]["content"][0]["text"] == ""


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "add"}])
def test_a_call_that_is_required_is_guided(client, server, choice):
    answers(server, '{"name": "add", "arguments": {"a": 7}}')
    response = client.responses.create(**ASK, tool_choice=choice)
    assert [(item.type, item.arguments) for item in response.output] == [("function_call", '{"a": 7}')]
    raws = zip(server.requests[-1].inputs, server.requests[-1].raw_input_contents, strict=True)
    guide = json.loads(next(raw[4:] for tensor, raw in raws if tensor.name == "guided_decoding_guide"))
    assert guide["properties"]["name"] == {"const": "add"}
    echoed = response.tool_choice if isinstance(choice, str) else response.tool_choice.to_dict()
    assert echoed == choice


def test_earlier_items_are_the_models_turns(client, server):
    """As openai-agents sends them: the items of an answer, and the outputs of its calls."""
    answers(server, f"I add.\n{CALL}\n{CALL}")
    first = client.responses.create(**ASK).output
    results = [{"type": "function_call_output", "call_id": item.call_id, "output": "15"} for item in first[1:]]
    results[1]["output"] = [{"type": "input_text", "text": "15"}]
    thought = {"type": "reasoning", "id": "rs_1", "summary": [],
               "content": [{"type": "reasoning_text", "text": "Sum."}]}  # fmt: skip
    asked = [{"role": "user", "content": "7+8?"}, thought, *(item.to_dict() for item in first), *results]
    client.responses.create(model="phixtral", input=asked)
    raws = zip(server.requests[-1].inputs, server.requests[-1].raw_input_contents, strict=True)
    prompt = next(raw[4:].decode() for tensor, raw in raws if tensor.name == "text_input")
    one, two = (item.call_id for item in first[1:])
    assert prompt == (
        f'<user>|7+8?|<assistant>Sum.|I add.|{one}=add{{"a": 7}}{two}=add{{"a": 7}}<tool>|15|{one}<tool>|15|{two}'
    )


def test_an_empty_answer_stays_a_turn_and_reasoning_alone_is_none(client, server):
    """Templates such as Mistral's refuse a user who speaks twice."""
    answers(server, "a")
    thought = {"type": "reasoning", "id": "rs_1", "summary": [],
               "content": [{"type": "reasoning_text", "text": "Sum."}]}  # fmt: skip
    empty = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
             "content": [{"type": "output_text", "text": "", "annotations": []}]}  # fmt: skip
    user = {"role": "user", "content": "7+8?"}
    client.responses.create(model="phixtral", input=[user, empty, user, thought, user])
    raws = zip(server.requests[-1].inputs, server.requests[-1].raw_input_contents, strict=True)
    prompt = next(raw[4:].decode() for tensor, raw in raws if tensor.name == "text_input")
    assert prompt == "<user>|7+8?|<assistant>||<user>|7+8?|<user>|7+8?|"


WRONG = [
    ({"tools": [{"type": "web_search"}]}, "tools", "tools[0] is"),
    ({"tools": [{"type": "function", "function": {"name": "add"}}]}, "tools", "whose function has a name"),
    ({"tool_choice": "required", "tools": []}, "tool_choice", "without tools"),
    ({"tool_choice": {"type": "function", "name": "sub"}}, "tool_choice", "one of the tools: add"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "expected one of none, auto, required"),
    ({"tool_choice": "any"}, "tool_choice", "expected one of none, auto, required"),
    ({"input": []}, "input", "a list of items"),
    ({"input": ["a"]}, "input", "input[0] is 'a'"),
    ({"input": [{"type": ["message"]}]}, "input", "expected an item of the type message, function_call"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "nothing is stored"),
    ({"input": [{"type": "function_call", "call_id": "1", "name": "add"}]}, "input", "input[0].arguments is None"),
    ({"input": [{"type": "function_call_output", "output": "1"}]}, "input", "input[0].call_id is None"),
    ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input", "input[0].output is None"),
    ({"input": [{"type": "reasoning", "content": "x"}]}, "input", "expected reasoning whose content"),
    ({"input": [{"type": "reasoning", "content": [{"text": 1}]}]}, "input", "expected reasoning whose content"),
]  # fmt: skip


def test_wrong_tools_and_items_are_named(client):
    for body, param, message in WRONG:
        with pytest.raises(openai.BadRequestError) as refused:
            client.post("/responses", cast_to=object, body={**ASK, **body})
        assert refused.value.param == param, body
        assert message in refused.value.message
