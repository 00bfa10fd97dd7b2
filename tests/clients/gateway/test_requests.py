"""What the gateway refuses, and how: OpenAI's error object and status, for whatever a client sends."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import openai
import psutil
import pytest
from fake_triton import echoed_prompt, empty_final, piece
from fuzz_gateway import faults
from serve_command import wait_until

from clients.gateway.events import Events, TextEvent, event
from clients.gateway.settings import Keys, Limits, read_keys
from clients.gateway.texts import ModelTexts
from export.errors import ConfigError
from export.tokenizer.loading import Tokenizer

CHAT = [{"role": "user", "content": "hi"}]


def ask(gateway, method: str, path: str, body=None, **headers) -> tuple[int, dict, dict[str, str]]:
    """Status, JSON and headers of an answer; a dict is sent as JSON, bytes as they are."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    with closing(http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=30)) as connection:
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        found = {key.lower(): value for key, value in response.getheaders()}
        return response.status, json.loads(response.read()), found


WRONG_FIELDS = (
        ({"prompt": "a"}, "model", "must provide a model"),
        ({"model": "phixtral"}, "prompt", "must provide a prompt"),
        ({"model": "phixtral", "prompt": ""}, "prompt", "empty text"),
        ({"model": "phixtral", "prompt": []}, "prompt", "none empty"),
        ({"model": "phixtral", "prompt": [[1], "a"]}, "prompt", "expected a text, a list"),
        ({"model": "phixtral", "prompt": [5000]}, "prompt", "token id 5000, expected ids below"),
        ({"model": "phixtral", "prompt": "a", "n": 17}, "n", "whole number from 1 to 16"),
        ({"model": "phixtral", "prompt": "a", "max_tokens": 10**12}, "max_tokens", "whole number from 0 to"),
        ({"model": "phixtral", "prompt": "a", "max_tokens": 0}, "max_tokens", "where echo is not true"),
        ({"model": "phixtral", "prompt": "a", "temperature": True}, "temperature", "a number from 0 to 2"),
        ({"model": "phixtral", "prompt": "a", "best_of": 2}, "best_of", "does not honour it"),
        ({"model": "phixtral", "prompt": "a", "tempreature": 1}, "tempreature", "did you mean temperature"),
        ({"model": "phixtral", "prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "token ids as keys"),
        ({"model": "phixtral", "prompt": "a", "logit_bias": {"01": 1, "1": 2}}, "logit_bias", "'01' is none"),
        ({"model": "phixtral", "prompt": "a", "stream_options": {}}, "stream_options", "stream is not true"),
        ({"model": "phixtral", "prompt": "a", "response_format": {"type": "json_object"}}, "response_format",
         "keeps no answer to a format"),
)  # fmt: skip


def test_wrong_fields_of_a_completion_are_named(gateway):
    for body, param, message in WRONG_FIELDS:
        status, answer, _ = ask(gateway, "POST", "/v1/completions", body)
        assert (status, answer["error"]["param"]) == (400, param), body
        assert message in answer["error"]["message"]


WRONG_MESSAGES = (
    ([], "at least one"),
    ([{"role": "wizard", "content": "a"}], r"messages[0].role is 'wizard'"),
    ([{"role": "user"}], "messages[0].content is None"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "models here read text"),
    ([*CHAT, {"role": "user", "content": "a", "contnet": 1}], "messages[1] has 'contnet'"),
)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
WRONG_TOOLS = (
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", None, "expected one of none, auto"),
    ({"tools": [TOOL, {"type": "web_search"}]}, "tools", None, "tools[1] is"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools", None, "expected one of the type function"),
    ({"tools": [TOOL]}, "tools", None, "this model's chat template shows none to the model"),
    ({"tools": [TOOL]}, "tools", None, "--chat-template FILE"),
)  # fmt: skip


def test_options_of_openais_prompt_cache_are_left_unread(gateway, server):
    server.answer = lambda request, context: iter([piece("a", (5,), num_output=1), empty_final()])
    options = {"prompt_cache_options": {"mode": "explicit", "ttl": "30m"}, "prompt_cache_key": "a"}
    for path, asked in (("chat/completions", {"messages": CHAT}), ("responses", {"input": "a"})):
        status, answer, _ = ask(gateway, "POST", f"/v1/{path}", {"model": "phixtral", **asked, **options})
        assert status == 200, answer


def test_tools_that_a_template_does_not_show_are_refused(gateway):
    for body, param, code, message in WRONG_TOOLS:
        asked = {"model": "phixtral", "messages": CHAT, **body}
        status, answer, _ = ask(gateway, "POST", "/v1/chat/completions", asked)
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, param, code), body
        assert message in answer["error"]["message"]


def test_tools_and_earlier_calls_reach_the_template_as_objects(gateway_of, server, tmp_path):
    server.answer = echoed_prompt
    (tmp_path / "tools.jinja").write_text(
        "{{ tools[0].function.name if tools else '-' }} {{ messages[1].tool_calls[0].function.arguments.a }} "
        "{{ messages[2].role }} {{ messages[2].content }}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
    messages = [*CHAT, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "8"}]  # fmt: skip
    client = gateway_of(chat_template=tmp_path / "tools.jinja").client()
    for choice, expected in (("auto", "add 7 tool 8"), ("none", "- 7 tool 8")):
        answer = client.chat.completions.create(model="phixtral", messages=messages, tools=[TOOL], tool_choice=choice)
        assert answer.choices[0].message.content == expected


def test_the_examples_template_shows_tools_and_its_calls_are_read(gateway_of, server):
    server.answer = echoed_prompt
    template = Path(__file__).parents[3] / "examples" / "tiny-phixtral" / "tools.jinja"
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
    messages = [{"role": "user", "content": "7 + 8?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "15"}]  # fmt: skip
    client = gateway_of(chat_template=template).client()
    turns = '7 + 8?\n<tool_call>\n{"name": "add", "arguments": {"a": 7}}\n</tool_call>\n'
    turns += "<tool_response>\n15\n</tool_response>"
    plain = client.chat.completions.create(model="phixtral", messages=messages).choices[0].message
    assert (plain.content, plain.tool_calls) == (turns, None)
    shown = client.chat.completions.create(model="phixtral", messages=messages, tools=[TOOL]).choices[0].message
    head, tools, *rest = shown.content.splitlines()
    assert (head, json.loads(tools), rest[:2]) == ("<tools>", TOOL, ["</tools>", "7 + 8?"])
    assert [(each.function.name, json.loads(each.function.arguments)) for each in shown.tool_calls] == [
        ("add", {"a": 7})
    ]


def test_wrong_messages_are_named(gateway):
    for messages, message in WRONG_MESSAGES:
        status, answer, _ = ask(gateway, "POST", "/v1/chat/completions", {"model": "phixtral", "messages": messages})
        assert status == 400
        assert message in answer["error"]["message"]


WRONG_RESPONSES = (
    ({"input": [{"role": "wizard", "content": "a"}]}, "input", "input[0].role is 'wizard'"),
    ({"input": [{"role": "user"}], "instructions": "x"}, "input", "input[0].content is None"),
    ({"input": "raise"}, "input", "input: the model's chat template does not render this conversation: not so"),
    ({"input": "a", "text": {"format": {"type": "json_object"}}}, "text.format", "text.format: found json_object"),
    ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format", "text.format"),
)


def test_wrong_fields_of_a_response_have_the_names_that_the_client_gave(gateway_of, tmp_path):
    (tmp_path / "refusing.jinja").write_text(
        "{{ raise_exception('not so') if messages[-1].content == 'raise' else 'a' }}"
    )
    gateway = gateway_of(chat_template=tmp_path / "refusing.jinja")
    for body, param, message in WRONG_RESPONSES:
        status, answer, _ = ask(gateway, "POST", "/v1/responses", {"model": "phixtral", **body})
        assert (status, answer["error"]["param"]) == (400, param), answer
        assert message in answer["error"]["message"]
        assert "messages" not in answer["error"]["message"].replace("of messages", "")


@pytest.mark.parametrize("is_stream", [True, False])
def test_what_the_server_refuses_of_a_response_has_the_clients_name(gateway, server, is_stream):
    def refusing(request, context):
        message = empty_final()
        message.ClearField("infer_response")
        message.error_message = "INVALID_ARGUMENT: reading the request: max_tokens: found 0, expected 1 or more"
        yield message

    server.answer = refusing
    body = {"model": "phixtral", "input": "a", "stream": is_stream}
    status, answer, _ = ask(gateway, "POST", "/v1/responses", body)
    assert (status, answer["error"]["param"]) == (400, "max_output_tokens")


NO_REQUESTS = (
    ("POST", "/v1/completions", b'{"model": ', {}, 400),
    ("POST", "/v1/completions", b"[1]", {}, 400),
    ("POST", "/v1/completions", b'{"model": "a\xff"}', {}, 400),
    ("POST", "/v1/completions", b"[" * 4_000, {}, 400),
    ("POST", "/v1/completions", b"x=1", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ("POST", "/v1/completions", b'{"prompt": "' + b"a" * 5_000 + b'"}', {}, 413),
    ("POST", "/v1/completions", b"\x1f\x8b", {"Content-Encoding": "gzip"}, 415),
    ("GET", "/v1/completions", None, {}, 405),
    ("POST", "/v1/embeddings", b"{}", {}, 404),
    ("GET", "/v1/models/other", None, {}, 404),
)


def test_what_is_no_request_gets_its_status_in_openais_form(gateway_of):
    gateway = gateway_of(limits=Limits(body_bytes=4096))
    for method, path, data, headers, status in NO_REQUESTS:
        found, answer, sent = ask(gateway, method, path, data, **headers)
        assert found == status, (method, path, data)
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert sent["x-request-id"].startswith("req-")


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/phixtral", "/v1/models/other", "/"])
def test_head_is_answered_as_get_without_a_body(gateway, path):
    """Probes of load balancers send it."""
    found = []
    for method in ("GET", "HEAD"):
        with closing(http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=30)) as connection:
            connection.request(method, path)
            response = connection.getresponse()
            found.append((response.status, response.getheader("content-type"), len(response.read())))
    assert found[1] == (*found[0][:2], 0)


def test_a_key_of_the_file_is_asked_for_everywhere_but_at_the_probe(gateway_of, tmp_path):
    (tmp_path / "keys").write_text(f"# ours\n{'a' * 20}\n\n{'b' * 20}\n")
    gateway = gateway_of(keys=read_keys(tmp_path / "keys"))
    assert gateway.client(api_key="b" * 20).models.list().data
    for path in ("/v1/models", "/metrics", "/nowhere"):
        assert ask(gateway, "GET", path)[0] == 401
        assert ask(gateway, "GET", path, Authorization=f"Bearer {'c' * 20}")[0] == 401
    assert ask(gateway, "GET", "/health")[0] == 200
    with pytest.raises(openai.AuthenticationError):
        gateway.client(api_key="a" * 19).models.list()


@pytest.mark.parametrize(("text", "problem"), [("", "found none"), ("short\n", "has 5 characters"),
                                               ("a" * 20 + "\n" + "a" * 20, "one key twice")])  # fmt: skip
def test_files_of_keys_that_cannot_be_meant_are_refused(tmp_path, text, problem):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_keys(tmp_path / "keys")


def drip(connection: socket.socket, size: int) -> None:
    """Send a byte every 20 ms."""
    for _ in range(size):
        connection.sendall(b"a")
        time.sleep(0.02)


def test_a_body_that_nobody_reads_does_not_keep_its_connection(gateway, monkeypatch):
    """The answer comes before the body, which then never ends."""
    monkeypatch.setattr("clients.gateway.server.HEAD_S", 0.2)
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 404 ")
        with pytest.raises(ConnectionError):
            drip(connection, 1000)


def test_no_key_opens_a_gateway_of_none():
    assert Keys().place("") is None


def test_what_is_in_flight_is_without_probes_and_scrapes(gateway_of, server):
    """Such requests are answered where too many others are in flight."""
    server.answer = server.stoppable
    gateway = gateway_of(limits=Limits(in_flight=1))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, gateway, "POST", "/v1/completions", {"model": "phixtral", "prompt": "a"})
        assert server.started.wait(30)
        assert ask(gateway, "GET", "/v1/models")[0] == 429
        assert ask(gateway, "GET", "/health")[0] == 200
        assert in_flight(gateway) == 1
        server.stopped.set()
        waiting.result(timeout=30)
    assert wait_until(lambda: in_flight(gateway) == 0)


def in_flight(gateway) -> int:
    with urllib.request.urlopen(f"{gateway.url}/metrics", timeout=30) as response:
        return int(re.search(r"^moeship_gateway_in_flight (\d+)$", response.read().decode(), re.MULTILINE)[1])


def test_more_requests_than_allowed_are_refused_with_a_time(gateway_of):
    status, answer, headers = ask(gateway_of(limits=Limits(in_flight=0)), "GET", "/v1/models")
    assert (status, headers["retry-after"], answer["error"]["type"]) == (429, "1", "rate_limit_exceeded")


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MEMORY = "{% set x = namespace(text='a') %}{% for a in range(60) %}{% set x.text = x.text * 2 %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "does not render"),
        ("{{ 'a' * 10**10 }}", "does not render"),
        (LOOP, "longer than 1 s"),
        (MEMORY, "it takes more memory than there is for it"),
        ("{% for %}", "it is no Jinja"),
    ],
)
def test_a_template_that_refuses_or_does_not_end_is_the_requests_error(gateway, tmp_path, template, message):
    (tmp_path / "template.jinja").write_text(template)
    for _ in range(2):
        with pytest.raises(openai.BadRequestError, match=message):
            gateway.client().chat.completions.create(model="phixtral", messages=CHAT)
    assert gateway.client().completions.create(model="phixtral", prompt="a").choices


def test_a_conversation_for_which_no_process_can_be_started_can_be_sent_again(gateway, tmp_path, monkeypatch, caplog):
    """As where the system has no room for one more process or open file."""
    body = {"model": "phixtral", "messages": CHAT}
    with monkeypatch.context() as patched:
        patched.setattr("sys.executable", str(tmp_path / "none"))
        status, answer, headers = ask(gateway, "POST", "/v1/chat/completions", body)
    assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "unavailable", "2")
    assert "no process can be started for a chat template" in caplog.text
    assert "bug of the gateway" not in caplog.text
    assert ask(gateway, "POST", "/v1/chat/completions", body)[0] == 200


