"""Tokenizer and chat template as Qwen's models are published with them, small and made by hand; transformers, on the
same files, says what is right."""

from __future__ import annotations

import json

import pytest
from qwen_tokenizer import START, STOP, write_qwen_tokenizer
from transformers import AutoTokenizer

from export.tokenizer.chat_template import ChatTemplate
from export.tokenizer.settings import read_settings

CONVERSATIONS = [
    [{"role": "user", "content": "2+2?"}],
    [{"role": "system", "content": "Be  brief.\n"}, {"role": "user", "content": " naïve e\u0301 <|im_end|> 123\r\n"}],
    [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "<think>\nso\n</think>\n\nd"},
    ],
    [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant", "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"town": "Zürich"}}}],
        },
        {"role": "tool", "content": '{"sky": "grey"}'},
    ],
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "look", "description": "l'œil", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen2_moe", "qwen2", "qwen3"])
def folder(request, tmp_path_factory):
    """A folder with the files of a published checkpoint: tokenizer.json with the class's pipeline written out, and
    tokenizer_config.json with its added tokens and its template."""
    made = tmp_path_factory.mktemp(request.param)
    write_qwen_tokenizer(made)
    (made / "config.json").write_text(json.dumps({"model_type": request.param, "eos_token_id": 0}))
    return made


def test_the_published_file_is_kept_as_it_is_and_gives_transformers_ids(folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = read_settings(folder, json.loads((folder / "config.json").read_text()))
    assert ours.facts.tokenizer_class == type(theirs).__name__ == "Qwen2Tokenizer"
    assert ours.facts.special_tokens == theirs.special_tokens_map
    for text in (
        "it'S 12345 we'll\r\n\n  x = [7,8]; e\u0301 ",
        f"{START}user\n日本{STOP}\n",
        "\t\n  <think> a</think>",
    ):
        assert ours.tokenizer.backend.encode(text).ids == theirs(text)["input_ids"], text
    (folder / "made").mkdir()
    ours.write(folder / "made")
    assert (folder / "made" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("more", [{}, {"enable_thinking": False}], ids=["thinking", "not thinking"])
def test_the_template_gives_what_apply_chat_template_gives(folder, conversation, tools, more):
    facts = read_settings(folder, json.loads((folder / "config.json").read_text())).facts
    template = ChatTemplate(facts.chat_templates["default"], facts.special_tokens)
    asked = {"tools": tools, "add_generation_prompt": True}
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(conversation, tokenize=False, **asked, **more)
    assert template.render(conversation, variables=more, **asked) == expected
    assert expected.startswith(START)
