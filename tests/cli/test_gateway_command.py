"""What `moeship gateway` refuses before it listens."""

from __future__ import annotations

import socket
import sys

import pytest

from cli.demo import CHAT_TEMPLATE
from cli.main import main
from export.tokenizer.chat_template import ChatTemplate

TRITON = ["gateway", "--triton", "127.0.0.1:8001"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gateway", "--triton", "http://127.0.0.1:8001"], "found a scheme; give HOST:PORT"),
        ([*TRITON, "--tokenizer", "nowhere"], "--tokenizer nowhere: there is no such folder"),
        ([*TRITON, "--tokenizer", "=/"], "found no model before the ="),
        ([*TRITON, "--repository", "nowhere"], "--repository nowhere: there is no such folder"),
        ([*TRITON, "--deadline", "0"], "--deadline is 0.0, expected a finite number above 0"),
        ([*TRITON, "--api-keys", "nowhere"], "nowhere does not exist"),
        ([*TRITON, "--chat-template", "nowhere.jinja"], "nowhere.jinja does not exist"),
        (["demo", "--openai-port", "65536"], "the openai port is 65536, expected 1 to 65535"),
        (["demo", "--openai-port", "65536", "--precision", "q4"], "the openai port is 65536, expected 1 to 65535"),
        (["demo", "--precision", "fp16"], "no fp16 kernels for mixtures on the provider cpu"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(capsys, words, message):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_serve_refuses_files_of_the_gateway_before_it_starts_a_server(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "keys").write_text("short")
    words = ["serve", str(tmp_path), "--openai-port", str(port)]
    for flags, message in (
        (["--chat-template", "nowhere.jinja"], "nowhere.jinja does not exist"),
        (["--api-keys", str(tmp_path / "keys")], "key 1 has 5 characters"),
    ):
        assert main([*words, *flags]) == 2
        assert message in capsys.readouterr().err


def test_serve_says_that_the_gateways_packages_are_missing_before_it_starts_a_server(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert main(["serve", str(tmp_path), "--openai-port", str(port)]) == 2
    message = capsys.readouterr().err
    assert "moeship[gateway]" in message
    assert "uvicorn" in message


def test_a_template_that_is_no_jinja_is_refused_before_it_listens(tmp_path, capsys):
    (tmp_path / "chat.jinja").write_text("{% for message in messages %}")
    assert main([*TRITON, "--chat-template", str(tmp_path / "chat.jinja")]) == 2
    assert "chat.jinja: it is no Jinja" in capsys.readouterr().err


def test_the_example_chats_by_a_template_of_its_own():
    """One text of the messages, which the model continues."""
    template = ChatTemplate(CHAT_TEMPLATE.read_text(), {}, extra="gateway")
    messages = [{"role": "system", "content": "# Python"}, {"role": "user", "content": "def main("}]
    assert template.render(messages, add_generation_prompt=True) == "# Python\ndef main("


def test_a_port_that_is_taken_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([*TRITON, "--port", str(port)]) == 2
    assert f"listening on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err