def test_a_process_whose_pipe_is_closed_as_it_starts_costs_its_conversation_alone(gateway, monkeypatch):
    """uvloop raises RuntimeError where asyncio's own loop says nothing."""

    async def start(*words, **options):
        process = await started(*words, **options)
        monkeypatch.setattr(process.stdin, "write", closed)
        return process

    def closed(_data):
        raise RuntimeError("unable to perform operation; the handler is closed")

    started, body = asyncio.create_subprocess_exec, {"model": "phixtral", "messages": CHAT}
    with monkeypatch.context() as patched:
        patched.setattr("asyncio.create_subprocess_exec", start)
        status, answer, _ = ask(gateway, "POST", "/v1/chat/completions", body)
    assert (status, answer["error"]["code"]) == (503, "unavailable")
    assert wait_until(lambda: not renderers())
    assert ask(gateway, "POST", "/v1/chat/completions", body)[0] == 200


def test_a_conversation_whose_template_loops_holds_up_no_other(gateway_of, server, tmp_path, monkeypatch):
    """One renders for as long as the test wants, and others are answered beside it."""
    monkeypatch.setattr("clients.gateway.rendering.RENDER_S", 600)
    monkeypatch.setattr("clients.gateway.rendering.LONGEST_S", 600)
    (tmp_path / "looping.jinja").write_text("{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}a")
    gateway = gateway_of(chat_template=tmp_path / "looping.jinja")
    body = {"model": "phixtral", "messages": [{"role": "user", "content": "loop"}]}
    with ThreadPoolExecutor(1) as pool:
        looping = pool.submit(ask, gateway, "POST", "/v1/chat/completions", body)
        assert wait_until(renderers)
        for _ in range(5):
            assert gateway.client().chat.completions.create(model="phixtral", messages=CHAT).choices
        assert not looping.done()
        for process in renderers():
            process.kill()
        status, answer, _ = looping.result(timeout=30)
    assert (status, answer["error"]["code"]) == (400, "chat_template_failed")


def renderers() -> list[psutil.Process]:
    """The processes that render templates for the gateways of this process."""
    return [child for child in psutil.Process().children() if "rendering" in " ".join(child.cmdline())]


def test_variables_of_a_template_may_have_any_names(gateway_of, server, tmp_path):
    server.answer = echoed_prompt
    (tmp_path / "variables.jinja").write_text("{{ self_made }}{{ messages[0].content }}")
    variables = {"self": 1, "self_made": "a", "messages": [], "a b": 2, "": 3}
    answer = (
        gateway_of(chat_template=tmp_path / "variables.jinja")
        .client()
        .chat.completions.create(model="phixtral", messages=CHAT, extra_body={"chat_template_kwargs": variables})
    )
    assert answer.choices[0].message.content == "ahi"


def test_the_effort_of_reasoning_reaches_templates_that_read_it_and_is_refused_for_others(gateway_of, server, tmp_path):
    server.answer = echoed_prompt
    (tmp_path / "effort.jinja").write_text('{{ reasoning_effort | default("medium") }} {{ messages[0].content }}')
    client = gateway_of(chat_template=tmp_path / "effort.jinja").client()
    ask = {"model": "phixtral", "messages": CHAT}
    for more, expected in (
        ({}, "medium"), ({"reasoning_effort": "none"}, "medium"), ({"reasoning_effort": "high"}, "high"),
        ({"reasoning_effort": "low", "extra_body": {"chat_template_kwargs": {"reasoning_effort": "so"}}}, "so"),
    ):  # fmt: skip
        assert client.chat.completions.create(**ask, **more).choices[0].message.content == f"{expected} hi"
    answer = client.responses.create(model="phixtral", input="hi", reasoning={"effort": "high", "summary": "auto"})
    assert answer.output_text == "high hi"
    (tmp_path / "plain.jinja").write_text("{{ messages[0].content }}")
    plain = gateway_of(chat_template=tmp_path / "plain.jinja").client()
    assert plain.chat.completions.create(**ask, reasoning_effort="none").choices[0].message.content == "hi"
    with pytest.raises(openai.BadRequestError, match="found high, and this model's chat template has no place") as told:
        plain.chat.completions.create(**ask, reasoning_effort="high")
    assert told.value.param == "reasoning_effort"
    with pytest.raises(openai.BadRequestError, match="found low, and this model's chat template has no place") as told:
        plain.responses.create(model="phixtral", input="hi", reasoning={"effort": "low"})
    assert told.value.param == "reasoning.effort"


@pytest.mark.parametrize(
    ("asks", "expected"),
    [
        ({}, "<|user|>hi\n<|assistant|>|\n<|assistant|>"),
        ({"add_generation_prompt": False}, "<|user|>hi\n<|assistant|>|\n"),
        ({"continue_final_message": True}, "<|user|>hi\n<|assistant|>|"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "<|user|>hi\n<|assistant|>|"),
    ],
)
def test_a_conversation_ends_as_the_request_says(gateway, server, asks, expected):
    server.answer = echoed_prompt
    body = {"model": "phixtral", "messages": [*CHAT, {"role": "assistant", "content": "|"}], **asks}
    _, answer, _ = ask(gateway, "POST", "/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"] == expected
    _, counted, _ = ask(gateway, "POST", "/tokenize", body)
    _, plain, _ = ask(gateway, "POST", "/tokenize", {"model": "phixtral", "prompt": expected})
    assert counted["tokens"] == plain["tokens"]


def test_a_prompt_that_cannot_fit_is_refused_before_anything_is_computed_for_it(gateway, server, monkeypatch):
    def computed(*_arguments, **_options):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ModelTexts, "decode", computed)
    body = {"model": "phixtral", "prompt": [5] * 100_000}
    status, answer, _ = ask(gateway, "POST", "/v1/completions", body)
    assert (status, answer["error"]["code"], server.requests) == (400, "context_length_exceeded", [])
    assert "found a prompt of 100000 tokens, expected at most 639" in answer["error"]["message"]


def test_a_long_text_is_encoded_while_others_are_answered(gateway, monkeypatch):
    """The library's function for one text keeps Python's lock, and with it every other request."""
    alone = []
    monkeypatch.setattr(Tokenizer, "encode", lambda _self, text: alone.append(len(text)))
    monkeypatch.setattr(Tokenizer, "encode_prompt", lambda _self, text: alone.append(len(text)))
    text = "def main(): " * 20_000
    status, answer, _ = ask(gateway, "POST", "/tokenize", {"model": "phixtral", "prompt": text})
    assert (status, alone) == (200, [])
    status, answer, _ = ask(gateway, "POST", "/detokenize", {"model": "phixtral", "tokens": answer["tokens"]})
    assert answer["prompt"] == text


@pytest.mark.parametrize("path", ["/chat/completions", "/models"])
def test_a_path_without_v1_is_told_of_it(gateway, path):
    status, answer, _ = ask(gateway, "POST", path, {"model": "phixtral"})
    assert (status, answer["error"]["code"]) == (404, "unknown_url")
    assert f"did you mean /v1{path}? The base URL of OpenAI's clients ends in /v1" in answer["error"]["message"]
    _, other, _ = ask(gateway, "POST", "/v1/embeddings", {"model": "phixtral"})
    assert other["error"]["message"] == "unknown request URL: POST /v1/embeddings"


def test_damaged_bodies_get_the_right_status_and_nothing_of_other_requests(gateway, server):
    server.answer = echoed_prompt
    assert faults(gateway.url, "phixtral", seed=20261128, count=250) == []


def test_ids_of_requests_are_the_clients_and_differ_at_the_server(gateway, server):
    """A request that ends another one names it by its id."""
    for _ in range(2):
        _, _, headers = ask(
            gateway, "POST", "/v1/completions", {"model": "phixtral", "prompt": "a"}, **{"X-Request-Id": "mine"}
        )
        assert headers["x-request-id"] == "mine"
    first, second = (request.id for request in server.requests)
    assert first != second
    assert all(found.startswith("mine-") for found in (first, second))


@pytest.mark.parametrize(
    ("path", "asks"),
    [
        ("completions", {"prompt": "a"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("responses", {"input": "a"}),
    ],
)
def test_events_that_wait_are_sent_together_and_each_piece_has_its_own(gateway, server, monkeypatch, path, asks):
    send = Events._send

    async def slowly(*arguments, **options):
        await asyncio.sleep(0.02)
        await send(*arguments, **options)

    monkeypatch.setattr(Events, "_send", slowly)

    def fast(request, context):
        for number in range(1, 200):
            yield piece(f"<{number}>", (5,), num_output=number)
        yield piece("<200>", (6,), finish_reason="stop", num_output=200)
        yield empty_final()

    server.answer = fast
    address = urlsplit(gateway.url)
    body = json.dumps({"model": "phixtral", "stream": True, **asks})
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close"
    with socket.create_connection((address.hostname, address.port), timeout=30) as client:
        client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        raw = b"".join(iter(lambda: client.recv(1 << 16), b""))
    # One chunk of HTTP, which its length precedes, is one write of the gateway.
    writes = len(re.findall(rb"^[0-9a-f]+\r\n", raw, re.MULTILINE))
    numbers = re.findall(rb'data: [^\n]*"(?:text|content|delta)":"<([0-9]+)>"[^\n]*\n\n', raw)
    assert [int(number) for number in numbers] == [*range(1, 201)]
    assert writes < 150


@pytest.mark.parametrize(
    "text", ["", '"', "\\", "\x00\x1f\x7f", "\n\n data: x", "\u2028\u2029", "終\U0001f600", "</script>"]
)
def test_an_event_of_a_text_is_the_whole_object_encoded(text):
    def make(text: str) -> bytes:
        return event({"id": '"a', "choices": [{"index": 1, "delta": {"content": text}, "finish_reason": None}]})

    assert TextEvent(make)(text) == make(text)
    read = json.loads(TextEvent(make)(text).removeprefix(b"data: "))
    assert read["choices"][0]["delta"]["content"] == text


def test_what_a_piece_keeps_back_makes_no_event(gateway, server):
    def held(request, context):
        yield piece("", (5,), num_output=1)
        yield piece("ab", (6,), finish_reason="stop", num_output=2)
        yield empty_final()

    server.answer = held
    chunks = list(gateway.client().completions.create(model="phixtral", prompt="a", stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == ["ab"]
